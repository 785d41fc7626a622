"""Learned block weights: the experts' weights are averaged block by block, by trained logits.

What users of merged models set by hand (merge block weighted) is trained here with AFA's loss and data. The outcome is
one ordinary model, AFA's fair static rival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.afa import Remat
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import Stage, UNet
from afa_jax.trees import dotted, take
from afa_jax.types import Latents, SiteMaps, Timesteps
from afa_jax.weights.merging.blocks import block_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWeightsConfig:
    """The config of learned block weights, which has no options.

    The blocks are the U-Net's stages, and one for all parameters outside them.
    """


class BlockWeights(nnx.Module):
    """A logit for each block and expert, zero at first: untrained, the uniform average of the experts' weights.

    Attributes:
        logits: ``[blocks, n]``; the blocks are the U-Net's stages in order, and last the base, time embedding and text
            encoder.
        at: indices of the stages that have weights: all.
    """

    kind: ClassVar[str] = "mbw"
    Config: ClassVar[type] = BlockWeightsConfig
    spreads: ClassVar[bool] = False
    rematerialises: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __init__(
        self, config: BlockWeightsConfig, experts: int, stages: Sequence[Stage], unet: UNetConfig, *, rngs: nnx.Rngs
    ):
        self.config, self.experts = config, experts
        self.at = tuple(range(len(stages)))
        self.logits = nnx.Param(jnp.zeros((len(stages) + 1, experts), jnp.float32))

    def weights(self) -> Float[Array, "blocks n"]:
        """Return each expert's share in every block, float32, summing to one over n."""
        return jax.nn.softmax(self.logits[...], axis=-1)

    def site_names(self, unet: UNet) -> list[str]:
        """Return the names of all stages, and ``base`` for all parameters outside them."""
        return [*(stage.name for stage in unet.stages), "base"]

    def assemble(
        self, unet: UNet, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none"
    ) -> tuple[MergedUNet, Any]:
        """Return the merged U-Net as a Denoiser, and the merged text encoder, each a stack of one.

        Args:
            unet: a stack of N U-Nets.
            text_encoder: a stack of N text encoders; may be None where there is nothing to merge.
        """
        weights = self.weights()
        merged, one_encoder = merge_stacks(unet, text_encoder, weights)
        return MergedUNet(experts=merged, weights=weights, remat=remat), one_encoder

    def by_block(self, stages: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return the weights as the merge ``mbw`` takes them: by block (afa_jax/weights/merging/blocks.py) and expert.

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
    """Merge stacks of N U-Nets and text encoders into stacks of one, by weighted sums in float32.

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
class MergedUNet:
    """A Denoiser: one merged U-Net, an ensemble of one, that remembers its block weights.

    Attributes:
        experts: a stack of one U-Net.
        weights: ``[blocks, n]``.
        remat: other than "none", a gradient keeps the features between the stages only.
    """

    experts: Any
    weights: Any
    remat: Remat = "none"

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the U-Net's prediction, float32; the conditioning ``[1, b, ...]`` is of the merged text encoder."""
        unet: UNet = take(self.experts, 0)
        return unet(latents, t, take(conditioning, 0), remat=self.remat != "none")

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> tuple[Latents, SiteMaps]:
        """Return the prediction and each block's maps, which are its weights on one pixel: ``[n, b, 1, 1]``."""
        rows = latents.shape[0]
        maps = tuple(jnp.broadcast_to(row[:, None, None, None], (len(row), rows, 1, 1)) for row in self.weights)
        return self(latents, t, conditioning), maps

    @property
    def sites(self) -> list[str]:
        """Return the blocks' names, in the order of the maps."""
        return [*(stage.name for stage in self.experts.stages), "base"]


jax.tree_util.register_dataclass(MergedUNet, data_fields=["experts", "weights"], meta_fields=["remat"])
