"""Adaptive Feature Aggregation (Wang et al., ICLR 2025, arXiv 2405.17082): N frozen U-Nets, fused after every stage.

SABW, the Spatial-Aware Block-Wise aggregator of section 3.2, turns the experts' features of one place in the U-Net into
a map for each expert, and the features into their weighted sum. ``FusedUNets`` runs the U-Nets side by side with one
SABW after each stage. Whether the experts share a device or not is decided in mesh/experts.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.mesh.collectives import is_split, mean_over_experts, whole
from afa_jax.mesh.experts import Shared, contract_experts, map_experts, on_shares, weighted_sum
from afa_jax.models.attention import Transformer2D
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Conv
from afa_jax.models.resnet import ResnetBlock
from afa_jax.models.unet import Size, Stage, UNet, size_at
from afa_jax.trees import axis_size
from afa_jax.types import Feature, Latents, Maps, OwnFeatures, SiteMaps, TextStates, TimeEmbedding, Timesteps

Remat = Literal["none", "stage", "fused"]
"""What a backward pass recomputes instead of storing; see ``FusedUNets``."""
REMATS: tuple[Remat, ...] = ("none", "stage", "fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SABWConfig:
    """The aggregators' architecture; the defaults are the paper's.

    Attributes:
        hidden: the width of the hidden layers.
        transformer_layers: the depth of the spatial transformer.
        heads: the number of attention heads.
        norm_num_groups: the number of groups of the group norms.
        use_time: if False, the maps do not depend on the timestep (except through the features).
        use_text: if False, the maps do not depend on the prompt (except through the features).
        per_pixel: if False, logits are averaged over the pixels: one weight for each expert, site and sample.
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
    """An aggregator without its conv_in: residual block, transformer and the convolution to the logits.

    The last convolution starts at zero, so that an untrained aggregator averages.
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

    def trunk_logits(self, x: Feature, temb: TimeEmbedding, text: TextStates) -> Maps:
        """Return unnormalised maps ``[n, b, h, w]``, float32, from the output of conv_in."""
        x = self.res_block(x, temb if self.config.use_time else None)
        x = self.transformer(x, text)
        logits = jnp.moveaxis(self.conv_out(x).astype(jnp.float32), -1, 0)
        if not self.config.per_pixel:
            logits = jnp.broadcast_to(logits.mean((2, 3), keepdims=True), logits.shape)
        return logits


class SABW(Trunk):
    """One aggregator: N experts' features of one site -> a map for each expert, and the fused feature.

    Args:
        experts: the number of experts, N.
        channels: the channels of the features.
        time_width: the width of the time embedding.
        text_width: the width of the text states.
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
        """Return unnormalised maps ``[n, b, h, w]``, float32."""
        return _logits(self.conv_in, self, features, temb, text)

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse: softmax over the experts at each pixel in float32, then the weighted sum.

        Args:
            features: ``[n, b, h, w, c]``.
            temb: the experts' mean time embedding, ``[b, time_width]``.
            text: the experts' mean text states, ``[b, s, text_width]``.
        """
        maps = jax.nn.softmax(self.logits(features, temb, text), axis=0)
        return weighted_sum(maps, features), maps


class Site(nnx.Module):
    """The part that each site has of its own if the trunk is shared."""

    def __init__(self, in_channels: int, hidden: int, **kwargs: Any):
        self.conv_in = Conv(in_channels, hidden, 1, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSABW:
    """A site's own conv_in in front of the trunk that all sites share; called as SABW is."""

    conv_in: Any
    trunk: Any

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        maps = jax.nn.softmax(_logits(self.conv_in, self.trunk, features, temb, text), axis=0)
        return weighted_sum(maps, features), maps


jax.tree_util.register_dataclass(SharedSABW, data_fields=["conv_in", "trunk"], meta_fields=[])


