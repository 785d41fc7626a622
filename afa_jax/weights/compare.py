"""The distance between two experts' weights, which finds one model under two names before it is trained on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from afa_jax.weights.opened import Source, check_network, open_checkpoint, unet_blocks
from afa_jax.weights.tensors import check_finite

EXPERT_COMPONENTS = ("unet", "text_encoder")  # the components that each expert has of its own; these are compared
NEAR_IDENTICAL = 2e-3
"""Total relative difference below which two experts are one model stored twice.

Rounding alone makes 2e-4 (float16 against float32) or 1.7e-3 (bfloat16 against either), as the test measures. A
fine-tune that has moved its weights by less than that has nothing of its own to route to.
"""

Kind = Literal["identical", "near-identical", "different"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Relative L2 differences ``||a - b|| / ||(a + b) / 2||`` of two experts: 0 for equal weights, at most about 2.

    Attributes:
        blocks: the difference of each stage of the U-Net by its name, of ``time_embedding`` and of ``text_encoder``.
        total: the difference of all weights.
    """

    blocks: Mapping[str, float]
    total: float

    @property
    def least(self) -> str:
        """Return the block with the smallest difference, the first of several."""
        return min(self.blocks, key=lambda block: self.blocks[block])

    @property
    def most(self) -> str:
        """Return the block with the largest difference, the first of several."""
        return max(self.blocks, key=lambda block: self.blocks[block])

    @property
    def kind(self) -> Kind:
        """Return how far the two differ: not at all, no more than by rounding, or more."""
        if self.total == 0:
            return "identical"
        return "near-identical" if self.total < NEAR_IDENTICAL else "different"


def compare_experts(checkpoints: Mapping[str, Source]) -> Iterator[tuple[tuple[str, str], Difference]]:
    """Yield every pair of experts of one architecture, by name, with their difference.

    Files of whatever dtype are compared in float32, two tensors in memory at a time.

    Raises:
        WeightsError: as load_unet and load_text_encoder; or weights that are not finite.
    """
    weights = {name: expert_blocks(checkpoint) for name, checkpoint in checkpoints.items()}
    for one, other in combinations(checkpoints, 2):
        yield (one, other), difference(weights[one], weights[other])


def difference(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> Difference:
    """Return the difference of two sets of arrays or Tensors by block and name.

    Names and shapes are the same in both. A layer that only one text encoder has is compared with zeros.
    """
    squares = {}
    for block, arrays in one.items():
        apart = size = 0.0
        for name in {**arrays, **other[block]}:
            a, b = (
                np.asarray(own[name], np.float32) if name in own else np.float32(0) for own in (arrays, other[block])
            )
            apart += float(np.square(a - b, dtype=np.float64).sum())
            size += float(np.square((a + b) / 2, dtype=np.float64).sum())
        squares[block] = apart, size
    return Difference(
        blocks={block: _relative(*both) for block, both in squares.items()},
        total=_relative(*map(math.fsum, zip(*squares.values(), strict=True))),
    )


def _relative(apart: float, size: float) -> float:
    if apart == 0:
        return 0.0
    return math.sqrt(apart / size) if size else math.inf


def comparison(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> Difference | None:
    """Return the difference of two experts in the blocks that both have; None if their architectures differ."""
    common = [block for block in one if block in other]
    shapes = [
        {(block, key): tensor.shape for block in common for key, tensor in expert[block].items()}
        for expert in (one, other)
    ]
    stages = [set(expert) - {"text_encoder"} for expert in (one, other)]
    if shapes[0] != shapes[1] or stages[0] != stages[1]:
        return None
    return difference({block: one[block] for block in common}, {block: other[block] for block in common})


def expert_blocks(checkpoint: Source, components: Sequence[str] = EXPERT_COMPONENTS) -> dict[str, dict[str, Any]]:
    """Return an expert's Tensors by block and key; reading one that is not finite raises WeightsError.

    Args:
        components: the U-Net, and the text encoder if it is to be compared.

    Raises:
        WeightsError, ConfigError: as load_unet and load_text_encoder, without reading a tensor.
    """
    checkpoint = open_checkpoint(checkpoint)
    blocks: dict[str, dict[str, Any]] = defaultdict(dict)
    block_of = unet_blocks(checkpoint)
    for component in components:
        check_network(checkpoint, component)
        tensors, what = checkpoint.tensors(component), checkpoint.what(component)
        for key in block_of if component == "unet" else tensors:
            checked = functools.partial(_finite, name=key, what=what)
            blocks[block_of[key] if component == "unet" else component][key] = tensors[key].apply(checked)
    return blocks


def _finite(array: np.ndarray, name: str, what: str) -> np.ndarray:
    check_finite(array, name, what)
    return array
