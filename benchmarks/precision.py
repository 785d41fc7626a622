"""bfloat16 beside float32: time, memory and what the rounding costs.

    taskset -c 1 python benchmarks/precision.py [--config configs/emoji.py] [--kinds forward]

One U-Net with weights and features in each dtype (norms, softmaxes and the prediction are float32 in both), forward and
gradient with respect to the latents. CPU time in turns; the difference is that of the results, over their root mean
square in float32.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import add_arguments, make_case
from timing import Program, ratio, seconds, take_turns

from afa_jax.models.unet import UNet
from afa_jax.trees import take


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="*", choices=("forward", "gradient"), default=("forward", "gradient"))
    options = parser.parse_args()
    cases = {dtype: make_case(options, dtype=jnp.dtype(dtype)) for dtype in ("float32", "bfloat16")}

    def forward(unet: UNet, x: jax.Array, t: jax.Array, conditioning: Any) -> jax.Array:
        return unet(x, t, take(conditioning, 0))

    def gradient(unet: UNet, x: jax.Array, *rest: Any) -> jax.Array:
        return jax.grad(lambda x: 0.5 * jnp.square(forward(unet, x, *rest)).sum())(x)

    print(cases["float32"])
    print(f"{'':10}{'':10}{'ms':>10}{'ratio':>8}{'compile s':>11}{'temp MiB':>10}{'difference':>12}")
    for kind in options.kinds:
        function: Any = dict(forward=forward, gradient=gradient)[kind]
        programs = {
            dtype: Program(function, take(case.experts, 0), case.latents, case.t, case.conditioning)
            for dtype, case in cases.items()
        }
        times = take_turns({dtype: program.task for dtype, program in programs.items()}, options.rounds)
        exact = np.asarray(programs["float32"]()[0])
        for dtype, program in programs.items():
            difference = np.asarray(program()[0]) - exact
            print(
                f"{kind:10}{dtype:10}{1000 * seconds(times[dtype]):10.1f}{ratio(times[dtype], times['float32']):8.2f}"
                f"{program.seconds:11.1f}{program.temporary / 2**20:10.1f}"
                f"{np.sqrt(np.square(difference).mean() / np.square(exact).mean()):12.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
