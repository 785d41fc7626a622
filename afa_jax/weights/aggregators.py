"""Trained aggregators as files: ``aggregators.safetensors`` and ``ensemble.json``, the pair to publish."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from afa_jax.files import replace_text
from afa_jax.fusion.sabw import Aggregators, SABWConfig
from afa_jax.models.unet import UNet
from afa_jax.weights.json_files import read_json
from afa_jax.weights.keys import pytorch_name
from afa_jax.weights.state_dicts import load_state_dict, state_dict
from afa_jax.weights.tensors import WeightsError, check_finite, open_tensors, read_tensors, write_tensors

WEIGHTS, RECORD = "aggregators.safetensors", "ensemble.json"


def aggregator_key(path: str) -> str:
    """``sites.<i>.conv_in.kernel`` -> ``aggregators.<i>.conv_in.weight``."""
    return "aggregators." + pytorch_name(path).removeprefix("sites.")


def save_aggregators(folder: Path, aggregators: Aggregators, record: Mapping[str, Any]) -> None:
    """Write both files into a folder; ``record`` (experts with hashes, schedule, training) goes into ensemble.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, state_dict(aggregators, aggregator_key), {"format": "pt"})
    own = dict(format=1, sabw=dataclasses.asdict(aggregators.config), aggregators_sha256=aggregators_hash(folder))
    text = json.dumps(own | dict(record), indent=2) + "\n"
    replace_text(folder / RECORD, text)


def aggregators_hash(folder: Path) -> str:
    """sha256 of a folder's aggregators."""
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """``ensemble.json`` of a folder.

    Raises:
        WeightsError: missing or not JSON.
    """
    if not (folder / RECORD).is_file():
        raise WeightsError(f"{folder}: no {RECORD} there; train aggregators into it first (afa_jax.train --workdir)")
    return read_json(folder / RECORD)


def load_aggregators(folder: Path, unet: UNet, experts: int) -> Aggregators:
    """The aggregators of a folder, for a stack of ``experts`` U-Nets, float32.

    Raises:
        WeightsError: a file is missing or damaged, or the keys or shapes do not fit these experts.
    """
    record = read_record(folder)
    config = SABWConfig(**record["sabw"])
    path = folder / WEIGHTS
    aggregators = load_state_dict(
        lambda: Aggregators(config, experts, list(unet.stages), unet.config, rngs=nnx.Rngs(0)),
        read_tensors(path),
        lambda module: aggregator_key,
        what=str(path),
        param_dtype=jnp.float32,
    )
    check_aggregators(folder)
    return aggregators


def check_aggregators(folder: Path) -> None:
    """Raise WeightsError unless a folder's two files can be read and belong together."""
    record, path = read_record(folder), folder / WEIGHTS
    for name, tensor in open_tensors(path).tensors.items():
        check_finite(tensor.read(), name, str(path))
    if record.get("aggregators_sha256") not in (None, aggregators_hash(folder)):
        raise WeightsError(f"{path} is not the file that {RECORD} beside it describes; resume the run to write both")
