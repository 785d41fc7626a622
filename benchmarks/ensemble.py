"""The whole ensemble over N times one U-Net, forward and training: FLOPs, and CPU time in turns.

    taskset -c 1 python benchmarks/ensemble.py [--config configs/emoji.py]
    taskset -c 1 python benchmarks/ensemble.py --width 160 --latents 32 32 --batch 2
    python benchmarks/ensemble.py --width 320 --latents 64 64 --batch 8 --flops

Of FLOPs it is the limit that no implementation beats without doing less: what the aggregators cost beside the experts.
"forward" is one prediction. "gradient" is what a training step is made of: for the ensemble the gradient with respect
to the aggregators, for one U-Net that with respect to its input, the same work. --flops counts only, and needs no
memory. The uniform average is the ensemble with constant maps.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from networks import add_arguments, make_case
from timing import Program, ratio, seconds, take_turns

from afa_jax.fusion import afa as fusion
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.single import ConstantMaps
from afa_jax.mesh.experts import Shared
from afa_jax.trees import axis_size, stack, take


def unrolled(function: Callable[..., Any], *arguments: Any) -> Any:
    """As map_experts, without a loop."""
    count = axis_size([argument for argument in arguments if not isinstance(argument, Shared)])
    return stack(
        [
            function(*(own.value if isinstance(own, Shared) else take(own, index) for own in arguments))
            for index in range(count)
        ]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flops", action="store_true", help="count only")
    options = parser.parse_args()
    case = make_case(options, abstract=options.flops)
    count = axis_size(case.experts)
    even = ConstantMaps(weights=jnp.full((count,), 1 / count))
    uniform, afa = FusedUNets(experts=case.experts, aggregators=even), case.ensemble
    one = jax.eval_shape(take, case.experts, 0) if options.flops else take(case.experts, 0)

    def error(prediction: jax.Array) -> jax.Array:
        return jnp.square(prediction).mean()

    def forward(denoiser: Any, x: jax.Array, t: jax.Array, conditioning: Any) -> jax.Array:
        return denoiser(x, t, conditioning if isinstance(denoiser, FusedUNets) else take(conditioning, 0))

    def gradient(denoiser: Any, x: jax.Array, t: jax.Array, conditioning: Any) -> Any:
        if isinstance(denoiser, FusedUNets):
            return jax.value_and_grad(
                lambda own: error(forward(dataclasses.replace(denoiser, aggregators=own), x, t, conditioning))
            )(denoiser.aggregators)
        return jax.value_and_grad(lambda x: error(forward(denoiser, x, t, conditioning)))(x)

    print(case)
    print(f"{'':10}{'':10}{'GFLOP':>10}{'/ N x one':>10}{'CPU ms':>10}{'/ N x one':>10}")
    for what in (forward, gradient):
        flops, tasks = {}, {}
        for name, denoiser in {"one": one, "uniform": uniform, "afa": afa}.items():
            inputs = case.latents, case.t, case.conditioning
            # The body of a loop over the experts is counted once, so FLOPs are those of the program without loops.
            with mock.patch.object(fusion, "map_experts", unrolled):
                flops[name] = jax.jit(what).lower(denoiser, *inputs).cost_analysis()["flops"]
            if not options.flops:
                tasks[name] = Program(what, denoiser, *inputs).task
        times = take_turns(tasks, options.rounds)
        for name in flops:
            cells = f"{flops[name] / 1e9:10.1f}{flops[name] / (count * flops['one']):10.3f}"
            if times:
                cells += f"{1000 * seconds(times[name]):10.1f}{ratio(times[name], times['one']) / count:10.3f}"
            print(f"{what.__name__:10}{name:10}{cells}", flush=True)


if __name__ == "__main__":
    main()
