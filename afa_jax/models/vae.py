"""The autoencoder between pictures and latents (AutoencoderKL; Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from afa_jax.models.attention import attend
from afa_jax.models.configs import VAEConfig
from afa_jax.models.layers import Conv, GroupNorm, Linear
from afa_jax.models.resnet import Downsample, ResnetBlock, Upsample
from afa_jax.types import Images, Latents, Pixels

_EPS = 1e-6


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the pixels, with a residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.group_norm = GroupNorm(groups, channels, eps=_EPS, param_dtype=param_dtype)
        self.to_q = Linear(channels, channels, rngs=rngs, param_dtype=param_dtype)
        self.to_k = Linear(channels, channels, rngs=rngs, param_dtype=param_dtype)
        self.to_v = Linear(channels, channels, rngs=rngs, param_dtype=param_dtype)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs, param_dtype=param_dtype)])

    def __call__(self, x: Array) -> Array:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        y = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](y).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, **kwargs: Any):
        self.resnets = nnx.List(
            [ResnetBlock(channels, channels, None, groups=groups, eps=_EPS, **kwargs) for _ in range(2)]
        )
        self.attentions = nnx.List([AttentionBlock(channels, groups, **kwargs)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """The residual blocks of one resolution, then the way to the next."""

    def __init__(
        self, in_channels: int, channels: int, layers: int, groups: int, *, resample: str | None, **kwargs: Any
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock(channels if i else in_channels, channels, None, groups=groups, eps=_EPS, **kwargs)
                for i in range(layers)
            ]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Downsample(channels, padding=(0, 1), **kwargs)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample(channels, **kwargs)])
        self.resample = resample

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            x = self.downsamplers[0](x)
        elif self.resample == "up":
            x = self.upsamplers[0](x)
        return x


class Encoder(nnx.Module):
    """The network from pictures to the moments of their latents."""

    def __init__(self, config: VAEConfig, **kwargs: Any):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], **kwargs)
        self.down_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    resample="down" if i < len(widths) - 1 else None,
                    **kwargs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, **kwargs)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=_EPS, param_dtype=kwargs["param_dtype"])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kwargs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """The network from latents to pictures."""

    def __init__(self, config: VAEConfig, **kwargs: Any):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], **kwargs)
        self.mid_block = MidBlock(widths[0], groups, **kwargs)
        self.up_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    resample="up" if i < len(widths) - 1 else None,
                    **kwargs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=_EPS, param_dtype=kwargs["param_dtype"])
        self.conv_out = Conv(widths[-1], config.out_channels, **kwargs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Autoencoder with a diagonal Gaussian between encoder and decoder.

    ``encode`` returns and ``decode`` takes *scaled* latents (times ``scaling_factor``), the ones that are diffused.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        latent = config.latent_channels
        self.encoder = Encoder(config, **kwargs)
        self.decoder = Decoder(config, **kwargs)
        self.quant_conv = Conv(2 * latent, 2 * latent, 1, **kwargs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latent, latent, 1, **kwargs) if config.use_post_quant_conv else None

    def moments(self, images: Images) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Return mean and log variance of the unscaled latents of pictures in [-1, 1], float32.

        The latents have ``factor`` times fewer rows and columns than the pictures.

        Raises:
            InputError: rows or columns are not a multiple of the factor.
        """
        self.config.check_size(images.shape[1:3])
        x = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def posterior(self, images: Images) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Return mean and standard deviation of the unscaled latents: float32 values of the compute dtype's precision.

        Rounded on purpose, and by an operation that XLA must keep: they can be stored in the compute dtype without
        loss, so that a sample is the same whether or not they were.
        """
        mean, logvar = self.moments(images)
        precision = jnp.finfo(self.dtype)
        mean, std = (jax.lax.reduce_precision(x, precision.nexp, precision.nmant) for x in (mean, jnp.exp(logvar / 2)))
        return mean, std

    def sample(self, mean: Float[Array, "b h w c"], std: Float[Array, "b h w c"], key: Array) -> Latents:
        """Draw scaled latents from a posterior, float32.

        Args:
            key: one for all, or ``[b]``, one for each picture: its sample then does not depend on its batch.
        """
        if key.ndim:
            noise = jax.vmap(lambda one: jax.random.normal(one, mean.shape[1:], jnp.float32))(key)
        else:
            noise = jax.random.normal(key, mean.shape, jnp.float32)
        return (mean.astype(jnp.float32) + std.astype(jnp.float32) * noise) * self.config.scaling_factor

    def encode(self, images: Images, key: Array | None = None) -> Latents:
        """Encode pictures to scaled latents: a sample with ``key`` (one, or one for each picture), else the mean."""
        mean, std = self.posterior(images)
        return mean * self.config.scaling_factor if key is None else self.sample(mean, std, key)

    def decode(self, latents: Latents) -> Images:
        """Decode scaled latents to pictures, about [-1, 1] (not clipped), float32."""
        x = (latents / self.config.scaling_factor).astype(self.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)


def to_images(pixels: jax.Array) -> Images:
    """Convert pixels 0..255 (uint8) to pictures in [-1, 1] (float32)."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Images) -> Pixels:
    """Convert pictures in [-1, 1] to pixels 0..255 (uint8), clipped and rounded."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
