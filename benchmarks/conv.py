"""Why `afa_jax.models.layers.conv2d` is not XLA's convolution on a CPU.

    python benchmarks/conv.py

GFLOP/s of 3x3 convolutions that keep size and channels, the best of some runs: forward, forward with both gradients,
and forward with the input's gradient inside a loop over three kernels, as in map_experts' scan. Implementations: XLA's
convolution, one matrix product of the neighbourhoods (used up to SMALL_MAP pixels a map), and XLA's with our gradients
(used above). Two or three minutes; other work on the machine shows in the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.models import layers

# batch, rows, columns, channels: the emoji U-Net's levels, and one larger map.
SIZES = ((32, 2, 4, 288), (32, 4, 8, 192), (32, 8, 16, 96), (16, 16, 32, 96), (16, 32, 64, 48))
IMPLEMENTATIONS = {"xla": layers._conv2d_xla, "columns": layers._conv2d_columns, "custom": layers._conv2d_cpu}
RUNS, SECONDS = 20, 2.0


def best_seconds(function: Callable[..., object], *arguments: Array) -> float:
    """The shortest of up to RUNS runs within SECONDS, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < RUNS and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def in_loop(conv: Callable[[Array, Array], Array], xs: Array, kernels: Array) -> Array:
    """Each x with its kernel, one after another."""
    return jax.lax.map(lambda pair: conv(*pair), (xs, kernels))


def main() -> None:
    """Print the table."""
    device = jax.devices("cpu")[0]
    print(f"jax {jax.__version__}, {device.device_kind}, GFLOP/s, float32")
    heads = [f"{name:>9} {'+ grad':>8} {'in loop':>8}" for name in IMPLEMENTATIONS]
    print(f"{'batch x (map) x channels':<26}" + "".join(heads))
    with jax.default_device(device):
        for batch, height, width, channels in SIZES:
            x = jax.random.normal(jax.random.key(0), (batch, height, width, channels))
            kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / (3 * channels**0.5)
            gflop = 2e-9 * 9 * batch * height * width * channels**2
            row = f"{batch} x ({height} x {width}) x {channels}".ljust(26)
            for conv in IMPLEMENTATIONS.values():
                forward = jax.jit(lambda x, kernel, conv=conv: conv(x, kernel, 1, (1, 1)))
                # Half the square, so that what comes back is the output itself and costs nothing.
                both = jax.jit(jax.grad(lambda *a, f=forward: 0.5 * jnp.square(f(*a)).sum(), (0, 1)))
                row += f"{gflop / best_seconds(forward, x, kernel):9.1f}"
                row += f" {3 * gflop / best_seconds(both, x, kernel):8.1f}"
                mapped = jax.jit(jax.grad(lambda *a, f=forward: 0.5 * jnp.square(in_loop(f, *a)).sum()))
                row += f" {6 * gflop / best_seconds(mapped, jnp.stack([x] * 3), jnp.stack([kernel] * 3)):8.1f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
