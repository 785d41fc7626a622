"""Make pictures: ``python -m afa_jax.sample --config configs/emoji.py --workdir DIR --prompt "..." --out DIR``.

Writes one PNG a picture, with the whole recipe in its metadata (text chunk "afa_jax", JSON), and a grid, a prompt a
row. With ``--prompts FILE`` instead of ``--prompt`` it makes thousands, over all devices and processes, numbered as
afa_jax/sampling/sample_many.py says; what is there already stays, so that a start that was killed goes on with the
next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import (
    COUNT,
    GUIDANCE,
    STEPS,
    add_size_arguments,
    check_method,
    check_prompt_file,
    check_prompts,
    check_run,
    real,
    seed_or_random,
    size_of,
)
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.errors import InputError
from afa_jax.files import check_folder
from afa_jax.mesh import cluster
from afa_jax.names import METHODS
from afa_jax.sampling.prompt_lines import read_lines
from afa_jax.weights.tokenizer.prompts import check_prompt


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
    parser.add_argument("--maps", action="store_true", help="also write the maps of every picture")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")
    cluster.add_arguments(parser)
    options, config = parse(parser, arguments)
    check_prompts(options.prompt or ())
    check_prompt(options.negative_prompt, "--negative_prompt")
    if options.prompts is not None and options.maps:
        raise InputError("--maps goes with --prompt; of a file of prompts only the pictures are kept")
    check_method(options.method, config)
    size = size_of(options, config.base)
    if cluster.settings(options) is None:  # else process 0 alone may have it
        check_folder(options.out)
        check_prompt_file(options.prompts)
        if options.prompts is not None:
            read_lines(options.prompts, options.negative_prompt, quiet=True)
        check_run(options.workdir)

    from afa_jax.mesh import processes as distributed
    from afa_jax.sampling.pictures import Asked, sample_file, sample_prompts

    asked = Asked(
        method=options.method,
        workdir=options.workdir,
        negative_prompt=options.negative_prompt,
        num_images=options.num_images,
        seed=options.seed,
        size=size,
        steps=options.steps,
        guidance=options.guidance,
        eta=options.eta,
        maps=options.maps,
        overwrite=options.overwrite,
    )
    distributed.start(options)
    if options.prompts is not None:
        sample_file(config, options.prompts, options.out, asked)
    else:
        sample_prompts(config, options.prompt, options.out, asked)


if __name__ == "__main__":
    raise SystemExit(run(main))
