"""Learned block weights: the experts' weights are averaged block by block, by trained logits.

What users of merged models set by hand (merge block weighted) is trained here with AFA's loss and data. The outcome is
one ordinary model, AFA's fair static rival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from afa_jax.fusion.ensemble import Ensemble, Remat, SingleExpert
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import Stage
from afa_jax.trees import dotted
from afa_jax.types import Latents, SiteMaps, Timesteps
from afa_jax.weights.merging.blocks import block_names

OneTextStates = Float[Array, "1 b s d"]
"""Last hidden states of the merged text encoder, in the form of those of N experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWeightsConfig:
    """Learned block weights have no options: the blocks are the U-Net's stages, and one for what belongs to none."""


class BlockWeights(nnx.Module):
    """A logit for each block and expert, zero at first: untrained, the uniform average of the experts' weights.

    Attributes:
        logits: ``[blocks, n]``; the blocks are the U-Net's stages in order, and last the base, time embedding and text
            encoder.
        at: indices of the stages that have weights: all.
    """

    def __init__(
        self, config: BlockWeightsConfig, experts: int, stages: Sequence[Stage], unet: UNetConfig, *, rngs: nnx.Rngs
    ):
        self.config, self.experts = config, experts
        self.at = tuple(range(len(stages)))
        self.logits = nnx.Param(jnp.zeros((len(stages) + 1, experts), jnp.float32))

    def weights(self) -> Float[Array, "blocks n"]:
        """Each expert's share in every block, float32, summing to one over n."""
        return jax.nn.softmax(self.logits[...], axis=-1)

    def by_block(self, stages: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """The weights as the merge ``mbw`` takes them: by block (afa_jax/weights/merging/blocks.py) and expert.

        Args:
            stages: names of the U-Net's stages, in order.
            names: of the experts, in order.
        """
        logits = np.asarray(self.logits[...], np.float64)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        rows = (shares / shares.sum(-1, keepdims=True)).tolist()
        blocks = dict.fromkeys(block_names(stages).values())
        return {block: dict(zip(names, row, strict=True)) for block, row in zip(blocks, rows, strict=True)}


@jax.jit
def merge_stacks(unet: Any, text_encoder: Any, weights: Float[Array, "blocks n"]) -> tuple[Any, Any]:
    """Stacks of N U-Nets and text encoders -> stacks of one, weighted sums in float32.

    Args:
        weights: rows for the U-Net's stages in order; the last one for text encoder and time embedding.
    """

    def mix(leaf: Array, own: Array) -> Array:
        total = sum(own[n] * leaf[n].astype(jnp.float32) for n in range(len(leaf)))
        return jnp.asarray(total, leaf.dtype)[None]

    def of_unet(path: Any, leaf: Array) -> Array:
        head, index, *_ = dotted(path).split(".")
        return mix(leaf, weights[int(index)] if head == "stages" else weights[-1])

    return (
        jax.tree_util.tree_map_with_path(of_unet, unet),
        jax.tree.map(lambda leaf: mix(leaf, weights[-1]), text_encoder),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
    """A Denoiser: one merged U-Net, an ensemble of one, that remembers its block weights.

    Attributes:
        experts: a stack of one U-Net.
        weights: ``[blocks, n]``.
        remat: of an Ensemble.
    """

    experts: Any
    weights: Any
    remat: Remat = "none"

    def __call__(self, latents: Latents, t: Timesteps, conditioning: OneTextStates) -> Latents:
        """The U-Net's prediction, float32; the text states ``[1, b, s, d]`` are those of the merged text encoder."""
        if self.remat == "none":
            return SingleExpert(experts=self.experts, index=0)(latents, t, conditioning)
        return Ensemble(experts=self.experts, weights=jnp.ones(1), remat=self.remat)(latents, t, conditioning)

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: OneTextStates) -> tuple[Latents, SiteMaps]:
        """The prediction, and as each block's maps its weights, of one pixel: ``[n, b, 1, 1]``."""
        rows = latents.shape[0]
        maps = tuple(jnp.broadcast_to(row[:, None, None, None], (len(row), rows, 1, 1)) for row in self.weights)
        return self(latents, t, conditioning), maps


jax.tree_util.register_dataclass(Merged, data_fields=["experts", "weights"], meta_fields=["remat"])
