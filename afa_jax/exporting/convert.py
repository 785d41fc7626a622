"""Conversion of one checkpoint to another container, with other parts, LoRAs or another dtype."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.experts.sources import Source, bake
from afa_jax.experts.specs import parse_lora
from afa_jax.exporting.written import check_out, identity, is_single, write
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint
from afa_jax.weights.formats.hub import fetch_model
from afa_jax.weights.formats.single_file import SingleFileCheckpoint
from afa_jax.weights.merging.combine import COMPONENTS, check_parts, compose
from afa_jax.weights.opened import check_networks, open_checkpoint


def convert(options: argparse.Namespace) -> None:
    """Write the input as the options of ``afa_jax.convert`` say.

    Raises:
        InputError: an input cannot be read, or the output not be written.
    """
    check_out(options.out, options.overwrite)
    for name in ("lora", "vae", "base"):
        for text in options.lora if name == "lora" else [getattr(options, name)]:
            other = Path(parse_lora(text)[0] if name == "lora" else text or "")
            if options.out.exists() and other.exists() and options.out.samefile(other):
                raise InputError(f"--out {options.out} would replace the file of --{name}; choose another name")
    name = options.inputs[0]
    checkpoint = open_input(name, options)
    check_networks(checkpoint)
    if not set(NETWORKS) & set(checkpoint.components):
        raise InputError(f"{name}: it has no U-Net, VAE or text encoder; give a model, {', '.join(NETWORKS)} or all")
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
            whole = Path(name).parent
            one = f", which is a part of {whole}," if (whole / "model_index.json").is_file() else ""
            print(f"{part}: {name}{one} has none; --base INPUT takes it from another checkpoint")
        else:
            taken[part] = options.base
    others = {}
    for part, other in taken.items():
        opened = open_checkpoint(fetch_model(other, [part]))
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
    # The baked LoRAs are listed in the metadata afa_jax.loras.
    baked = bake(composed, [parse_lora(text) for text in options.lora], options.dtype)
    write(options.out, baked, recipe | dict(dtype=options.dtype or "as stored"), overwrite=options.overwrite)


def open_input(name: str, options: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint that an argument names, on the hub or here."""
    fields = ("revision", "variant", "prediction_type", "ema")
    return Source(path=name, **{field: getattr(options, field) for field in fields}).open(COMPONENTS)
