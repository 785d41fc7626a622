"""Confidence intervals over prompts. All methods share the resamples, so that differences are paired.

A percentile bootstrap draws prompts with replacement, each with all its pictures, which are not independent. If all
resamples are equal, as with a single prompt, there is no interval.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resamples:
    """The number of times that each prompt is drawn in each resample.

    Attributes:
        prompts: the number of prompts.
        count: the number of resamples.
    """

    prompts: int
    count: int = 2000
    seed: int = 0

    @functools.cached_property
    def draws(self) -> Float[np.ndarray, "resamples prompts"]:
        """Return the number of times that each prompt is drawn in each resample."""
        random = np.random.default_rng(self.seed)
        return random.multinomial(self.prompts, np.full(self.prompts, 1 / self.prompts), self.count).astype(np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapEstimate:
    """A measured value and its value in each resample (NaN where a resample has nothing to measure)."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """Return the bounds of the 95 % interval; NaN for both if no resample has a value."""
        values = self.resampled[np.isfinite(self.resampled)]
        if not len(values):
            return float("nan"), float("nan")
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """Return ``value``, ``low`` and ``high``; None for each that is not finite."""
        numbers = dict(zip(("value", "low", "high"), (self.value, *self.interval), strict=True))
        return {name: number if np.isfinite(number) else None for name, number in numbers.items()}

    def minus(self, other: BootstrapEstimate) -> BootstrapEstimate:
        """Return the paired difference to another figure."""
        return BootstrapEstimate(value=self.value - other.value, resampled=self.resampled - other.resampled)


def without_interval(value: float, resamples: Resamples) -> BootstrapEstimate:
    """Return a figure without an interval: its value in every resample is NaN."""
    return BootstrapEstimate(value=float(value), resampled=np.full(resamples.count, np.nan))


def mean(
    scores: Float[np.ndarray, "prompts pictures"], resamples: Resamples, rows: Sequence[int] | None = None
) -> BootstrapEstimate:
    """Return the mean of the pictures' scores over all prompts or some; for one prompt, without an interval."""
    chosen = np.arange(len(scores)) if rows is None else np.asarray(rows)
    own, draws = scores[chosen].mean(1), resamples.draws[:, chosen]
    if len(chosen) < 2:
        return without_interval(own.mean(), resamples)
    with np.errstate(invalid="ignore"):
        return BootstrapEstimate(value=float(own.mean()), resampled=draws @ own / draws.sum(1))


def kernel(
    features: Float[np.ndarray, "prompts pictures d"],
    real: Float[np.ndarray, "prompts real d"],
    resamples: Resamples,
    rows: Sequence[int] | None = None,
) -> BootstrapEstimate:
    """Return the kernel distance (distances.py) of pictures to real ones of the same prompts, over all prompts or some.

    Pairs of the same prompt are left out: within the pictures, within the real ones, and between them, where pictures
    that show the prompt would be closer for that reason alone. So the value is unbiased for independent prompts, and a
    prompt that a resample draws twice is not compared to itself. Real pictures are not resampled. The value is NaN for
    fewer than two prompts. An interval needs three or more: of two prompts, every resample with a value draws both.
    """
    chosen = np.arange(len(features)) if rows is None else np.asarray(rows)
    own, real = features[chosen].astype(np.float64), real[chosen].astype(np.float64)
    count = len(own)
    within, among, across = _kernels(own, own), _kernels(real, real), _kernels(own, real)
    with np.errstate(invalid="ignore", divide="ignore"):
        reals, across_of = among.sum() / np.float64(count * (count - 1)), across.sum(1) / np.float64(count - 1)

    def distance(draws: np.ndarray) -> Any:
        total = draws.sum(-1)
        pairs = total**2 - np.square(draws).sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((draws @ within) * draws).sum(-1) / pairs + reals - 2 * draws @ across_of / total

    value = float(distance(np.ones(count)))
    if count < 3:
        return without_interval(value, resamples)
    return BootstrapEstimate(value=value, resampled=distance(resamples.draws[:, chosen]))


def _kernels(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return the mean kernel of pictures ``[n, k, d]`` and ``[n, l, d]`` for each two prompts; 0 for the same one."""
    count, _, d = one.shape
    other, result = two.reshape(-1, d).T, np.empty((count, count))
    for i, pictures in enumerate(one):  # a prompt at a time: all pairs of 20,000 pictures are 3 GB
        result[i] = ((pictures @ other / d + 1) ** 3).reshape(len(pictures), count, -1).mean((0, 2))
    np.fill_diagonal(result, 0)
    return result


def wins(
    one: Float[np.ndarray, "prompts pictures"], other: Float[np.ndarray, "prompts pictures"], higher: bool = True
) -> dict[str, int]:
    """Count the prompts on which ``one`` is better, worse and equally good, by the mean of a prompt's pictures."""
    apart = (one.mean(1) - other.mean(1)) * (1 if higher else -1)
    better, worse = int((apart > 1e-12).sum()), int((apart < -1e-12).sum())
    return dict(wins=better, losses=worse, ties=len(apart) - better - worse)
