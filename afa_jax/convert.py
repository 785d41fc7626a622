"""Convert a checkpoint: ``python -m afa_jax.convert INPUT --out OUT``; or inspect some: ``... --inspect INPUT...``.

An INPUT is a diffusers folder (PyTorch's or Flax's), the id of one on the hub, or a single file. OUT becomes a single
file if it ends in .safetensors, a diffusers folder otherwise. Metadata is kept and extended with the recipe
(``afa_jax.recipe``). With --inspect the command prints what each INPUT is and how far they are apart. It then writes
nothing but the file of --json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import add_dtype_argument
from afa_jax.cli.commands import Parser, load_config, run
from afa_jax.errors import InputError
from afa_jax.experts.specs import parse_lora
from afa_jax.exporting.outputs import check_model
from afa_jax.files import FIGURES, check_file
from afa_jax.names import PREDICTIONS
from afa_jax.weights.formats.hub_ids import check_named


def main(arguments: Sequence[str]) -> int:
    """Convert one checkpoint, or describe several."""
    parser = Parser(prog="python -m afa_jax.convert", description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folder, hub id or .safetensors file")
    parser.add_argument("--out", type=Path, help="NAME.safetensors for a single file, else a diffusers folder")
    add_dtype_argument(parser)
    parser.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="bake it in (weight 1)")
    parser.add_argument("--base", metavar="INPUT", help="a checkpoint for the components that the input lacks")
    parser.add_argument("--vae", metavar="INPUT", help="a checkpoint whose VAE replaces the input's")
    parser.add_argument("--variant", help="of a folder's files, such as fp16")
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    parser.add_argument("--prediction_type", choices=PREDICTIONS, help="of a single file that does not say it")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a single file that has both")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--inspect", action="store_true", help="describe the inputs and compare them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --inspect: write all of it as JSON, too")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="with --inspect: which expert resembles each input?")
    options = parser.parse_args(list(arguments))
    if options.inspect:
        _check_inspect(options)
        config = load_config(options.config) if options.config else None
        if options.json:
            FIGURES.check_name(options.json)
            check_file(options.json, options.overwrite)

        from afa_jax.exporting.inspect import inspect

        return inspect(options, config)
    if options.out is None:
        raise InputError("--out is missing: name what to write, or give --inspect")
    if len(options.inputs) > 1:
        raise InputError(f"{len(options.inputs)} inputs for one --out; convert them one by one")
    for name in ("json", "config"):
        if getattr(options, name):
            raise InputError(f"--{name} goes with --inspect")
    check_model(options.out, options.overwrite)
    check_named(options.inputs[0], options.revision)
    for other in (options.base, options.vae, *(parse_lora(lora)[0] for lora in options.lora)):
        if other is not None:
            check_named(other)

    from afa_jax.exporting.convert import convert

    convert(options)
    return 0


def _check_inspect(options: argparse.Namespace) -> None:
    """Raise InputError for options that only apply to a written checkpoint."""
    for name in ("out", "base", "vae", "dtype"):
        if getattr(options, name):
            raise InputError(f"--{name} does not go with --inspect, which writes no checkpoint")
    if options.lora:
        raise InputError("--lora does not go with --inspect, which looks at files as they are")


if __name__ == "__main__":
    raise SystemExit(run(main))
