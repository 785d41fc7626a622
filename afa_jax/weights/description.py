"""Descriptions of checkpoints as plain values: container, architecture, components, hashes, metadata."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.models.configs import UNetConfig, task_of
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, prediction_type
from afa_jax.weights.formats.families import family_of
from afa_jax.weights.formats.folders import FolderCheckpoint
from afa_jax.weights.formats.single_file import SingleFileCheckpoint, UnknownPrediction
from afa_jax.weights.opened import check_networks, unet_config
from afa_jax.weights.tensors import Tensors, WeightsError, file_sha256, open_tensors

_PUBLISHED: dict[tuple[int, ...], str] = {
    (320, 640, 1280, 1280, 768): "Stable Diffusion 1.x",
    (320, 640, 1280, 1280, 1024): "Stable Diffusion 2.x",
}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all that ``--inspect`` says of a usable checkpoint, as JSON values, reading every tensor once.

    Raises:
        WeightsError, ConfigError: as check_networks; or the checkpoint has no network.
    """
    check_networks(checkpoint)
    if not set(NETWORKS) & set(checkpoint.components):
        raise WeightsError(f"{checkpoint.path}: no network there; give a diffusers folder or a single file")
    result: dict[str, Any] = dict(container=container(checkpoint), problem=None)
    if "unet" in checkpoint.components:
        unet = unet_config(checkpoint)
        result |= dict(family=family(unet), unet=architecture(unet))
    if "scheduler" in checkpoint.components:
        with contextlib.suppress(UnknownPrediction):
            result["prediction_type"] = prediction_type(checkpoint)
    networks = [name for name in checkpoint.components if name in NETWORKS]
    result["components"] = {
        name: component(checkpoint.tensors(name)) | dict(sha256=checkpoint.sha256(name)) for name in networks
    }
    result["others"] = [name for name in checkpoint.components if name not in NETWORKS]
    if checkpoint.path.is_file():
        stored = open_tensors(checkpoint.path).tensors
        result |= dict(sha256=file_sha256(checkpoint.path), stored=component(stored))
    if isinstance(checkpoint, SingleFileCheckpoint):
        result |= dict(unused=checkpoint.unused, ema=checkpoint.has_ema)
    result["metadata"] = dict(checkpoint.metadata)
    result["nonfinite"] = [key for name in networks for key in nonfinite(checkpoint.tensors(name))]
    return result


def describe_file(path: Path, problem: InputError) -> dict[str, Any]:
    """Describe a safetensors file that is no usable checkpoint; ``problem`` says why it is none.

    Raises:
        WeightsError: not a safetensors file.
    """
    file = open_tensors(path)
    return dict(
        container="single file",
        problem=str(problem),
        family=family_of({key: tensor.shape for key, tensor in file.tensors.items()}).name,
        components={},
        others=[],
        stored=component(file.tensors),
        sha256=file_sha256(path),
        metadata=dict(file.metadata),
        nonfinite=list(nonfinite(file.tensors)),
    )


def container(checkpoint: Checkpoint) -> str:
    """Return how a checkpoint is stored."""
    if not isinstance(checkpoint, FolderCheckpoint):
        return "single file" if checkpoint.path.is_file() else "folder"
    files = [checkpoint.what(name) for name in checkpoint.components if name in NETWORKS]
    return "Flax folder" if any(file.endswith(".msgpack") for file in files) else "diffusers folder"


def family(unet: UNetConfig) -> str:
    """Return the published family with a U-Net of these widths."""
    own = _PUBLISHED.get((*unet.block_out_channels, unet.cross_attention_dim), "Stable Diffusion 1.x/2.x, another size")
    return own if unet.in_channels == unet.out_channels else f"{own}, {task_of(unet.in_channels, unet.out_channels)}"


def architecture(unet: UNetConfig) -> dict[str, Any]:
    """Return the fields that tell U-Nets of one family apart."""
    return dict(
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        block_out_channels=list(unet.block_out_channels),
        cross_attention_dim=unet.cross_attention_dim,
        heads=list(unet.heads),
    )


def component(tensors: Tensors) -> dict[str, Any]:
    """Return the number of tensors, their bytes, and how many there are of each dtype."""
    return dict(
        tensors=len(tensors),
        bytes=sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in tensors.values()),
        dtypes=dict(Counter(str(np.dtype(tensor.dtype)) for tensor in tensors.values()).most_common()),
    )


def nonfinite(tensors: Tensors) -> Iterator[str]:
    """Yield the names of the tensors with NaN or infinity, reading one tensor at a time."""
    for name, tensor in tensors.items():
        array = tensor.read()
        if array.dtype.kind not in "iub" and not np.isfinite(array).all():
            yield name
