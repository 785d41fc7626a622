"""Trained fusions as files: ``aggregators.safetensors`` and ``ensemble.json``, the pair to publish."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from afa_jax.errors import InputError
from afa_jax.files import replace_text
from afa_jax.fusion.afa import Aggregators
from afa_jax.fusion.pair_record import FORMAT, RECORD, WEIGHTS, aggregators_hash, read_record
from afa_jax.fusion.registry import fusion_config, init_fusion, kind_of
from afa_jax.fusion.rivals.block_weights import BlockWeights
from afa_jax.models.unet import UNet
from afa_jax.records import record_text
from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.keys import Key, pytorch_name
from afa_jax.weights.networks import abstract_network
from afa_jax.weights.opened import unet_config
from afa_jax.weights.state_dicts import load_state_dict, state_dict
from afa_jax.weights.tensors import WeightsError, check_finite, open_tensors, read_tensors, write_tensors


def aggregator_key(path: str) -> str:
    """Rename ``sites.<i>.conv_in.kernel`` to ``aggregators.<i>.conv_in.weight``."""
    return "aggregators." + pytorch_name(path).removeprefix("sites.")


def fusion_key(kind: str) -> Key:
    """Return a fusion's key function: ``aggregator_key`` for AFA; for other kinds keys begin with the kind's name."""
    if kind == "afa":
        return aggregator_key
    # Block weights are one table, not a layer that PyTorch would have a name for.
    return lambda path: f"{kind}.{path if path == 'logits' else pytorch_name(path)}"


def save_fusion(folder: Path, fusion: Any, record: Mapping[str, Any]) -> None:
    """Write both files into a folder; ``record`` (experts with hashes, schedule, training) goes into ensemble.json.

    Raises:
        InputError: as record_text, which can be asked for before the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind, options = kind_of(fusion.config), dataclasses.asdict(fusion.config)
    write_tensors(folder / WEIGHTS, state_dict(fusion, fusion_key(kind)), {"format": "pt"})
    own: dict[str, Any] = dict(format=FORMAT, fusion=dict(kind=kind), aggregators_sha256=aggregators_hash(folder))
    own |= dict(sabw=options) if kind == "afa" else dict(fusion=dict(kind=kind, **options))
    replace_text(folder / RECORD, record_text(own | dict(record), RECORD))


def recorded_fusion(folder: Path) -> Any:
    """Return the configuration of a folder's fusion.

    Raises:
        WeightsError: ensemble.json is missing, or has a kind or option that this project does not know.
    """
    record = read_record(folder)
    options = dict(record.get("fusion") or dict(kind="afa"))  # the oldest pairs give no kind: they are AFA's
    kind = str(options.pop("kind", None))
    try:
        return fusion_config(kind, dict(record.get("sabw") or {}) if kind == "afa" else options)
    except InputError as error:
        raise WeightsError(f"{folder / RECORD}: {error}") from None


def load_fusion(folder: Path, unet: UNet, experts: int) -> Any:
    """Load the trained fusion of a folder, of any kind, for a stack of ``experts`` U-Nets, float32.

    Raises:
        WeightsError: a file is missing or damaged, or the keys or shapes do not fit these experts.
    """
    config = recorded_fusion(folder)
    path = folder / WEIGHTS
    fusion = load_state_dict(
        jax.eval_shape(lambda: init_fusion(config, unet, experts, 0)),
        read_tensors(path),
        fusion_key(kind_of(config)),
        what=str(path),
        param_dtype=jnp.float32,
    )
    check_aggregators(folder)
    return fusion


def load_aggregators(folder: Path, unet: UNet, experts: int) -> Aggregators:
    """Load AFA's aggregators from a folder, as load_fusion.

    Raises:
        WeightsError: as load_fusion, or the folder's fusion is of another kind.
    """
    if (kind := kind_of(recorded_fusion(folder))) != "afa":
        raise WeightsError(f"{folder}: a trained {kind}, not AFA's aggregators; choose a run with fusion.kind=afa")
    aggregators = load_fusion(folder, unet, experts)
    assert isinstance(aggregators, Aggregators)
    return aggregators


def load_block_weights(folder: Path, checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, float]]:
    """Load the trained block weights of a folder, as the merge ``mbw`` takes them.

    Raises:
        WeightsError: as load_fusion, or the folder's fusion is of another kind.
    """
    if (kind := kind_of(recorded_fusion(folder))) != "mbw":
        raise WeightsError(f"{folder}: a trained {kind}, no block weights; choose a run with fusion.kind=mbw")
    unet = abstract_network(unet_config(next(iter(checkpoints.values()))))[0]
    fusion = load_fusion(folder, unet, len(checkpoints))
    assert isinstance(fusion, BlockWeights)
    return fusion.by_block([stage.name for stage in unet.stages], [*checkpoints])


def check_aggregators(folder: Path) -> None:
    """Raise WeightsError unless a folder's two files can be read and belong together."""
    record, path = read_record(folder), folder / WEIGHTS
    for name, tensor in open_tensors(path).tensors.items():
        check_finite(tensor.read(), name, str(path))
    if record.get("aggregators_sha256") not in (None, aggregators_hash(folder)):
        raise WeightsError(f"{path} is not the file that {RECORD} beside it describes; resume the run to write both")
