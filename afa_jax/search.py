"""Search for merge weights: ``python -m afa_jax.search --config configs/emoji.py --workdir DIR --metric subject``.

autoMBW is a black-box search, by optuna, over the experts' weights in each block of a merge, for the best score of
generated pictures: the judge's of emoji scenes, or with --prompt_file any metric of afa_jax.evaluate. The first trial
is the uniform average, so on its own prompts the search never ends below that. Each trial is on disk (DIR/trials.log)
before the next one begins. SIGTERM and Ctrl-C stop at once, and --resume continues with the same trials. DIR/best.json,
or --out, has the best weights as the method ``mbw`` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT, GUIDANCE, SEED, STEPS, real, whole
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.names import SEARCHERS, SPACES
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Run the trials that are missing and write the best weights."""
    parser = Parser(prog="python -m afa_jax.search", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of this search")
    parser.add_argument("--resume", action="store_true", help="continue the search in the workdir")
    parser.add_argument("--overwrite", action="store_true", help="replace the search in the workdir")
    parser.add_argument("--metric", default="subject", help="emoji: the judge's, or kid; else: any of evaluate's")
    parser.add_argument("--trials", type=COUNT, default=250, metavar="N", help="in all, with those before a --resume")
    parser.add_argument("--minutes", type=real(0, 10**7), metavar="M", help="begin no trial after this time")
    parser.add_argument("--space", choices=SPACES, default="blocks", help="what has weights of its own")
    parser.add_argument("--points", type=whole(1, 1000), default=4, help="of --space curve: its control points")
    parser.add_argument("--sampler", choices=SEARCHERS, default="tpe")
    parser.add_argument("--prompts", type=COUNT, default=32, metavar="N", help="emoji: pictures of each trial")
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="prompts instead of emoji scenes: one a line, or .csv, .tsv, .jsonl, also with real pictures (reference)",
    )
    parser.add_argument("--steps", type=STEPS, default=10, help="sampling steps")
    parser.add_argument("--guidance", type=GUIDANCE, help="guidance scale (default: the config's)")
    parser.add_argument("--batch", type=COUNT, default=16, help="pictures at once")
    parser.add_argument("--seed", type=SEED, default=1000, help="of the noise and of the search")
    parser.add_argument("--out", type=Path, help="JSON file for the result (default: best.json in the workdir)")
    parser.add_argument("--write", type=Path, metavar="OUT", help="write the best merge, as afa_jax.merge would")
    options, config = parse(parser, arguments)
    Ensemble(config).search(
        options.workdir,
        resume=options.resume,
        overwrite=options.overwrite,
        metric=options.metric,
        trials=options.trials,
        minutes=options.minutes,
        space=options.space,
        points=options.points,
        sampler=options.sampler,
        prompts=options.prompts,
        prompt_file=options.prompt_file,
        steps=options.steps,
        guidance_scale=options.guidance,
        batch=options.batch,
        seed=options.seed,
        out=options.out,
        write=options.write,
        quiet=False,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