def _logits(conv_in: Conv, trunk: Trunk, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> Maps:
    """Return all experts' logits: conv_in of their concatenated channels, then the trunk."""
    assert conv_in.bias is not None
    kernel, bias = (parameter[...].astype(features.dtype) for parameter in (conv_in.kernel, conv_in.bias))
    x = contract_experts(features, kernel[0, 0]) + bias
    return on_shares(trunk.trunk_logits, x, features.shape[1], temb, text, axis=1)


class Aggregators(nnx.Module):
    """The trainable part of an ensemble: one SABW for each site (a TrainedFusion, fusion/registry.py).

    Attributes:
        at: the indices of the fused stages of the U-Net, in the order of ``sites``.
        sites: a SABW for each site; with ``config.shared`` a conv_in for each.
        trunk: the trunk that all sites share; None if each site has its own.
    """

    kind: ClassVar[str] = "afa"
    Config: ClassVar[type] = SABWConfig
    spreads: ClassVar[bool] = True
    rematerialises: ClassVar[bool] = True
    merges: ClassVar[bool] = False

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
        """Return the aggregator after a stage, None where the experts are not fused."""
        if stage not in self.at:
            return None
        own = self.sites[self.at.index(stage)]
        return own if self.trunk is None else SharedSABW(conv_in=own.conv_in, trunk=self.trunk)

    def site_names(self, unet: UNet) -> list[str]:
        """Return the names of the stages after which the experts are fused."""
        return [unet.stages[index].name for index in self.at]

    def assemble(
        self, unet: UNet, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none"
    ) -> tuple[FusedUNets, Any]:
        """Return the Denoiser of these aggregators and N experts, and the text encoders whose states it takes."""
        return FusedUNets(experts=unet, aggregators=self, remat=remat), text_encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedUNets:
    """A Denoiser: N U-Nets in lock-step, fused after every stage that has an aggregator.

    Attributes:
        experts: a stack of N U-Nets.
        aggregators: Aggregators, or another object whose ``site(index)`` returns the fuser of a stage, or None.
        remat: what a backward pass recomputes instead of storing. "none": nothing. "stage": the inside of the
            experts' stages, one expert at a time; their features and the inside of the aggregators are stored.
            "fused": all of a site, so that only the fused features are stored.
    """

    # Untyped where the leaves may be anything while JAX maps over the tree.
    experts: Any
    aggregators: Any
    remat: Remat = "none"

    spreads: ClassVar[bool] = True
    """Whether its experts can be spread over several devices."""

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the fused prediction, float32."""
        return self.with_maps(latents, t, conditioning)[0]

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> tuple[Latents, SiteMaps]:
        """Return the fused prediction, and the maps of every fused site in the stages' order.

        On a mesh ``experts`` and ``conditioning`` are those of one device, and the result is that of all devices.

        Args:
            latents: ``[b, h, w, c]``, of any size.
            t: ``[b]``.
            conditioning: each expert's conditioning, ``[n, b, ...]``.

        Raises:
            ValueError: the numbers of text states and experts differ.
        """
        experts = self.experts
        if axis_size(conditioning) != axis_size(experts):
            raise ValueError(
                f"text states of {axis_size(conditioning)} experts for an ensemble of {axis_size(experts)}"
            )
        temb = map_experts(lambda unet, own, t: unet.embed(t, own), experts, conditioning, Shared(t))
        context = conditioning.text.astype(experts.dtype)
        mean_temb, mean_context = mean_over_experts(temb), mean_over_experts(context)

        x: Any = Shared(latents.astype(experts.dtype))
        skips: list[Any] = []
        all_maps: list[Maps] = []
        for index, (stage, shapes) in enumerate(zip(experts.stages, self._whole_shapes(), strict=True)):
            skip = skips.pop() if stage.takes_skip else Shared(None)
            run = functools.partial(self._site, shapes, size_at(latents.shape[1:3], stage.level))
            x, maps = (jax.checkpoint(run) if self.remat == "fused" else run)(
                (stage, self.aggregators.site(index)), x, skip, (temb, context), (mean_temb, mean_context)
            )
            if maps is not None:
                all_maps.append(maps)
            if stage.leaves_skip:
                skips.append(x)
        return x.value.astype(jnp.float32), tuple(all_maps)

    def _site(
        self,
        shapes: Any,
        size: Size,
        modules: tuple[Any, Any],
        x: Any,
        skip: Any,
        embeddings: tuple[Array, Array],
        mean_embeddings: tuple[Array, Array],
    ) -> tuple[Any, Maps | None]:
        """Run one stage of every expert, and fuse the features.

        ``x`` and ``skip`` are Shared where the experts were fused, and else an array for each expert. So is the result.
        """
        stage, aggregate = modules

        def of_one(stage: Any, x: Array, temb: Array, context: Array, skip: Array | None) -> Array:
            return whole(stage, shapes)(x, temb, context, skip, size)

        # The loop's body is checkpointed, not the loop: the gradient then holds the inside of one expert at a time.
        features = map_experts(of_one if self.remat == "none" else jax.checkpoint(of_one), stage, x, *embeddings, skip)
        if aggregate is None:
            return features, None
        fused, maps = aggregate(features, *mean_embeddings)
        return Shared(fused), maps

    def _whole_shapes(self) -> Sequence[Any]:
        """Return the shapes of each stage before its parameters are split over ``fsdp``; None if they never are."""
        if not is_split():
            return [None] * len(self.experts.stages)
        return jax.eval_shape(lambda: UNet(self.experts.config, rngs=nnx.Rngs(0))).stages

    @property
    def sites(self) -> list[str]:
        """Return the names of the stages that have an aggregator, in the order of the maps."""
        return [
            stage.name for index, stage in enumerate(self.experts.stages) if self.aggregators.site(index) is not None
        ]


jax.tree_util.register_dataclass(FusedUNets, data_fields=["experts", "aggregators"], meta_fields=["remat"])


def routing_of(maps: SiteMaps) -> dict[str, Array]:
    """Summarise the maps of a forward pass for each row and site.

    Returns:
        ``weights`` ``[b, sites, n]``, the maps' mean over the pixels; and ``entropy`` ``[b, sites]``, the maps' entropy
        divided by log(n), mean over the pixels: 1 means equal weights, 0 a single expert.
    """

    def entropy(site: Array) -> Array:
        nats = -(site * jnp.log(jnp.maximum(site, 1e-30))).sum(0).mean((1, 2))
        return nats / jnp.log(max(2, site.shape[0]))

    return dict(
        weights=jnp.stack([site.mean((2, 3)).T for site in maps], 1), entropy=jnp.stack([entropy(m) for m in maps], 1)
    )
