"""Implementations of attention on this device: time and temporary memory, forward and gradient.

    taskset -c 1 python benchmarks/attention.py [--dtype bfloat16]

"default" is what `afa_jax.models.attention.attend` chooses on this device; the others are named there, but for
"einsum", the formula written out. Ratios are over "xla" in the same round, memory is the programs' temporary. Fewer
heads than the network has where all would take long; they are alike.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from timing import Program, ratio, seconds, take_turns

from afa_jax.models.attention import BLOCK, attend

# What: batch, queries, keys, heads, channels a head.
SHAPES = {
    "emoji 4 x 8": (16, 32, 32, 4, 20),
    "emoji 4 x 8, text": (16, 32, 24, 4, 20),
    "SD1.5 16 x 16": (2, 256, 256, 8, 160),
    "SD1.5 32 x 32": (1, 1024, 1024, 4, 80),
    "SD1.5 64 x 64, text": (1, 4096, 77, 4, 40),
    "SD1.5 64 x 64": (1, 4096, 4096, 1, 40),
    "SABW 64 x 64": (1, 4096, 4096, 1, 16),
}


def einsum(query: Array, key: Array, value: Array) -> Array:
    """Softmax of the scaled products, in float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def main() -> None:
    """Print a line an implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    implementations: dict[str, Callable[..., Array]] = dict(
        xla=functools.partial(attend, implementation="xla"), default=attend, einsum=einsum
    )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.dtype}")
    print(f"{'':22}{'':10}{'forward ms':>12}{'ratio':>7}{'MiB':>8}{'gradient ms':>13}{'ratio':>7}{'MiB':>8}")
    for what, (batch, queries, keys, heads, width) in SHAPES.items():
        rng = jax.random.split(jax.random.key(0), 3)
        shapes = ((batch, n, heads, width) for n in (queries, keys, keys))
        qkv = [jax.random.normal(k, shape, options.dtype) for k, shape in zip(rng, shapes, strict=True)]
        offered = dict(implementations)
        if queries % BLOCK == 0:
            offered["blocks"] = functools.partial(attend, implementation="blocks")
        forward = {name: Program(function, *qkv) for name, function in offered.items()}
        gradient = {
            # Half the square: what comes back into it is the output itself.
            name: Program(jax.grad(lambda *a, f=f: 0.5 * jnp.square(f(*a).astype(jnp.float32)).sum(), (0, 1, 2)), *qkv)
            for name, f in offered.items()
        }
        rows = [
            take_turns({n: p.task for n, p in programs.items()}, options.rounds) for programs in (forward, gradient)
        ]
        for name in offered:
            cells = ""
            for times, programs, wide in zip(rows, (forward, gradient), (12, 13), strict=True):
                cells += f"{1000 * seconds(times[name]):{wide}.2f}{ratio(times[name], times['xla']):7.2f}"
                cells += f"{programs[name].temporary / 2**20:8.1f}"
            print(f"{what:22}{name:10}{cells}", flush=True)


if __name__ == "__main__":
    main()
