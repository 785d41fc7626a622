"""Any checkpoint in, any out: ``python -m afa_jax.convert INPUT --out OUT``; or look: ``... --inspect INPUT...``.

An INPUT is a diffusers folder (PyTorch's or Flax's), the id of one on the hub, or a single file. OUT becomes a single
file if it ends in .safetensors, a diffusers folder otherwise. Metadata is kept and extended with the recipe
(``afa_jax.recipe``). With --inspect nothing is written but --json: what each INPUT is, and how far they are apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import afa_jax
from afa_jax.commands import Parser, load_config, run
from afa_jax.diffusion.schedule import PREDICTIONS
from afa_jax.errors import InputError
from afa_jax.experts import find_checkpoints
from afa_jax.files import check_new, replace_text
from afa_jax.ingredients import DTYPES, Source, bake, parse_lora
from afa_jax.report.checkpoints import WIDTH, duplicates, print_components, print_description, print_pairs, resemblance
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint
from afa_jax.weights.combine import COMPONENTS, check_parts, compose
from afa_jax.weights.compare import EXPERT, comparison, expert_blocks
from afa_jax.weights.describe import component, container, describe, describe_file, file_sha256
from afa_jax.weights.folders import check_target, write_folder
from afa_jax.weights.hub import fetch
from afa_jax.weights.load import check_networks, open_checkpoint
from afa_jax.weights.single_file import SingleFileCheckpoint, write_single_file
from afa_jax.weights.tensors import PICKLES

RECIPE = "afa_jax.recipe"  # in the metadata of what is written: how it was made, JSON


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
        return inspect(options)
    if options.out is None:
        raise InputError("--out is missing: name what to write, or give --inspect")
    if len(options.inputs) > 1:
        raise InputError(f"{len(options.inputs)} inputs for one --out; convert them one by one")
    for name in ("json", "config"):
        if getattr(options, name):
            raise InputError(f"--{name} goes with --inspect")
    check_out(options.out, options.overwrite)
    for name in ("lora", "vae", "base"):
        for text in options.lora if name == "lora" else [getattr(options, name)]:
            other = Path(parse_lora(text)[0] if name == "lora" else text or "")
            if options.out.exists() and other.exists() and options.out.samefile(other):
                raise InputError(f"--out {options.out} would replace the file of --{name}; choose another name")
    convert(options)
    return 0


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """The option that says how weights are stored."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as they are stored)")


def convert(options: argparse.Namespace) -> None:
    """Write the input as the options say."""
    name = options.inputs[0]
    checkpoint = open_input(name, options)
    check_networks(checkpoint)
    if isinstance(checkpoint, SingleFileCheckpoint) and checkpoint.unused:
        print(f"left out: {checkpoint.unused} tensors (unused weights, moving averages, training state)")
    recipe: dict[str, Any] = dict(input=identity(name, checkpoint))
    taken = {} if options.vae is None else {"vae": options.vae}
    for part in COMPONENTS:
        if part in taken or part in checkpoint.components:
            continue
        if is_single(options.out) and part == "tokenizer":
            continue  # a single file has no place for it
        if options.base is None:
            print(f"{part}: {name} has none; --base INPUT takes it from another checkpoint")
        else:
            taken[part] = options.base
    others = {}
    for part, other in taken.items():
        opened = open_checkpoint(fetch(other, [part]))
        if part not in opened.components:
            if part in NETWORKS:
                raise InputError(f"{other}: it has no {part} to take")
            print(f"{part}: neither {name} nor {other} has one")
            continue
        others[part] = opened
        print(f"{part}: taken from {other}")
        if part in NETWORKS:
            recipe.setdefault("taken", {})[part] = identity(other, opened, [part])
    composed = compose(checkpoint, **others)
    check_networks(composed)
    check_parts(composed)
    # What is baked in is listed in the metadata afa_jax.loras.
    baked = bake(composed, [parse_lora(text) for text in options.lora], options.dtype)
    write(options.out, baked, recipe | dict(dtype=options.dtype or "as stored"), overwrite=options.overwrite)


def open_input(name: str, options: argparse.Namespace) -> Checkpoint:
    """The checkpoint that an argument names, on the hub or here."""
    fields = ("revision", "variant", "prediction_type", "ema")
    return Source(path=name, **{field: getattr(options, field) for field in fields}).open(COMPONENTS)


def identity(name: str, checkpoint: Checkpoint, components: Sequence[str] = NETWORKS) -> dict[str, Any]:
    """An input in a recipe: its name without its folder, sha256 of the file or of the networks, and its own recipe."""
    networks = {part: checkpoint.sha256(part) for part in components if part in checkpoint.components}
    own: dict[str, Any] = dict(name=name if not Path(name).exists() else Path(name).name, networks=networks)
    if checkpoint.path.is_file():
        own["sha256"] = file_sha256(checkpoint.path)
    return own


