"""Ways to run a function for each expert side by side: step time, compile time and temporary memory.

    taskset -c 1 python benchmarks/map_experts.py [--config configs/emoji.py] [--kinds forward]

N U-Nets on the same latents, forward and gradient with respect to the latents. Times are CPU times in turns, over those
of "loop" in the same round: N modules one after another, not stacked, which is what "unroll" is without its slices.
"scan" is map_experts.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from networks import add_arguments, make_case
from timing import Program, ratio, seconds, take_turns

from afa_jax.mesh.experts import Shared, map_experts
from afa_jax.models.unet import UNet
from afa_jax.trees import axis_size, stack, take


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", choices=("forward", "gradient"), default=("forward", "gradient"))
    options = parser.parse_args()
    case = make_case(options)
    t, conditioning = case.t, take(case.conditioning, 0)

    def total(unet: UNet, x: jax.Array) -> jax.Array:
        return unet(x, t, conditioning)

    def loop(unets: list[UNet], x: jax.Array) -> jax.Array:
        return jnp.stack([total(unet, x) for unet in unets])

    def unroll(experts: UNet, x: jax.Array) -> jax.Array:
        return stack([total(take(experts, i), x) for i in range(axis_size(experts))])

    ways: dict[str, Callable[[Any, jax.Array], jax.Array]] = dict(
        unroll=unroll,
        scan=lambda experts, x: map_experts(total, experts, Shared(x)),
        vmap=lambda experts, x: jax.vmap(lambda unet: total(unet, x))(experts),
    )

    apart = [take(case.experts, i) for i in range(axis_size(case.experts))]
    forwards: dict[str, tuple[Callable[[Any, jax.Array], jax.Array], Any]] = {"loop": (loop, apart)}
    forwards |= {name: (way, case.experts) for name, way in ways.items()}
    print(case)
    print(f"{'':10}{'':8}{'ms':>10}{'/ loop':>8}{'compile s':>11}{'temp MiB':>10}")
    for kind in options.kinds:
        programs = {}
        for name, (forward, experts) in forwards.items():
            function: Any = forward
            if kind == "gradient":
                function = jax.grad(lambda experts, x, f=forward: jnp.square(f(experts, x)).sum(), argnums=1)
            programs[name] = Program(function, experts, case.latents)
        times = take_turns({name: program.task for name, program in programs.items()}, options.rounds)
        for name, program in programs.items():
            print(
                f"{kind:10}{name:8}{1000 * seconds(times[name]):10.1f}{ratio(times[name], times['loop']):8.2f}"
                f"{program.seconds:11.1f}{program.temporary / 2**20:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
