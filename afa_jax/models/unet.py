"""The U-Net of Stable Diffusion 1.x and 2.x, cut into the stages at which AFA fuses.

Rombach et al. 2022 (arXiv 2112.10752); layer names and configuration fields are those of diffusers'
UNet2DConditionModel, so that a stage's parameters are found in a checkpoint by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from afa_jax.models.attention import Transformer2D
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Conv, GroupNorm, Linear, timestep_embedding
from afa_jax.models.resnet import Downsample, ResnetBlock, Upsample
from afa_jax.types import Latents, TimeEmbedding, Timesteps

Size = tuple[int, int]
"""The rows and columns of a feature map."""


class Stage(nnx.Module):
    """One stage of the U-Net.

    Attributes:
        name: its place, in diffusers' terms: "conv_in", "down_blocks.0.layers.1", "down_blocks.0.downsampler",
            "mid_block", "up_blocks.3.layers.1", "conv_out".
        takes_skip: whether it concatenates the last remaining skip to its input.
        leaves_skip: whether its output is a skip for a later stage.
        level: the level of its output, whose size is the latents' halved this many times (``size_at``).
        channels: the channels of its output.
    """

    name: str
    channels: int
    level: int = 0
    takes_skip: bool = False
    leaves_skip: bool = False

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        """Compute this stage's features from ``[b, h, w, c]``, time embedding ``[b, d]`` and text ``[b, s, d']``.

        An upsampler gives features of ``size``; None doubles rows and columns.
        """
        raise TypeError(f"{type(self).__name__} is not a stage by itself")


class ConvIn(Stage):
    """The convolution from the latents to the first feature."""

    leaves_skip = True

    def __init__(self, config: UNetConfig, **kwargs: Any):
        self.name, self.channels = "conv_in", config.block_out_channels[0]
        self.conv_in = Conv(config.in_channels, self.channels, **kwargs)

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        return self.conv_in(x)


class Layer(Stage):
    """A residual block, a transformer if the level has one, an upsampler if it is the last up layer of a block."""

    def __init__(
        self,
        config: UNetConfig,
        name: str,
        level: int,
        in_channels: int,
        *,
        attention: bool,
        up: bool = False,
        upsampler: bool = False,
        **kwargs: Any,
    ):
        self.name, self.channels, self.level = name, config.block_out_channels[level], level - upsampler
        self.takes_skip, self.leaves_skip = up, not up
        self.resnet = _resnet(config, level, in_channels, **kwargs)
        self.attention = _transformer(config, level, **kwargs) if attention else None
        self.upsampler = Upsample(self.channels, **kwargs) if upsampler else None

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        if skip is not None:
            x = jnp.concatenate([x, skip], -1)
        x = self.resnet(x, temb)
        if self.attention is not None:
            x = self.attention(x, context)
        return x if self.upsampler is None else self.upsampler(x, size)


class Downsampler(Stage):
    """Halves the rows and columns, and rounds up."""

    leaves_skip = True

    def __init__(self, config: UNetConfig, level: int, **kwargs: Any):
        self.name, self.channels = f"down_blocks.{level}.downsampler", config.block_out_channels[level]
        self.level = level + 1
        self.downsampler = Downsample(self.channels, **kwargs)

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        return self.downsampler(x)


class MidBlock(Stage):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, **kwargs: Any):
        self.level = len(config.block_out_channels) - 1
        self.name, self.channels = "mid_block", config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(config, self.level, self.channels, **kwargs) for _ in range(2)])
        self.attentions = nnx.List([_transformer(config, self.level, **kwargs)])

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class ConvOut(Stage):
    """The last up layer, norm, SiLU and the convolution to the prediction.

    One stage, because AFA fuses the predictions but not the last up layer's features.
    """

    takes_skip = True

    def __init__(self, config: UNetConfig, layer: Layer, **kwargs: Any):
        self.name, self.channels = "conv_out", config.out_channels
        width = config.block_out_channels[0]
        self.layer = layer
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, width, eps=config.norm_eps, param_dtype=kwargs["param_dtype"]
        )
        self.conv_out = Conv(width, config.out_channels, zero=True, **kwargs)

    def __call__(
        self, x: Array, temb: Array, context: Array, skip: Array | None = None, size: Size | None = None
    ) -> Array:
        x = self.layer(x, temb, context, skip)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def _resnet(config: UNetConfig, level: int, in_channels: int, **kwargs: Any) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        config.block_out_channels[level],
        config.time_width,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        zero=True,
        **kwargs,
    )


def _transformer(config: UNetConfig, level: int, **kwargs: Any) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        layers=config.transformer_layers[level],
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        zero=True,
        **kwargs,
    )


class TimeEmbeddingMLP(nnx.Module):
    """Two linear layers with SiLU between them, after the sinusoids."""

    def __init__(self, width: int, out_width: int, **kwargs: Any):
        self.linear_1 = Linear(width, out_width, **kwargs)
        self.linear_2 = Linear(out_width, out_width, **kwargs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNet(nnx.Module):
    """The denoising network ``(latents, t, conditioning) -> prediction``, as a list of stages.

    Args:
        config: the architecture.
        dtype: compute dtype; inputs are cast to it and all layers follow. The prediction is float32.
        param_dtype: dtype of the freshly initialised parameters.

    Residual branches and the last convolution start at zero, as in the original latent diffusion code.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.time_embedding = TimeEmbeddingMLP(config.block_out_channels[0], config.time_width, **kwargs)
        self.stages = nnx.List(_build_stages(config, **kwargs))

    def embed(self, t: Timesteps, conditioning: Conditioning) -> TimeEmbedding:
        """Return the time embedding for the residual blocks, ``[b, 4 * first width]``, in the compute dtype."""
        sinusoids = timestep_embedding(
            t,
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            shift=self.config.freq_shift,
        )
        temb = self.time_embedding(sinusoids.astype(self.dtype))
        return temb if conditioning.temb is None else temb + conditioning.temb.astype(self.dtype)

    def features(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, *, remat: bool = False
    ) -> Iterator[tuple[Stage, Array]]:
        """Yield every stage with its output, in order.

        Args:
            remat: a gradient computes the inside of each stage again, and keeps these outputs only.
        """
        temb, context = self.embed(t, conditioning), conditioning.text.astype(self.dtype)
        x = latents.astype(self.dtype)
        skips: list[Array] = []
        for stage in self.stages:
            skip = skips.pop() if stage.takes_skip else None
            run = functools.partial(_run_stage, size_at(latents.shape[1:3], stage.level))
            x = (jax.checkpoint(run) if remat else run)(stage, x, temb, context, skip)
            if stage.leaves_skip:
                skips.append(x)
            yield stage, x

    def __call__(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, *, remat: bool = False
    ) -> Float[Array, "b h w out_channels"]:
        """Predict the noise, velocity or sample, as the noise schedule defines, in float32.

        Args:
            latents: ``[b, h, w, in_channels]``, of any size.
            t: ``[b]`` training timesteps.
            conditioning: text states ``[b, s, cross_attention_dim]``.
            remat: as in ``features``.
        """
        *_, (_, prediction) = self.features(latents, t, conditioning, remat=remat)
        return prediction.astype(jnp.float32)


