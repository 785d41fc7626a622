"""One prediction of the ensemble over N predictions of one expert: FLOPs, CPU seconds, wall seconds.

    python benchmarks/ensemble.py --config configs/emoji.py [--batch 8]

The config's own experts and fresh aggregators (their values do not change the time). The programs take turns; the best
of each is printed, since other work on the machine only adds.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from afa_jax.commands import load_config
from afa_jax.experts import load_experts
from afa_jax.fusion.ensemble import Ensemble, SingleExpert
from afa_jax.fusion.kinds import init_fusion
from afa_jax.fusion.sabw import SABWConfig


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    config = load_config(options.config)
    experts = load_experts(config)
    n, unet, vae = len(experts.names), experts.unet.config, experts.vae.config
    aggregators = init_fusion(SABWConfig(**config.sabw), experts.unet, n, 0)
    height, width = (side // vae.factor for side in config.sample.size)
    latents = jax.random.normal(jax.random.key(0), (options.batch, height, width, unet.in_channels))
    t = jnp.full((options.batch,), 500)
    states = jax.random.normal(
        jax.random.key(1), (n, options.batch, experts.tokenizer.length, unet.cross_attention_dim)
    )
    denoisers: dict[str, Any] = {
        "one expert": SingleExpert(experts=experts.unet, index=jnp.zeros((), jnp.int32)),
        "uniform": Ensemble(experts=experts.unet, weights=jnp.full((n,), 1 / n)),
        "afa": Ensemble(experts=experts.unet, aggregators=aggregators),
    }
    programs = {}
    for name, denoiser in denoisers.items():
        lowered = jax.jit(lambda denoiser, *inputs: denoiser(*inputs)).lower(denoiser, latents, t, states)
        programs[name] = lowered.compile()
    flops: dict[str, float] = {}
    for name in programs:
        # A loop over the experts is counted once by the compiler, so FLOPs are those of the unrolled program.
        unrolled = denoisers[name]
        if isinstance(unrolled, Ensemble):
            unrolled = dataclasses.replace(unrolled, mode="unroll")
        lowered = jax.jit(lambda denoiser, *inputs: denoiser(*inputs)).lower(unrolled, latents, t, states)
        flops[name] = lowered.cost_analysis()["flops"]
    cpu, wall = dict.fromkeys(programs, 1e9), dict.fromkeys(programs, 1e9)
    for _ in range(options.rounds):
        for name, program in programs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(denoisers[name], latents, t, states))
            wall[name] = min(wall[name], time.perf_counter() - started)
            cpu[name] = min(cpu[name], time.process_time() - cpu_started)
    print(f"{n} experts, batch {options.batch}, {jax.default_backend()}; in brackets over {n} x one expert")
    print(f"{'':12}{'GFLOP':>18}{'CPU ms':>18}{'wall ms':>18}")
    for name in programs:
        cells = ""
        for figures, scale in ((flops, 1e-9), (cpu, 1e3), (wall, 1e3)):
            ratio = figures[name] / (n * figures["one expert"])
            cells += f"{figures[name] * scale:11.1f} ({ratio:.2f})"
        print(f"{name:12}{cells}")


if __name__ == "__main__":
    main()
