"""An output router: N small U-Nets say at each pixel of the latents whose prediction counts.

Collaborative Diffusion (Huang et al., CVPR 2023, arXiv 2304.10530), whose dynamic diffusers these are: the experts are
frozen and run apart, and their predictions are fused once, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import Remat
from afa_jax.fusion.rivals.blending import predict_each
from afa_jax.mesh.experts import map_experts, weighted_sum
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import ConfigError, UNetConfig
from afa_jax.models.unet import Stage, UNet
from afa_jax.trees import stack
from afa_jax.types import Latents, Maps, SiteMaps, Timesteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The architecture of each of the N small U-Nets; names as in UNetConfig.

    Attributes:
        block_out_channels: width of each level; no more levels than the experts have.
        layers_per_block: residual blocks on each level, one more on the way up.
        heads: of the attention, which all levels but the first have, and the middle.
        norm_num_groups: of the group norms.
    """

    block_out_channels: tuple[int, ...] = (64, 128)
    layers_per_block: int = 1
    heads: int = 4
    norm_num_groups: int = 8

    def unet(self, expert: UNetConfig) -> UNetConfig:
        """Return the config of the router's small U-Net: the experts' latents and text states in, one channel out.

        Raises:
            InputError: it has more levels than the experts, or fields that do not fit one another.
        """
        levels = len(self.block_out_channels)
        if not 1 <= levels <= len(expert.block_out_channels):
            most = len(expert.block_out_channels)
            raise InputError(f"fusion.block_out_channels has {levels} levels; choose 1 to {most}, as the experts have")
        for field in ("layers_per_block", "heads", "norm_num_groups"):
            if getattr(self, field) < 1:
                raise InputError(f"fusion.{field}={getattr(self, field)}; choose 1 or more")
        try:
            return UNetConfig(
                sample_size=expert.sample_size,
                in_channels=expert.in_channels,
                out_channels=1,
                block_out_channels=self.block_out_channels,
                down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
                up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
                layers_per_block=self.layers_per_block,
                attention_head_dim=self.heads,
                cross_attention_dim=expert.cross_attention_dim,
                norm_num_groups=self.norm_num_groups,
            )
        except ConfigError as error:
            raise InputError(f"fusion: {error}") from None


class Router(nnx.Module):
    """N small U-Nets, one an expert: noisy latents, timestep and that expert's text states -> its logit at each pixel.

    Their last convolution starts at zero: an untrained router averages the predictions.

    Attributes:
        at: index of the one stage after which the experts are fused: the last.
    """

    kind: ClassVar[str] = "router"
    Config: ClassVar[type] = RouterConfig
    spreads: ClassVar[bool] = False
    rematerialises: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def __init__(
        self, config: RouterConfig, experts: int, stages: Sequence[Stage], unet: UNetConfig, *, rngs: nnx.Rngs
    ):
        self.config, self.experts = config, experts
        self.at = (len(stages) - 1,)
        self.unets = nnx.List([UNet(config.unet(unet), rngs=rngs) for _ in range(experts)])

    def maps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Maps:
        """Return each expert's weight at each pixel of the latents, float32, summing to one over n."""

        def logits(unet: UNet, own: Conditioning) -> Any:
            return unet(latents, t, own)[..., 0]

        return jax.nn.softmax(map_experts(logits, stack(list(self.unets)), conditioning), axis=0)

    def weigh(self, latents: Latents, t: Timesteps, conditioning: Conditioning, previous: Latents) -> Maps:
        """Return the maps as sparse execution asks for them; clean latents of the step before are not read."""
        return self.maps(latents, t, conditioning)

    def site_names(self, unet: UNet) -> list[str]:
        """Return the name of the last stage, whose output is the prediction."""
        return [unet.stages[-1].name]

    def assemble(
        self, unet: UNet, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none"
    ) -> tuple[Routed, Any]:
        """Return the Denoiser that weights the experts' predictions, and the text encoders whose states it takes."""
        return Routed(experts=unet, router=self), text_encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A Denoiser: N experts that run apart, their predictions fused by a Router.

    Attributes:
        experts: a stack of N U-Nets.
        router: a Router.
    """

    experts: Any
    router: Any

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the fused prediction, float32."""
        return self.with_maps(latents, t, conditioning)[0]

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> tuple[Latents, SiteMaps]:
        """Return the fused prediction and the one site's maps.

        Raises:
            ValueError: the numbers of text states and experts differ.
        """
        predictions = predict_each(self.experts, latents, t, conditioning)
        maps = self.router.maps(latents, t, conditioning)
        return weighted_sum(maps, predictions), (maps,)

    @property
    def sites(self) -> list[str]:
        """Return the name of the one site, the prediction."""
        return [self.experts.stages[-1].name]


jax.tree_util.register_dataclass(Routed, data_fields=["experts", "router"], meta_fields=[])
