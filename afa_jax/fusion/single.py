"""Baselines of an ensemble: one expert alone, and constant maps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from afa_jax.mesh.experts import weighted_sum
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.unet import UNet
from afa_jax.trees import take
from afa_jax.types import Feature, Latents, Maps, OwnFeatures, TextStates, TimeEmbedding, Timesteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleExpert:
    """A Denoiser that is one expert of a stack, alone.

    Attributes:
        experts: a stack of N U-Nets.
        index: the expert's index, an integer or an integer array.
    """

    experts: Any
    index: Any

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return that expert's own prediction, with its own text states."""
        unet: UNet = take(self.experts, self.index)
        return unet(latents, t, take(conditioning, self.index))


# The index is data, so that all experts share one compiled program.
jax.tree_util.register_dataclass(SingleExpert, data_fields=["experts", "index"], meta_fields=[])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantMaps:
    """The same weights at every pixel of every site; it stands where ``Aggregators`` do in FusedUNets.

    Attributes:
        weights: ``[n]``: 1/N each is the uniform average, a one-hot vector is one expert inside the ensemble.
    """

    weights: Any

    spreads: ClassVar[bool] = True

    def site(self, stage: int) -> ConstantMaps:
        """Return the fuser after a stage; every stage has one."""
        return self

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse ``[n, b, h, w, c]``; the time embedding and the text states have no effect."""
        weights = self.weights.astype(jnp.float32)
        maps = jnp.broadcast_to(weights[:, None, None, None], (len(weights), *features.shape[1:-1]))
        return weighted_sum(maps, features), maps


jax.tree_util.register_dataclass(ConstantMaps, data_fields=["weights"], meta_fields=[])