def is_single(out: Path) -> bool:
    """Whether an output's name asks for a single file."""
    return out.suffix.lower() == ".safetensors"


def check_out(out: Path, overwrite: bool) -> None:
    """Raise InputError for an output that is there, or whose name asks for a pickle."""
    if out.suffix.lower() in PICKLES:
        raise InputError(f"--out {out}: pickles are not written; end it in .safetensors, or name a folder")
    if is_single(out):
        check_new(out, overwrite)
        if out.is_dir():
            raise InputError(f"{out} is a folder; choose another name")
    else:
        check_target(out, overwrite)


def write(out: Path, checkpoint: Checkpoint, recipe: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a checkpoint with its recipe, and print what was written."""
    whole = dict(version=afa_jax.__version__, **recipe)
    if RECIPE in checkpoint.metadata:
        whole["before"] = parsed(checkpoint.metadata[RECIPE])
    metadata = {RECIPE: json.dumps(whole)}
    if is_single(out):
        write_single_file(out, checkpoint, metadata=metadata, overwrite=overwrite)
    else:
        write_folder(out, checkpoint, metadata=metadata, overwrite=overwrite)
    written = open_checkpoint(out)
    print(f"wrote {out}, a {container(written)}" + (f", sha256 {file_sha256(out)}" if is_single(out) else ""))
    networks = [part for part in written.components if part in NETWORKS]
    print_components({part: component(written.tensors(part)) | dict(sha256=written.sha256(part)) for part in networks})
    if rest := [part for part in written.components if part not in NETWORKS]:
        print(f"  {', '.join(rest)}")


def parsed(text: str) -> Any:
    """JSON from a file's metadata; as it is if it is not that."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def inspect(options: argparse.Namespace) -> int:
    """Describe the inputs, say which expert each resembles, and compare them; 2 if one cannot be read."""
    for name in ("out", "base", "vae", "dtype"):
        if getattr(options, name):
            raise InputError(f"--{name} does not go with --inspect, which writes no checkpoint")
    if options.lora:
        raise InputError("--lora does not go with --inspect, which looks at files as they are")
    if options.json:
        check_new(options.json, options.overwrite)
    experts = {}
    if options.config:
        base, own = find_checkpoints(load_config(options.config))
        if {*EXPERT} <= {*base.components}:
            own = {"base": base} | own
        experts = {name: expert_blocks(checkpoint) for name, checkpoint in own.items()}
    found: dict[str, dict[str, Any]] = {}
    blocks: dict[str, Any] = {}
    status = 0
    for name in dict.fromkeys(options.inputs):
        try:
            found[name], checkpoint = _described(name, options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        if checkpoint is not None and "unet" in checkpoint.components and not found[name]["nonfinite"]:
            blocks[name] = expert_blocks(checkpoint, [part for part in EXPERT if part in checkpoint.components])
            if options.config:
                found[name]["resembles"] = resemblance(
                    {expert: comparison(blocks[name], other) for expert, other in experts.items()}
                )
        print_description(name, found[name])
        print()
    all_pairs = {(one, other): comparison(blocks[one], blocks[other]) for one, other in combinations(blocks, 2)}
    pairs = {pair: difference for pair, difference in all_pairs.items() if difference is not None}
    apart = [pair for pair, difference in all_pairs.items() if difference is None]
    lines = duplicates(pairs, found)
    lines += [f"not compared: {one} and {other} have different architectures" for one, other in apart]
    if pairs:
        print_pairs(pairs, {name: number for number, name in enumerate(blocks, 1)})
        print()
    for line in lines:
        print(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    if options.json:
        table: list[dict[str, Any]] = [
            dict(inputs=pair, kind=own.kind, total=own.total, blocks=dict(own.blocks)) for pair, own in pairs.items()
        ]
        table += [dict(inputs=pair, kind=None) for pair in apart]
        whole = dict(version=afa_jax.__version__, inputs=found, pairs=table, duplicates=lines)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps(whole, indent=2) + "\n")
    return status


def _described(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], Checkpoint | None]:
    """What an input is, and the checkpoint if it can be used as one."""
    try:
        checkpoint = open_input(name, options)
        return describe(checkpoint), checkpoint
    except InputError as error:
        if not Path(name).is_file() or Path(name).suffix in PICKLES:
            raise
        return describe_file(Path(name), error), None


if __name__ == "__main__":
    raise SystemExit(run(main))
