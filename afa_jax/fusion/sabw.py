"""SABW, the Spatial-Aware Block-Wise aggregator (Wang et al., ICLR 2025, arXiv 2405.17082, section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from afa_jax.errors import InputError
from afa_jax.mesh.collectives import all_rows, own_experts, share_of_rows, share_sum_over_experts, sum_over_experts
from afa_jax.models.attention import Transformer2D
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Conv
from afa_jax.models.resnet import ResnetBlock
from afa_jax.models.unet import Stage
from afa_jax.types import Feature, Maps, OwnFeatures, TextStates, TimeEmbedding


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
        shared: all sites share one trunk (all but conv_in); at SD1.5's sizes with N = 3 that is 9.6 million parameters
            instead of 45.1.
    """

    hidden: int = 128
    transformer_layers: int = 2
    heads: int = 8
    norm_num_groups: int = 32
    use_time: bool = True
    use_text: bool = True
    per_pixel: bool = True
    sites: str = "all"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.sites not in ("all", "last"):
            raise InputError(f"sabw.sites={self.sites!r}; choose all or last")
        if self.transformer_layers < 0:
            raise InputError(f"sabw.transformer_layers={self.transformer_layers}; choose 0 or more")
        for field in ("hidden", "heads", "norm_num_groups"):
            if getattr(self, field) < 1:
                raise InputError(f"sabw.{field}={getattr(self, field)}; choose 1 or more")
            if self.hidden % getattr(self, field):
                raise InputError(f"sabw.{field}={getattr(self, field)} does not divide sabw.hidden={self.hidden}")


class Trunk(nnx.Module):
    """An aggregator but for its conv_in, at any site: residual block, transformer and the convolution to the logits.

    The last convolution starts at zero: an untrained aggregator averages.
    """

    def __init__(self, config: SABWConfig, experts: int, *, time_width: int, text_width: int, **kwargs: Any):
        self.config = config
        hidden, groups = config.hidden, config.norm_num_groups
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

    def maps_of(self, x: Feature, temb: TimeEmbedding, text: TextStates) -> Maps:
        """Unnormalised maps ``[n, b, h, w]`` in float32 of what conv_in made of the features."""
        x = self.res_block(x, temb if self.config.use_time else None)
        x = self.transformer(x, text)
        logits = jnp.moveaxis(self.conv_out(x).astype(jnp.float32), -1, 0)
        if not self.config.per_pixel:
            logits = jnp.broadcast_to(logits.mean((2, 3), keepdims=True), logits.shape)
        return logits


class SABW(Trunk):
    """One aggregator: N experts' features of one site -> one map an expert, and the fused feature.

    Args:
        experts: N.
        channels: of the features.
        time_width: of the time embedding.
        text_width: of the text states.
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
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.conv_in = Conv(experts * channels, config.hidden, 1, **kwargs)
        super().__init__(config, experts, time_width=time_width, text_width=text_width, **kwargs)

    def logits(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> Maps:
        """Unnormalised maps ``[n, b, h, w]`` in float32."""
        return _logits(self.conv_in, self, features, temb, text)

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse: softmax over the experts at each pixel in float32, then the weighted sum.

        Args:
            features: ``[n, b, h, w, c]``.
            temb: mean over the experts of their time embeddings, ``[b, time_width]``.
            text: mean over the experts of their text states, ``[b, s, text_width]``.
        """
        maps = jax.nn.softmax(self.logits(features, temb, text), axis=0)
        return fuse(features, maps), maps


class Site(nnx.Module):
    """What a site has of its own where the trunk is shared."""

    def __init__(self, in_channels: int, hidden: int, **kwargs: Any):
        self.conv_in = Conv(in_channels, hidden, 1, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSABW:
    """A site's own conv_in in front of the trunk that all sites share; called as SABW (which see)."""

    conv_in: Any
    trunk: Any

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        maps = jax.nn.softmax(_logits(self.conv_in, self.trunk, features, temb, text), axis=0)
        return fuse(features, maps), maps


jax.tree_util.register_dataclass(SharedSABW, data_fields=["conv_in", "trunk"], meta_fields=[])


def _logits(conv_in: Conv, trunk: Trunk, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> Maps:
    """All experts' unnormalised maps ``[n, b, h, w]``; the devices that hold the experts divide the trunk's work."""
    temb, text = share_of_rows((temb, text))
    return all_rows(trunk.maps_of(_project(conv_in, features), temb, text), features.shape[1], axis=1)


def _project(conv_in: Conv, features: OwnFeatures) -> Array:
    """The 1x1 convolution of the experts' concatenated channels; of this device's share of the rows."""
    kernel = conv_in.kernel[...].astype(features.dtype)
    # It is a sum over the experts: no concatenation, and an expert's part is computed where the expert is.
    kernel = own_experts(kernel.reshape(-1, features.shape[-1], kernel.shape[-1]))
    x = share_sum_over_experts(jnp.einsum("nbhwc,nco->bhwo", features, kernel))
    assert conv_in.bias is not None
    return x + conv_in.bias[...].astype(x.dtype)


def fuse(features: OwnFeatures, maps: Maps) -> Feature:
    """``sum_n maps[n] * features[n]`` over all experts, summed in float32, in the features' dtype."""
    # An accelerator's default would round both to bfloat16 or TF32 first; of so few terms, exact sums cost nothing.
    precision = jax.lax.Precision.HIGHEST
    own = jnp.einsum("nbhw,nbhwc->bhwc", own_experts(maps), features.astype(jnp.float32), precision=precision)
    return sum_over_experts(own).astype(features.dtype)


class Aggregators(nnx.Module):
    """The trainable part of an ensemble: one SABW for each site.

    Attributes:
        at: indices of the U-Net's stages that have one, in the order of ``sites``.
        sites: a SABW each; with ``config.shared`` a conv_in each.
        trunk: what the sites share; None where each has its own.
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
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        widths: dict[str, Any] = dict(time_width=unet.time_width, text_width=unet.cross_attention_dim)
        self.trunk = Trunk(config, experts, **widths, **kwargs) if config.shared else None

        def site(channels: int) -> Any:
            if config.shared:
                return Site(experts * channels, config.hidden, **kwargs)
            return SABW(config, experts, channels, **widths, **kwargs)

        self.sites: Any = nnx.List([site(stages[index].channels) for index in self.at])

    def site(self, stage: int) -> SABW | SharedSABW | None:
        """The aggregator after a stage, None where the experts are not fused."""
        if stage not in self.at:
            return None
        own = self.sites[self.at.index(stage)]
        return own if self.trunk is None else SharedSABW(conv_in=own.conv_in, trunk=self.trunk)


def parameter_count(tree: Any) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
