"""Inspection of checkpoints: what each is, which expert it resembles, and how far they are apart."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from itertools import combinations
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import afa_jax
from afa_jax.errors import InputError
from afa_jax.experts.sources import find_checkpoints
from afa_jax.exporting.convert import open_input
from afa_jax.files import check_file, replace_text
from afa_jax.report.checkpoints import WIDTH, duplicates, log_description, log_pairs, resemblance
from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.compare import EXPERT_COMPONENTS, comparison, expert_blocks
from afa_jax.weights.description import describe, describe_file
from afa_jax.weights.tensors import PICKLES


def inspect(options: argparse.Namespace, config: ConfigDict | None = None) -> int:
    """Describe the inputs, find the expert that each resembles, and compare them; 2 if one cannot be read."""
    if options.json:
        check_file(options.json, options.overwrite)
    experts = {}
    if config is not None:
        base, own = find_checkpoints(config.base, config.experts)
        if {*EXPERT_COMPONENTS} <= {*base.components}:
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
            blocks[name] = expert_blocks(
                checkpoint, [part for part in EXPERT_COMPONENTS if part in checkpoint.components]
            )
            if config is not None:
                found[name]["resembles"] = resemblance(
                    {expert: comparison(blocks[name], other) for expert, other in experts.items()}
                )
        log_description(name, found[name])
        print()
    all_pairs = {(one, other): comparison(blocks[one], blocks[other]) for one, other in combinations(blocks, 2)}
    pairs = {pair: difference for pair, difference in all_pairs.items() if difference is not None}
    apart = [pair for pair, difference in all_pairs.items() if difference is None]
    lines = duplicates(pairs, found)
    lines += [f"not compared: {one} and {other} have different architectures" for one, other in apart]
    if pairs:
        log_pairs(pairs, {name: number for number, name in enumerate(blocks, 1)})
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
    """Return the description of an input, and its checkpoint if it can be used as one."""
    try:
        checkpoint = open_input(name, options)
        return describe(checkpoint), checkpoint
    except InputError as error:
        if not Path(name).is_file() or Path(name).suffix in PICKLES:
            raise
        return describe_file(Path(name), error), None
