"""A learned gate over time: AFA with its maps tied over pixels and sites, so that they depend on the timestep alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import FusedUNets, Remat
from afa_jax.mesh.experts import weighted_sum
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Linear
from afa_jax.models.unet import Stage, UNet
from afa_jax.types import Feature, Maps, OwnFeatures, TextStates, TimeEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The gate's architecture: the width of its one hidden layer."""

    hidden: int = 64

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise InputError(f"fusion.hidden={self.hidden}; choose 1 or more")


class Gate(nnx.Module):
    """Mean time embedding -> one weight an expert, the same at every pixel of every site.

    It stands where ``Aggregators`` do in FusedUNets. The last layer starts at zero: an untrained gate averages.

    Attributes:
        at: indices of the U-Net's stages after which the experts are fused: all.
    """

    kind: ClassVar[str] = "gate"
    Config: ClassVar[type] = GateConfig
    spreads: ClassVar[bool] = True
    rematerialises: ClassVar[bool] = True
    merges: ClassVar[bool] = False

    def __init__(self, config: GateConfig, experts: int, stages: Sequence[Stage], unet: UNetConfig, *, rngs: nnx.Rngs):
        self.config, self.experts = config, experts
        self.at = tuple(range(len(stages)))
        self.linear_1 = Linear(unet.time_width, config.hidden, rngs=rngs)
        self.linear_2 = Linear(config.hidden, experts, zero=True, rngs=rngs)

    def site(self, stage: int) -> Gate:
        """Return the fuser after a stage."""
        return self

    def weights(self, temb: TimeEmbedding) -> Float[Array, "n b"]:
        """Return each expert's weight, float32, summing to one over n."""
        # A time embedding is not yet activated: residual blocks begin with SiLU too.
        hidden = self.linear_1(jax.nn.silu(temb.astype(jnp.float32)))
        return jax.nn.softmax(self.linear_2(jax.nn.silu(hidden)), axis=-1).T

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse, as SABW does; the text states have no effect."""
        weights = self.weights(temb)
        maps = jnp.broadcast_to(weights[:, :, None, None], (len(weights), *features.shape[1:-1]))
        # The weights, not the maps: the maps' gradient would be as large as the features.
        return weighted_sum(weights, features), maps

    def site_names(self, unet: UNet) -> list[str]:
        """Return the names of all stages."""
        return [stage.name for stage in unet.stages]

    def assemble(
        self, unet: UNet, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none"
    ) -> tuple[FusedUNets, Any]:
        """Return the ensemble whose maps the gate makes, and the text encoders whose states it takes."""
        return FusedUNets(experts=unet, aggregators=self, remat=remat), text_encoder
