"""Abstract networks of a config: shapes in place of arrays."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import UNetConfig, VAEConfig
from afa_jax.models.layers import shapes_only
from afa_jax.models.unet import ConvOut, UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.expected import NetworkConfig
from afa_jax.weights.keys import Key, pytorch_name, text_key, unet_key


def unet_keys(unet: UNet) -> Key:
    """Return the key function of this U-Net."""
    last = unet.stages[-1]
    assert isinstance(last, ConvOut)
    return unet_key([stage.name for stage in unet.stages], last.layer.name)


def abstract_network(config: NetworkConfig, dtype: DTypeLike = jnp.float32) -> tuple[Any, Key]:
    """Return a network of this architecture with shapes in place of arrays, and its key function."""
    return _abstract_network(config, cast(Hashable, dtype))


@functools.lru_cache(maxsize=16)
def _abstract_network(config: NetworkConfig, dtype: Any) -> tuple[Any, Key]:
    with shapes_only():
        if isinstance(config, UNetConfig):
            unet = UNet(config, rngs=nnx.Rngs(0), dtype=dtype)
            return unet, unet_keys(unet)
        if isinstance(config, VAEConfig):
            return VAE(config, rngs=nnx.Rngs(0), dtype=dtype), pytorch_name
        return TextEncoder(config, rngs=nnx.Rngs(0), dtype=dtype), text_key
