"""Checkpoints to modules: the one way in for every container."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.trees import flatten
from afa_jax.weights.checkpoint import (
    NETWORKS,
    Checkpoint,
    abstract_network,
    expected_shapes,
    network_config,
)
from afa_jax.weights.formats.folders import FolderCheckpoint
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.formats.single_file import SingleFileCheckpoint
from afa_jax.weights.formats.wrong_places import explain
from afa_jax.weights.state_dicts import check_tensors, load_stack, load_state_dict
from afa_jax.weights.tensors import Tensor, Tensors, WeightsError

Source = Checkpoint | Path | str
LeafSharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Where the leaf of a dotted path and a shape goes."""


def open_checkpoint(
    source: Source, *, variant: str | None = None, prediction_type: str | None = None, ema: bool = False
) -> Checkpoint:
    """The checkpoint at a local path, whatever its container; one that is open as it is.

    Args:
        variant: of a folder's weights, such as ``fp16``.
        prediction_type: of a single file that does not say it, ``epsilon`` or ``v_prediction``.
        ema: take the moving average of the U-Net that a single file carries.

    Raises:
        WeightsError: there is nothing there, or nothing that can be read.
    """
    if not isinstance(source, Path | str):
        return source
    path = Path(source)
    if path.is_dir():
        if prediction_type is not None or ema:
            raise WeightsError(
                f"{path}: prediction_type and ema are for single files; a folder's configs say what it is"
            )
        checkpoint = FolderCheckpoint(path, variant)
        if not checkpoint.components:
            raise WeightsError(f"{path} {explain(path)}")
        return checkpoint
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.suffix.lower() not in (".safetensors", *PICKLES):  # which are refused with what to do
        raise WeightsError(f"{path}: not a .safetensors file or a diffusers folder; convert it to one of these")
    if variant is not None:
        raise WeightsError(f"{path}: variant={variant!r} is for folders; name the file itself")
    return SingleFileCheckpoint(path, prediction_type, ema)


def unet_config(checkpoint: Source) -> UNetConfig:
    """The architecture of a checkpoint's U-Net; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return UNetConfig.from_json(checkpoint.config("unet"), checkpoint.what("unet", config=True))


def vae_config(checkpoint: Source) -> VAEConfig:
    """The architecture of a checkpoint's autoencoder; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return VAEConfig.from_json(checkpoint.config("vae"), checkpoint.what("vae", config=True))


def text_config(checkpoint: Source) -> TextConfig:
    """The architecture of a checkpoint's text encoder; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return TextConfig.from_json(checkpoint.config("text_encoder"), checkpoint.what("text_encoder", config=True))


def noise_schedule(checkpoint: Source) -> NoiseSchedule:
    """The noise schedule of a checkpoint.

    Raises:
        WeightsError: it has none, or one that is no JSON.
        ScheduleError: one that cannot be followed.
    """
    checkpoint = open_checkpoint(checkpoint)
    return NoiseSchedule.from_json(checkpoint.config("scheduler"), checkpoint.what("scheduler", config=True))


def load_unet(checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> UNet:
    """The U-Net of a checkpoint.

    Args:
        dtype: compute dtype.
        param_dtype: dtype of the parameters in memory, whatever the file's.

    Raises:
        WeightsError: a file is missing, truncated, or has missing, surplus, misshapen or non-finite tensors.
        ConfigError: an architecture that is not of the Stable Diffusion 1.x/2.x families.
    """
    checkpoint = open_checkpoint(checkpoint)
    config = unet_config(checkpoint)
    unet, key = abstract_network(config, dtype)
    return load_state_dict(
        unet,
        checkpoint.tensors("unet"),
        key,
        what=checkpoint.what("unet"),
        param_dtype=param_dtype,
    )


def load_unets(
    checkpoints: Sequence[Checkpoint],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: LeafSharding | None = None,
) -> UNet:
    """The U-Nets of N checkpoints of the first one's architecture, as a stack; as load_unet and load_stack."""
    config = unet_config(checkpoints[0])
    unet, key = abstract_network(config, dtype)
    return load_stack(
        unet,
        [(checkpoint.what("unet"), checkpoint.tensors("unet")) for checkpoint in checkpoints],
        key,
        param_dtype=param_dtype,
        sharding=sharding,
    )


