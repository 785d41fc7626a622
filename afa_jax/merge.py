"""Merge experts into one ordinary checkpoint: ``python -m afa_jax.merge --config CONFIG --method METHOD --out OUT``.

METHOD is a kind and its options: ``average,weights.photo=0.3,weights.anime=0.7``, ``mbw,preset=GRAD_V,of=anime``,
``ties,density=0.3``, ``slerp,a=photo,b=anime,t=0.4``; afa_jax/weights/merging/rules.py has all of them. The U-Nets are
merged. So are the text encoders, unless text_encoder=base or text_encoder=NAME takes one unchanged.
``learned_mbw,workdir=RUN`` is the merge mbw with the block weights that ``afa_jax.train`` wrote into RUN.
``distilled,workdir=RUN,guidance=4`` is the model of ``afa_jax.distil`` with this guidance scale baked in, or with the
styles of ``style.NAME=WEIGHT``. VAE, tokenizer and schedule are the base's. OUT becomes a single file if it ends in
.safetensors, a diffusers folder otherwise. Its metadata has the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import add_dtype_argument
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.pipeline import MERGE_KINDS, Ensemble


def main(arguments: Sequence[str]) -> None:
    """Merge the experts as the options say."""
    parser = Parser(prog="python -m afa_jax.merge", description=__doc__)
    parser.add_argument(
        "--method", required=True, metavar="KIND[,OPTION=VALUE]...", help=f"kinds: {', '.join(MERGE_KINDS)}"
    )
    parser.add_argument("--out", type=Path, required=True, help="NAME.safetensors for a single file, else a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    add_dtype_argument(parser)
    options, config = parse(parser, arguments)
    merged = Ensemble(config).merge(options.method, dtype=options.dtype)
    merged.save(options.out, overwrite=options.overwrite, quiet=False)


if __name__ == "__main__":
    raise SystemExit(run(main))