def _run_stage(size: Size, stage: Stage, x: Array, temb: Array, context: Array, skip: Array | None) -> Array:
    return stage(x, temb, context, skip, size)


def size_at(latents: Sequence[int], level: int) -> Size:
    """Return rows and columns of a level's features for latents of this size; each halving rounds up."""
    rows, columns = latents
    return -(-rows // 2**level), -(-columns // 2**level)


def _build_stages(config: UNetConfig, **kwargs: Any) -> list[Stage]:
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    stages: list[Stage] = [ConvIn(config, **kwargs)]
    skips, channels = [widths[0]], widths[0]
    for level, layers in enumerate(config.layers_per_level):
        for i in range(layers):
            name = f"down_blocks.{level}.layers.{i}"
            attention = config.down_attention[level]
            stages.append(Layer(config, name, level, channels, attention=attention, **kwargs))
            channels = widths[level]
            skips.append(channels)
        if level < last:
            stages.append(Downsampler(config, level, **kwargs))
            skips.append(channels)
    stages.append(MidBlock(config, **kwargs))
    for block, level in enumerate(range(last, -1, -1)):
        layers = config.layers_per_level[level] + 1
        for i in range(layers):
            layer = Layer(
                config,
                f"up_blocks.{block}.layers.{i}",
                level,
                channels + skips.pop(),
                attention=config.up_attention[block],
                up=True,
                upsampler=level > 0 and i == layers - 1,
                **kwargs,
            )
            stages.append(layer if skips else ConvOut(config, layer, **kwargs))
            channels = widths[level]
    return stages
