"""Train and sample the emoji ensemble: ``python -m afa_jax.demo --out runs/emoji`` (``make demo``).

It trains the aggregators on the shipped experts. It samples the same prompts and seeds from every expert, from the
uniform average and from AFA. It writes a self-contained page with the pictures, the loss and the maps, and the pictures
in one file (comparison.png).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import seed_or_random
from afa_jax.cli.commands import Parser, load_config, run
from afa_jax.config.files import shipped_config
from afa_jax.training.run_folders import check_workdir
from afa_jax.weights.formats.hub_ids import check_named

CONFIG = "emoji"


def main(arguments: Sequence[str]) -> None:
    """Train, sample and write ``--out/index.html``."""
    parser = Parser(prog="python -m afa_jax.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--seed", type=seed_or_random, default=0, metavar="N", help="of the noise; -1: a random one")
    options, overrides = parser.parse_known_args(list(arguments))
    if unknown := [argument for argument in overrides if not argument.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    file = str(shipped_config(CONFIG) or CONFIG)
    config = load_config(file, [override.removeprefix("--config.") for override in overrides])
    check_workdir(options.out, resume=options.resume, overwrite=options.overwrite, cache=config.cache.path)
    base = config.base if isinstance(config.base, str) else config.base.path
    for path in (base, *(expert["path"] for expert in config.experts)):
        check_named(path)

    from afa_jax.report.demo import demo

    demo(
        config,
        options.out,
        resume=options.resume,
        overwrite=options.overwrite,
        seed=options.seed,
        arguments=["--config", file, *overrides],
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
