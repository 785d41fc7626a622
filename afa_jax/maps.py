"""Show which expert painted what: ``python -m afa_jax.maps --config CONFIG --workdir DIR --prompt "..." --out DIR``.

It writes for each prompt the picture, the maps of every site over the timesteps (``*_maps.png``) and an animation of
them (``*_maps.webp``). ``--statistics`` adds each expert's mean weight by site and timestep over many prompts.
maps.html shows all of it, and maps.json has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import GUIDANCE, STEPS, add_size_arguments, seed_or_random, size_of
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Write pictures, sheets, animations, maps.html and maps.json into ``--out``."""
    parser = Parser(prog="python -m afa_jax.maps", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--statistics", metavar="FILE|emoji:N", help="over the prompts of a text file, one a line, or N emoji scenes"
    )
    parser.add_argument("--seed", type=seed_or_random, default=0, metavar="N", help="of the noise; -1: a random one")
    parser.add_argument("--steps", type=STEPS, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=GUIDANCE, help="guidance scale (default: the config's)")
    add_size_arguments(parser)
    parser.add_argument(
        "--method", default="afa", help="afa, or another method that has maps", metavar="NAME|KIND[,OPTION=VALUE]..."
    )
    parser.add_argument("--out", type=Path, default=Path("maps"), help="folder for all of it (default: maps)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same name")
    options, config = parse(parser, arguments)

    page = Ensemble(config, workdir=options.workdir).maps(
        options.prompt,
        out=options.out,
        statistics=options.statistics,
        method=options.method,
        seed=options.seed,
        steps=options.steps,
        guidance_scale=options.guidance,
        size=size_of(options, config.base),
        overwrite=options.overwrite,
    )
    print(page)


if __name__ == "__main__":
    raise SystemExit(run(main))
