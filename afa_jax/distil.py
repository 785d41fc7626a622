"""Distil many experts into one checkpoint: ``python -m afa_jax.distil --config configs/emoji_distil.py --workdir DIR``.

The teacher is any method (``router,workdir=runs/router``; ``data`` for the control without a teacher), the student one
U-Net and its text encoder, by default the experts' average. The workdir gets metrics.jsonl, validation.jsonl and
checkpoints to resume from, and at the end one ordinary checkpoint, as a diffusers folder (``model``) and as a single
file (``model.safetensors``), with what it was distilled from and its distance to the teacher in the metadata. In
``afa_jax.sample`` and ``afa_jax.evaluate`` it is ``--method distilled:DIR``.
"""

from __future__ import annotations

from collections.abc import Sequence

from afa_jax.cli.arguments import add_workdir_arguments
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Distil from a config into a workdir."""
    parser = Parser(prog="python -m afa_jax.distil", description=__doc__)
    parser.add_argument(
        "--teacher", metavar="NAME|KIND[,OPTION=VALUE]...", help="a method, or data (default: distil.teacher)"
    )
    parser.add_argument(
        "--student", metavar="NAME|KIND[,OPTION=VALUE]...", help="a method that is one U-Net (default: distil.student)"
    )
    add_workdir_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options, config = parse(parser, arguments)
    ensemble = Ensemble(config, arguments=options.config_arguments)
    ensemble.distil(
        options.workdir,
        teacher=options.teacher,
        student=options.student,
        resume=options.resume,
        resume_step=options.resume_step,
        resume_if_any=options.resume_if_any,
        overwrite=options.overwrite,
        quiet=options.quiet,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
