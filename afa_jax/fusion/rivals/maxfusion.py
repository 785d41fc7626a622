"""MaxFusion: features fused without training, by how strongly each expert speaks at a pixel (arXiv 2404.09977)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from afa_jax.mesh.experts import weighted_sum
from afa_jax.types import Feature, Features, Maps, TextStates, TimeEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxFusion:
    """Aggregators without parameters: at each pixel the strongest expert, averaged with those that agree with it.

    Nair et al., ECCV 2024 (arXiv 2404.09977). The strength of an expert at a pixel is the variance of its feature
    over the channels, as a share of that variance summed over the picture. Two experts agree where their features
    correlate over the channels (Pearson) above the threshold. So for two experts, the paper's case: the mean where
    they agree, else the stronger one, the first in a tie.

    The paper has no rule for more, its code fuses two. Of N, the strongest is averaged with all that agree with it:
    the same for two, and it does not depend on the experts' order (a chain of pairs would).

    The shares are taken within each picture; the authors' code takes them over the batch, so that a picture depends
    on its batch-mates. Their code also rescales the chosen feature to each stream's own standard deviation, in the
    encoders of the ControlNets, which stay two streams; where one feature goes on, as everywhere here, it does not.

    Attributes:
        threshold: correlation above which experts agree.
        averaged: stages whose features are averaged instead. The paper fuses features, never predictions: there one
            U-Net is conditioned by several ControlNets, so that there is one prediction. Here the N predictions have
            to become one: by the same rule, or by their mean if the index of the last stage is named here (a
            prediction has few channels, and at high noise its variance says little).
    """

    threshold: float = 0.7
    averaged: tuple[int, ...] = ()

    def site(self, stage: int) -> MaxFusion | Average:
        """Return the fuser after a stage; every stage has one."""
        return Average() if stage in self.averaged else self

    def __call__(self, features: Features, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        """Fuse ``[n, b, h, w, c]``; the time embedding and the text states have no effect.

        Returns:
            The fused feature in the features' dtype, and the maps in float32: at each pixel 1/m for the m experts
            that are averaged, 0 for the others.
        """
        maps = agreement(features, self.threshold)
        return weighted_sum(maps, features), maps


@dataclasses.dataclass(frozen=True)
class Average:
    """The fuser that takes the mean."""

    def __call__(self, features: Features, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        maps = jnp.full(features.shape[:-1], 1 / features.shape[0], jnp.float32)
        return weighted_sum(maps, features), maps


jax.tree_util.register_dataclass(MaxFusion, data_fields=[], meta_fields=["threshold", "averaged"])
jax.tree_util.register_dataclass(Average, data_fields=[], meta_fields=[])


def agreement(features: Features, threshold: float | int) -> Maps:
    """Compute MaxFusion's maps, float32: equal weights for the strongest expert and those that correlate with it."""
    x: Any = features.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1)
    whole = variance.sum((2, 3), keepdims=True)
    strongest = (variance / jnp.where(whole > 0, whole, 1)).argmax(0)[None]
    covariance = (x * jnp.take_along_axis(x, strongest[..., None], axis=0)).mean(-1)
    scale = jnp.sqrt(variance * jnp.take_along_axis(variance, strongest, axis=0))
    # A product in place of a quotient, so that a feature without variance agrees only with itself.
    experts = jnp.arange(len(x))[:, None, None, None]
    chosen = ((covariance > threshold * scale) | (experts == strongest)).astype(jnp.float32)
    return chosen / chosen.sum(0)
