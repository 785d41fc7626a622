"""Export an ensemble for other tools: ``python -m afa_jax.export --config CONFIG --workdir RUN --snapshot OUT``.

--pair: a folder to publish: ``aggregators.safetensors``, ``ensemble.json`` and a model card, README.md; with
--with_config also a config.py, in which a reader fills in the paths of the experts.
--snapshot: one ordinary U-Net and text encoder, a static approximation of the ensemble. Each parameter block is the
average of the experts' blocks, weighted by what the trained router gave each expert there on held-out pairs. Its loss
against the ensemble is measured, printed and kept in its metadata.
--bake: one expert with its LoRAs baked in.
The last two get the base's VAE, tokenizer and schedule. OUT becomes a single file if it ends in .safetensors, a
diffusers folder otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT, SEED, add_dtype_argument, license_name
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Export the ensemble as the options say."""
    parser = Parser(prog="python -m afa_jax.export", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id (for --pair and --snapshot)")
    parser.add_argument("--pair", type=Path, metavar="OUT", help="folder of the trained pair, with its model card")
    parser.add_argument(
        "--license", type=license_name, metavar="NAME", help="of the pair, as the hub spells it, such as mit"
    )
    parser.add_argument("--report", type=Path, help="report.json of a comparison of this run, for the card's figures")
    parser.add_argument(
        "--picture", type=Path, action="append", default=[], metavar="PNG", help="for the card, instead of samples/"
    )
    parser.add_argument("--with_config", action="store_true", help="also write config.py, to sample the pair with")
    parser.add_argument("--snapshot", type=Path, metavar="OUT", help="one static model")
    parser.add_argument("--bake", nargs=2, metavar=("NAME", "OUT"), help="one expert of the config")
    parser.add_argument("--pairs", type=COUNT, default=64, help="held-out: half for the weights, half for the loss")
    parser.add_argument("--draws", type=COUNT, default=4, help="timesteps and noises for each pair")
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_dtype_argument(parser)
    options, config = parse(parser, arguments)
    Ensemble(config, workdir=options.workdir).export(
        pair=options.pair,
        snapshot=options.snapshot,
        bake=options.bake,
        license=options.license,
        report=options.report,
        pictures=options.picture,
        with_config=options.with_config,
        pairs=options.pairs,
        draws=options.draws,
        seed=options.seed,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
