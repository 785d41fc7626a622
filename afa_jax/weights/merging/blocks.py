"""The blocks of a U-Net as Stable Diffusion's tools for merging name them, and weights of experts for each.

``IN00``, ``IN01``, ... are the stages before the middle one, which is ``M00``, and ``OUT00``, ... those after it: of
SD1.5 12, 1 and 12, the 25 cuts at which AFA fuses. conv_in is ``IN00``; norm and convolution at the end belong to the
last ``OUT``, as they do to the last stage. ``BASE`` is the rest: time embedding and text encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from afa_jax.errors import InputError
from afa_jax.weights.merging.options import fractions

BASE = "BASE"


class Preset(NamedTuple):
    """A curve over the depth of a U-Net: 0 at its first block, 1/2 in the middle, 1 at its last."""

    what: str
    weight: Callable[[float], float]


def _from_middle(depth: float) -> float:
    return abs(2 * depth - 1)


def _band(low: float | int, high: float | int) -> Callable[[float], float]:
    """Return a curve: 1 at distances from ``low`` to ``high`` from the middle, both included, else 0."""
    return lambda depth: float(low - 1e-9 <= _from_middle(depth) <= high + 1e-9)


def _cosine(depth: float) -> float:
    return (1 + math.cos(2 * math.pi * depth)) / 2


def _smoothstep(depth: float) -> float:
    return depth * depth * (3 - 2 * depth)


PRESETS: Mapping[str, Preset] = dict(
    FLAT=Preset("one half everywhere", lambda depth: 0.5),
    FLAT_25=Preset("a quarter everywhere", lambda depth: 0.25),
    FLAT_75=Preset("three quarters everywhere", lambda depth: 0.75),
    GRAD_V=Preset("1 at both ends, linearly to 0 in the middle", _from_middle),
    GRAD_A=Preset("0 at both ends, linearly to 1 in the middle", lambda depth: 1 - _from_middle(depth)),
    RISE=Preset("linearly from 0 at the input to 1 at the output", lambda depth: depth),
    FALL=Preset("linearly from 1 at the input to 0 at the output", lambda depth: 1 - depth),
    COSINE=Preset("1 at both ends, 0 in the middle, as a cosine", _cosine),
    R_COSINE=Preset("0 at both ends, 1 in the middle, as a cosine", lambda depth: 1 - _cosine(depth)),
    SMOOTHSTEP=Preset("from 0 at the input to 1 at the output, level at both ends", _smoothstep),
    R_SMOOTHSTEP=Preset(
        "from 1 at the input to 0 at the output, level at both ends", lambda depth: _smoothstep(1 - depth)
    ),
    WRAP=Preset("1 in the outer third of the blocks, else 0", _band(2 / 3, 1.0)),
    RING=Preset("1 half-way between the middle and the ends, else 0", _band(1 / 3, 2 / 3)),
    MID=Preset("1 in the inner half of the blocks, else 0", _band(0.0, 1 / 2)),
    IN=Preset("1 before the middle, else 0", lambda depth: float(depth < 1 / 2)),
    OUT=Preset("1 after the middle, else 0", lambda depth: float(depth > 1 / 2)),
)
"""Curves of block weights, for any number of blocks. Their names are those of existing tools where these have such a
curve."""


def block_names(stages: Sequence[str]) -> dict[str, str]:
    """Return each stage's block by name, in the stages' order, and that of ``time_embedding`` and ``text_encoder``."""
    middle = stages.index("mid_block")
    names = {stage: f"IN{i:02d}" for i, stage in enumerate(stages[:middle])} | {stages[middle]: "M00"}
    names |= {stage: f"OUT{i:02d}" for i, stage in enumerate(stages[middle + 1 :])}
    return names | dict(time_embedding=BASE, text_encoder=BASE)


def parse_blocks(
    weights: Mapping[str, Any],
    experts: Sequence[str],
    stages: Sequence[str],
    *,
    preset: str | None = None,
    of: str | None = None,
) -> dict[str, list[float]]:
    """Return each expert's weight by U-Net stage, ``time_embedding`` and ``text_encoder``, as ``average`` takes it.

    Args:
        weights: by block, the experts' weights by name, which sum to 1: ``{"IN00": {"photo": 0.3, "anime": 0.7}}``.
            They override the preset's. A block without any is the experts' average.
        preset: a curve of PRESETS for all blocks but BASE, which has no depth.
        of: the expert whose weight is the curve; with two experts the second by default. The others share the rest
            equally.

    Raises:
        InputError: no such block, expert or preset; weights that are not finite or do not sum to 1; a preset for more
            than two experts without ``of``.
    """
    names = block_names(stages)
    blocks = list(dict.fromkeys(names.values()))
    if unknown := [block for block in weights if block not in blocks]:
        raise InputError(f"mbw: no block {unknown[0]!r}; this U-Net has {', '.join(blocks)}")
    found = {block: [1 / len(experts)] * len(experts) for block in blocks}
    if preset is not None:
        found |= dict(zip(blocks, _curve(preset, of, experts, len(stages)), strict=False))  # BASE is the last
    elif of is not None:
        raise InputError(f"mbw: of={of} says whose weights a preset's are; give preset=..., of {', '.join(PRESETS)}")
    found |= {block: fractions(own, experts, f"mbw: {block}") for block, own in weights.items()}
    return {stage: found[block] for stage, block in names.items()}


def _curve(preset: str, of: str | None, experts: Sequence[str], count: int) -> list[list[float]]:
    if preset not in PRESETS:
        raise InputError(f"mbw: no preset {preset!r}; there are {', '.join(PRESETS)}")
    if len(experts) < 2:
        raise InputError(f"mbw: preset={preset} is for two experts or more; name them")
    if of is None and len(experts) > 2:
        raise InputError(f"mbw: preset={preset} is the weight of one of {len(experts)} experts; name it, of=...")
    chosen = experts[1] if of is None else of
    if chosen not in experts:
        raise InputError(f"mbw: of={chosen}: no such expert; there are {', '.join(experts)}")
    curve = [PRESETS[preset].weight(block / (count - 1)) for block in range(count)]
    return [[own if name == chosen else (1 - own) / (len(experts) - 1) for name in experts] for own in curve]
