"""The modes of map_experts, measured side by side: compile time, step time and temporary memory.

    python benchmarks/map_experts.py

One U-Net of the emoji architecture, random weights, N = 3, forward and gradient with respect to the latents, and a loop
of N separate calls as the base. CPU seconds, best of five rounds in which the modes take turns.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from afa_jax.commands import load_config
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.parallel import MODES, Mode, map_experts, stack


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    config = UNetConfig(**load_config("configs/emoji_base.py").unet)
    unets = [UNet(config, rngs=nnx.Rngs(seed)) for seed in range(options.experts)]
    experts = stack(unets)
    x = jax.random.normal(jax.random.key(0), (options.batch, 8, 16, config.in_channels))
    t = jnp.full((options.batch,), 500)
    states = jax.random.normal(jax.random.key(1), (options.batch, 24, config.cross_attention_dim))

    def total(unet: UNet, x: jax.Array) -> jax.Array:
        return unet(x, t, states)

    def loop(_: UNet, x: jax.Array) -> jax.Array:
        return jnp.stack([total(unet, x) for unet in unets])

    def mapped(mode: Mode, experts: UNet, x: jax.Array) -> jax.Array:
        return map_experts(total, (experts,), (x,), mode)

    forwards: dict[str, Callable[[Any, jax.Array], jax.Array]] = {"loop": loop}
    for mode in MODES:
        forwards[mode] = functools.partial(mapped, mode)
    programs, compiled_in, memory = {}, {}, {}
    for name, forward in forwards.items():
        for kind in ("forward", "gradient"):
            function: Any = forward
            if kind == "gradient":
                function = jax.grad(lambda x, experts, f=forward: jnp.square(f(experts, x)).sum())
            arguments = (experts, x) if kind == "forward" else (x, experts)
            started = time.process_time()
            program = jax.jit(function).lower(*arguments).compile()
            compiled_in[name, kind] = time.process_time() - started
            memory[name, kind] = program.memory_analysis().temp_size_in_bytes / 2**20
            programs[name, kind] = (program, arguments)
    best: dict[tuple[str, str], float] = {}
    for _ in range(5):
        for key, (program, arguments) in programs.items():
            jax.block_until_ready(program(*arguments))
            started = time.process_time()
            for _ in range(3):
                jax.block_until_ready(program(*arguments))
            best[key] = min(best.get(key, 1e9), (time.process_time() - started) / 3)
    print(f"{'mode':8}{'kind':>10}{'ms':>10}{'x loop':>8}{'compile s':>11}{'temp MiB':>10}")
    for (name, kind), seconds in best.items():
        ratio = seconds / best["loop", kind]
        print(
            f"{name:8}{kind:>10}{1000 * seconds:10.1f}{ratio:8.2f}{compiled_in[name, kind]:11.1f}"
            f"{memory[name, kind]:10.1f}"
        )


if __name__ == "__main__":
    main()
