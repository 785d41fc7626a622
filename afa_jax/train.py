"""Train the aggregators of an ensemble: ``python -m afa_jax.train --config configs/emoji.py --workdir DIR``.

Only the aggregators are trained; experts, text encoders and VAE stay as they are. With ``config.fusion`` of the kind
gate, router or mbw, a rival is trained instead of AFA's aggregators (afa_jax/fusion/registry.py). The workdir gets
metrics.jsonl, validation.jsonl and samples/, checkpoints to resume from, and at the end aggregators.safetensors and
ensemble.json, which ``afa_jax.sample`` reads. With validation, best/ has the pair of the step with the lowest loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from afa_jax.cli.arguments import add_workdir_arguments
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.mesh import cluster
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Train from a config into a workdir."""
    parser = Parser(prog="python -m afa_jax.train", description=__doc__)
    add_workdir_arguments(parser)
    cluster.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options, config = parse(parser, arguments)
    ensemble = Ensemble(config, arguments=options.config_arguments, processes=cluster.settings(options))
    ensemble.train(
        options.workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        resume_if_any=options.resume_if_any,
        overwrite=options.overwrite,
        quiet=options.quiet,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
