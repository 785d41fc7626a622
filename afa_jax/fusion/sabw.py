"""SABW, the Spatial-Aware Block-Wise aggregator (Wang et al., ICLR 2025, arXiv 2405.17082, section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afa_jax.errors import InputError
from afa_jax.models.attention import Transformer2D
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Conv
from afa_jax.models.resnet import ResnetBlock
from afa_jax.models.unet import Stage
from afa_jax.types import Feature, Features, Maps, TextStates, TimeEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SABWConfig:
    """The aggregators' architecture; the defaults are the paper's.

    Attributes:
        hidden: width.
        transformer_layers: depth of the spatial transformer.
        heads: of its attention.
        norm_num_groups: of the group norms.
        use_time: without, the maps do not depend on the timestep (except through the features).
        use_text: without, the maps do not depend on the prompt (except through the features).
        per_pixel: without, one weight an expert, site and sample: logits are averaged over the pixels.
        sites: "all", or "last": the experts run apart and only their predictions are fused.
    """

    hidden: int = 128
    transformer_layers: int = 2
    heads: int = 8
    norm_num_groups: int = 32
    use_time: bool = True
    use_text: bool = True
    per_pixel: bool = True
    sites: str = "all"

    def __post_init__(self) -> None:
        if self.sites not in ("all", "last"):
            raise InputError(f"sabw.sites={self.sites!r}; choose all or last")
        for field in ("heads", "norm_num_groups"):
            if self.hidden % getattr(self, field):
                raise InputError(f"sabw.{field}={getattr(self, field)} does not divide sabw.hidden={self.hidden}")


class SABW(nnx.Module):
    """One aggregator: N experts' features of one site -> one map an expert, and the fused feature.

    Args:
        experts: N.
        channels: of the features.
        time_width: of the time embedding.
        text_width: of the text states.

    The last convolution starts at zero: an untrained aggregator averages.
    """

    def __init__(
        self,
        config: SABWConfig,
        experts: int,
        channels: int,
        *,
        time_width: int,
        text_width: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.experts = config, experts
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        hidden, groups = config.hidden, config.norm_num_groups
        self.conv_in = Conv(experts * channels, hidden, 1, **kwargs)
        self.res_block = ResnetBlock(
            hidden, hidden, time_width if config.use_time else None, groups=groups, eps=1e-6, **kwargs
        )
        self.transformer = Transformer2D(
            hidden,
            config.heads,
            text_width if config.use_text else None,
            layers=config.transformer_layers,
            groups=groups,
            **kwargs,
        )
        self.conv_out = Conv(hidden, experts, 1, bias=False, zero=True, **kwargs)

    def logits(self, features: Features, temb: TimeEmbedding, text: TextStates) -> Maps:
        """Unnormalised maps ``[n, b, h, w]`` in float32."""
        kernel = self.conv_in.kernel[...].astype(features.dtype)
        # The 1x1 convolution of the concatenated channels is a sum over the experts: no concatenation, and an expert's
        # share can be computed where the expert is.
        x = jnp.einsum("nbhwc,nco->bhwo", features, kernel.reshape(self.experts, -1, kernel.shape[-1]))
        assert self.conv_in.bias is not None
        x = x + self.conv_in.bias[...].astype(x.dtype)
        x = self.res_block(x, temb if self.config.use_time else None)
        x = self.transformer(x, text)
        logits = jnp.moveaxis(self.conv_out(x).astype(jnp.float32), -1, 0)
        if not self.config.per_pixel:
            logits = jnp.broadcast_to(logits.mean((2, 3), keepdims=True), logits.shape)
        return logits

    def __call__(self, features: Features, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse: softmax over the experts at each pixel in float32, then the weighted sum.

        Args:
            features: ``[n, b, h, w, c]``.
            temb: mean over the experts of their time embeddings, ``[b, time_width]``.
            text: mean over the experts of their text states, ``[b, s, text_width]``.
        """
        maps = jax.nn.softmax(self.logits(features, temb, text), axis=0)
        return fuse(features, maps), maps


def fuse(features: Features, maps: Maps) -> Feature:
    """``sum_n maps[n] * features[n]``, summed in float32, in the features' dtype."""
    return jnp.einsum("nbhw,nbhwc->bhwc", maps, features.astype(jnp.float32)).astype(features.dtype)


class Aggregators(nnx.Module):
    """The trainable part of an ensemble: one SABW for each site.

    Attributes:
        at: indices of the U-Net's stages that have one, in the order of ``sites``.
    """

    def __init__(
        self,
        config: SABWConfig,
        experts: int,
        stages: Sequence[Stage],
        unet: UNetConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.experts = config, experts
        self.at = tuple(range(len(stages))) if config.sites == "all" else (len(stages) - 1,)
        self.sites = nnx.List(
            [
                SABW(
                    config,
                    experts,
                    stages[index].channels,
                    time_width=unet.time_width,
                    text_width=unet.cross_attention_dim,
                    rngs=rngs,
                    param_dtype=param_dtype,
                )
                for index in self.at
            ]
        )

    def site(self, stage: int) -> SABW | None:
        """The aggregator after a stage, None where the experts are not fused."""
        return self.sites[self.at.index(stage)] if stage in self.at else None


def parameter_count(tree: Any) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
