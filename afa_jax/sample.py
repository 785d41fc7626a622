"""Make pictures: ``python -m afa_jax.sample --config configs/emoji.py --workdir DIR --prompt "..." --out DIR``.

It writes one PNG for each picture, with the whole recipe in its metadata (text chunk "afa_jax", JSON), and a grid with
one row for each prompt. With ``--prompts FILE`` instead of ``--prompt`` it makes thousands, over all devices and
processes, numbered as described in afa_jax/sampling/sample_many.py. Finished pictures stay, so a start after a kill
continues with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT, GUIDANCE, STEPS, add_size_arguments, real, seed_or_random, size_of, with_style
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.errors import InputError
from afa_jax.mesh import cluster
from afa_jax.names import METHODS
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Sample every prompt ``--num_images`` times into ``--out``."""
    parser = Parser(prog="python -m afa_jax.sample", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    texts.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with prompt, negative_prompt"
    )
    parser.add_argument("--negative_prompt", default="", metavar="TEXT")
    parser.add_argument("--num_images", type=COUNT, default=1, metavar="K", help="pictures of each prompt")
    parser.add_argument("--seed", type=seed_or_random, default=0, metavar="N", help="of the noise; -1: a random one")
    parser.add_argument("--steps", type=STEPS, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=GUIDANCE, help="guidance scale (default: the config's)")
    parser.add_argument("--eta", type=real(0, 1000), help="0 (default): deterministic DDIM, 1: as much noise as DDPM")
    add_size_arguments(parser)
    parser.add_argument(
        "--method",
        default="afa",
        metavar="NAME|KIND[:EXPERT][,OPTION=VALUE]...",
        help=f"one of the config's, by its name, or a kind: {', '.join(METHODS)} (afa_jax/methods/registry.py)",
    )
    parser.add_argument(
        "--style", metavar="NAME=WEIGHT,...", help="of a distilled model with styles: one, or a mixture of several"
    )
    parser.add_argument("--maps", action="store_true", help="also write the maps of every picture")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")
    cluster.add_arguments(parser)
    options, config = parse(parser, arguments)
    if options.prompts is not None and options.maps:
        raise InputError("--maps goes with --prompt; of a file of prompts only the pictures are kept")
    shared = dict(
        negative_prompt=options.negative_prompt,
        num_images=options.num_images,
        seed=options.seed,
        steps=options.steps,
        guidance_scale=options.guidance,
        size=size_of(options, config.base),
        eta=options.eta,
        method=options.method if options.style is None else with_style(options.method, options.style),
        overwrite=options.overwrite,
    )
    ensemble = Ensemble(config, workdir=options.workdir, processes=cluster.settings(options))
    if options.prompts is not None:
        ensemble.sample_file(options.prompts, options.out, **shared)
    elif files := ensemble(options.prompt, maps=options.maps, out=options.out, **shared).files:
        print(files[-1])


if __name__ == "__main__":
    raise SystemExit(run(main))