def load_text_encoders(
    checkpoints: Sequence[Checkpoint],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: LeafSharding | None = None,
) -> TextEncoder:
    """The text encoders of N checkpoints of the first one's architecture, as a stack; as load_unets.

    One may have fewer layers than another (clip skip): it gets layers of zeros, which change nothing, for each adds
    what it computes to its input.
    """
    layers = [text_config(checkpoint).num_hidden_layers for checkpoint in checkpoints]
    config = dataclasses.replace(text_config(checkpoints[0]), num_hidden_layers=max(layers))
    text_encoder, key = abstract_network(config, dtype)
    return load_stack(
        text_encoder,
        [
            (checkpoint.what("text_encoder"), _with_layers(checkpoint.tensors("text_encoder"), own, config))
            for checkpoint, own in zip(checkpoints, layers, strict=True)
        ],
        key,
        param_dtype=param_dtype,
        sharding=sharding,
    )


def _with_layers(tensors: Tensors, layers: int, config: TextConfig) -> Tensors:
    """A text encoder's tensors with layers of zeros from ``layers`` on, so that it has the config's number."""
    if layers == config.num_hidden_layers:
        return tensors
    added = {f".layers.{number}." for number in range(layers, config.num_hidden_layers)}
    shapes = {key: shape for key, shape in expected_shapes(config).items() if any(layer in key for layer in added)}
    return {**tensors, **{key: _zeros(shape) for key, shape in shapes.items()}}


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def load_vae(checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> VAE:
    """The autoencoder of a checkpoint; arguments and errors as load_unet's.

    In place of float16 it is float32 where the config's ``force_upcast`` says that it overflows that.
    """
    checkpoint = open_checkpoint(checkpoint)
    config = vae_config(checkpoint)
    if jnp.dtype(dtype) == jnp.float16 and checkpoint.config("vae").get("force_upcast") is True:
        dtype = param_dtype = jnp.float32
    vae, key = abstract_network(config, dtype)
    return load_state_dict(
        vae,
        checkpoint.tensors("vae"),
        key,
        what=checkpoint.what("vae"),
        param_dtype=param_dtype,
    )


def load_text_encoder(
    checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> TextEncoder:
    """The text encoder of a checkpoint; arguments and errors as load_unet's."""
    checkpoint = open_checkpoint(checkpoint)
    config = text_config(checkpoint)
    text_encoder, key = abstract_network(config, dtype)
    return load_state_dict(
        text_encoder,
        checkpoint.tensors("text_encoder"),
        key,
        what=checkpoint.what("text_encoder"),
        param_dtype=param_dtype,
    )


def check_networks(checkpoint: Source) -> None:
    """Compare every network's tensors to its architecture, as loading would, without reading a tensor.

    Raises:
        WeightsError, ConfigError: as load_unet.
    """
    checkpoint = open_checkpoint(checkpoint)
    for component in checkpoint.components:
        if component in NETWORKS:
            check_network(checkpoint, component)


def check_network(checkpoint: Source, component: str) -> None:
    """Compare one network's tensors to its architecture; raises as check_networks."""
    checkpoint = open_checkpoint(checkpoint)
    tensors = checkpoint.tensors(component)  # first: what is wrong with a file goes before its architecture
    check_tensors(expected_shapes(network_config(checkpoint, component)), tensors, what=checkpoint.what(component))


def unet_blocks(checkpoint: Source) -> dict[str, str]:
    """By the key of each tensor of a U-Net the name of its stage, or ``time_embedding``; in the stages' order."""
    unet, key = abstract_network(unet_config(checkpoint))
    blocks = {}
    for path in flatten(unet):
        head, *rest = path.split(".")
        blocks[key(path)] = unet.stages[int(rest[0])].name if head == "stages" else head
    return blocks
