"""Loading of checkpoints, from any container, into modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.expected import NetworkConfig, expected_shapes
from afa_jax.weights.networks import abstract_network
from afa_jax.weights.opened import Source, open_checkpoint, text_config, unet_config, vae_config
from afa_jax.weights.state_dicts import load_stack, load_state_dict
from afa_jax.weights.tensors import Tensor, Tensors

LeafSharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""A function from an array's dotted path and shape to its sharding."""


def load_unet(checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> UNet:
    """Load the U-Net of a checkpoint.

    Args:
        dtype: compute dtype.
        param_dtype: dtype of the parameters in memory, whatever the file's.

    Raises:
        WeightsError: a file is missing, truncated, or has missing, surplus, misshapen or non-finite tensors.
        ConfigError: an architecture that is not of the Stable Diffusion 1.x/2.x families.
    """
    checkpoint = open_checkpoint(checkpoint)
    return _load(checkpoint, "unet", unet_config(checkpoint), dtype, param_dtype)


def load_unets(
    checkpoints: Sequence[Checkpoint],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    sharding: LeafSharding | None = None,
) -> UNet:
    """Load the U-Nets of N checkpoints of one architecture as a stack; as load_unet and load_stack."""
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
    """Load the text encoders of N checkpoints of one architecture as a stack; as load_unets.

    One may have fewer layers than another (clip skip). It then gets layers of zeros, which change nothing, as a layer
    adds its output to its input.
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
    """Add layers of zeros from ``layers`` on to a text encoder's tensors, up to the config's number."""
    if layers == config.num_hidden_layers:
        return tensors
    added = {f".layers.{number}." for number in range(layers, config.num_hidden_layers)}
    shapes = {key: shape for key, shape in expected_shapes(config).items() if any(layer in key for layer in added)}
    return {**tensors, **{key: _zeros(shape) for key, shape in shapes.items()}}


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def load_vae(checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> VAE:
    """Load the autoencoder of a checkpoint; arguments and errors as load_unet's.

    Where the config's ``force_upcast`` says that float16 overflows, float32 is used instead of float16.
    """
    checkpoint = open_checkpoint(checkpoint)
    config = vae_config(checkpoint)
    if jnp.dtype(dtype) == jnp.float16 and checkpoint.config("vae").get("force_upcast") is True:
        dtype = param_dtype = jnp.float32
    return _load(checkpoint, "vae", config, dtype, param_dtype)


def load_text_encoder(
    checkpoint: Source, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> TextEncoder:
    """Load the text encoder of a checkpoint; arguments and errors as load_unet's."""
    checkpoint = open_checkpoint(checkpoint)
    return _load(checkpoint, "text_encoder", text_config(checkpoint), dtype, param_dtype)


def _load(checkpoint: Checkpoint, part: str, config: NetworkConfig, dtype: DTypeLike, param_dtype: DTypeLike) -> Any:
    network, key = abstract_network(config, dtype)
    what = checkpoint.what(part)
    return load_state_dict(network, checkpoint.tensors(part), key, what=what, param_dtype=param_dtype)
