"""The residual block and the resampling layers that the U-Net, the VAE and SABW share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from afa_jax.models.layers import Conv, GroupNorm, Linear


class ResnetBlock(nnx.Module):
    """GroupNorm SiLU conv, plus a projection of the time embedding, GroupNorm SiLU conv, residual.

    Args:
        time_width: width of the time embedding; None for a block without one (VAE).
        zero: start the second convolution at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int | None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        zero: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, param_dtype=param_dtype)
        self.conv1 = Conv(in_channels, out_channels, **kwargs)
        self.time_emb_proj = Linear(time_width, out_channels, **kwargs) if time_width else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, param_dtype=param_dtype)
        self.conv2 = Conv(out_channels, out_channels, zero=zero, **kwargs)
        self.conv_shortcut = Conv(in_channels, out_channels, 1, **kwargs) if in_channels != out_channels else None

    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            y = y + self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Stride-2 convolution. The U-Net pads (1, 1), the VAE's encoder (0, 1)."""

    def __init__(
        self,
        channels: int,
        *,
        padding: tuple[int, int] = (1, 1),
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.conv = Conv(channels, channels, stride=2, padding=padding, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution.

    Halving a feature of odd size rounds up. ``size`` restores the odd size by cropping the doubled feature. This equals
    diffusers' interpolation to that size.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.conv = Conv(channels, channels, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        if size is not None and size != doubled.shape[1:3]:
            doubled = doubled[:, : size[0], : size[1]]
        return self.conv(doubled)
