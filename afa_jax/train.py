"""Train the aggregators of an ensemble: ``python -m afa_jax.train --config configs/emoji.py --workdir DIR``.

Only the aggregators train; experts, text encoders and VAE stay as they are. Instead of AFA's aggregators it can be a
rival: ``config.fusion`` with the kind gate, router or mbw (afa_jax/fusion/registry.py). The workdir gets metrics.jsonl,
validation.jsonl and samples/, checkpoints to resume from, and at the end aggregators.safetensors and ensemble.json,
which ``afa_jax.sample`` reads; with validation, the pair of the step with the lowest loss is in best/.
"""

from __future__ import annotations

from collections.abc import Sequence

from afa_jax.cli.arguments import add_workdir_arguments, check_workdir_arguments
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.config.schema import require
from afa_jax.mesh import cluster


def main(arguments: Sequence[str]) -> None:
    """Train from a config into a workdir."""
    parser = Parser(prog="python -m afa_jax.train", description=__doc__)
    add_workdir_arguments(parser)
    cluster.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options, config = parse(parser, arguments)
    require(config, "data")
    check_workdir_arguments(options, cluster.settings(options) is None, config.cache.path)

    from afa_jax.mesh import processes as distributed
    from afa_jax.training.run import train
    from afa_jax.training.workdir import resume_if_any

    distributed.start(options)
    resume_if_any(options)
    train(
        config,
        options.workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        overwrite=options.overwrite,
        quiet=options.quiet,
        arguments=options.config_arguments,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
