"""What the sampler costs beyond its network: one jitted scan over T steps against T calls of one jitted prediction.

    taskset -c 1 python benchmarks/sampler.py [--config configs/emoji.py] [--steps 10]

Both with classifier-free guidance, so that a prediction is the network on twice the batch. CPU time, in turns; the last
column is the scan over the T calls, less 1. The calls also pay for being called, some tenths of a millisecond each.
"""

import argparse
from typing import Any

import jax
import numpy as np
from networks import add_arguments, make_case
from timing import Program, Task, ratio, seconds, take_turns

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import sample
from afa_jax.fusion.afa import FusedUNets
from afa_jax.models.unet import UNet
from afa_jax.trees import take

GUIDANCE = 3.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--denoisers", nargs="*", choices=("expert", "afa"), default=("expert", "afa"))
    options = parser.parse_args()
    case = make_case(options)

    def prediction(denoiser: UNet | FusedUNets, x: jax.Array, t: jax.Array, conditioning: Any) -> jax.Array:
        def network(x: jax.Array, t: jax.Array, own: Any) -> jax.Array:
            return denoiser(x, t, own if isinstance(denoiser, FusedUNets) else take(own, 0))

        other = jax.tree.map(lambda states: states[:, ::-1], conditioning)
        return guided(network, conditioning, other, GUIDANCE)(x, t)

    def scan(denoiser: UNet | FusedUNets, x: jax.Array, conditioning: Any) -> jax.Array:
        ddim = DDIM(schedule=case.schedule)
        return sample(ddim, lambda x, t: prediction(denoiser, x, t, conditioning), x, ddim.constants(options.steps))

    print(case)
    print(f"{'':10}{'a prediction, ms':>18}{f'{options.steps} steps, ms':>18}{'overhead':>10}")
    for name in options.denoisers:
        denoiser = take(case.experts, 0) if name == "expert" else case.ensemble
        one = Program(prediction, denoiser, case.latents, case.t, case.conditioning)
        whole = Program(scan, denoiser, case.latents, case.conditioning)
        times = take_turns({"calls": repeated(one.task, options.steps), "scan": whole.task}, options.rounds)
        print(
            f"{name:10}{1000 * seconds(times['calls']) / options.steps:18.1f}{1000 * seconds(times['scan']):18.1f}"
            f"{100 * (ratio(times['scan'], times['calls']) - 1):9.1f}%",
            flush=True,
        )


def repeated(task: Task, count: int) -> Task:
    """The same task, so many times."""

    def run() -> tuple[float, float]:
        cpu, wall = np.sum([task() for _ in range(count)], axis=0)
        return float(cpu), float(wall)

    return run


if __name__ == "__main__":
    main()
