"""The cross-noise routing gain: whether there is anything for a router to learn, before one is trained.

Held-out picture i at timestep bucket k gets one timestep and D >= 2 draws of noise. e[n, i, k, d, x] is the squared
error of expert n's noise at element x of the latent. At each (i, k, d, x) the *routed* error is that of the expert with
the least mean error over the D - 1 *other* draws at the same (i, k, x); of several, the first. Then

    gain = 1 - (mean of the routed errors) / min_n (mean of expert n's errors)

with both means over all pictures, buckets, draws and elements: the best single expert is chosen once, in total, not
for each picture. What follows from the definition (each is a test):

* Equal experts: 0 exactly. Experts that are each perfect on their own part of the picture: 1.
* The draw that chooses is never the draw that is measured. Where experts differ by chance alone the routed error is an
  average expert's on average, and the gain is 0 or a little below (the best single expert is chosen with hindsight).
  Choosing by the draw itself would show a large gain there.
* It is at most what the best choice at each draw would give; choices from few draws are uncertain, so the gain grows
  with D. Compare gains of equal D.
* The errors that choose know the picture, and a router does not: it sees the noised latents, the timestep and the
  prompt. Experts that err differently from picture to picture for no visible reason, such as two trainings of one model
  from two seeds, gain here too. So a small gain says that there is nothing to learn, a large one that there may be.
* It is not a bound either: a router may mix experts, and averaging alone lowers errors that are independent.

The errors are in the noise's units whatever the prediction type. Within one timestep that changes errors by a factor
and leaves the gain alone; it sets how much each bucket counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

WORTH_TRAINING = 0.02
"""The least gain worth training for: below it, training was in vain where others repeated the method on Stable
Diffusion 1.5."""

RESAMPLES = 2000

Answer = Literal["yes", "no", "undecided"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The contributions of each picture, by timestep bucket.

    Attributes:
        routed: the mean routed squared error.
        single: the mean squared error of each expert alone.
        share: the share of elements where each expert is chosen; experts that tie get equal parts.
    """

    routed: Float[np.ndarray, "b buckets"]
    single: Float[np.ndarray, "n b buckets"]
    share: Float[np.ndarray, "n b buckets"]


class GainEstimate(NamedTuple):
    """A gain and its 95 % confidence interval."""

    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        gain, low, high = (f"{round(100 * share, 1) + 0.0:.1f}" for share in self)  # + 0.0: no "-0.0"
        return f"gain {gain} %, 95 % interval {low} to {high} %"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingGain:
    """The routing gain, in total and by timestep bucket.

    Attributes:
        total: the gain over all buckets.
        buckets: the gain in each bucket, relative to the expert that is best in total. Their mean, weighted by that
            expert's errors, is the total.
        best: the position of the best single expert.
        routed: the mean routed squared error in each bucket.
        single: the mean squared error of each expert alone, ``[n, buckets]``.
        share: the share of elements where each expert is chosen, ``[n, buckets]``.
    """

    total: GainEstimate
    buckets: tuple[GainEstimate, ...]
    best: int
    routed: Float[np.ndarray, " buckets"]
    single: Float[np.ndarray, "n buckets"]
    share: Float[np.ndarray, "n buckets"]


def route(errors: Float[np.ndarray, "n b buckets draws *element"]) -> Routing:
    """Choose an expert at every element by the other draws' errors.

    Raises:
        ValueError: there are fewer than two draws.
    """
    experts, pictures, buckets, draws = errors.shape[:4]
    if draws < 2:
        raise ValueError(f"{draws} draws of noise: choosing by the other draws needs two")
    errors = errors.reshape(experts, pictures, buckets, draws, -1).astype(np.float64)
    others = errors.sum(3, keepdims=True) - errors
    chosen = others.argmin(0)
    routed = np.take_along_axis(errors, chosen[None], 0)
    # In one array, so that equal errors are summed in the same order and have equal means to the last bit.
    means = np.concatenate([routed, errors]).mean((3, 4))
    least = others == others.min(0)
    return Routing(routed=means[0], single=means[1:], share=(least / least.sum(0)).mean((3, 4)))


def routing_gain(parts: Iterable[Routing], *, seed: int = 0, resamples: int = RESAMPLES) -> RoutingGain:
    """Return the gain over all pictures of the parts, with 95 % bootstrap intervals.

    Pictures are independent; elements and noises of one picture are not. So whole pictures are drawn with replacement,
    ``resamples`` times. The best single expert is chosen anew each time, and the interval lies between the 2.5 and
    97.5 % quantiles of the gains (Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: there are fewer than two pictures.
    """
    parts = list(parts)
    routed = np.concatenate([part.routed for part in parts])
    single, share = (np.concatenate([getattr(part, name) for part in parts], 1) for name in ("single", "share"))
    count = len(routed)
    if count < 2:
        raise ValueError(f"{count} pictures: an interval needs two")
    errors = np.concatenate([routed[None], single])

    def gains(pictures: Float[np.ndarray, "r b"]) -> tuple[Float[np.ndarray, "r columns"], np.ndarray]:
        """Return the total gain and the buckets' gains, and the best expert, for the given counts of the pictures."""
        means = np.einsum("rb,nbk->nrk", pictures, errors) / pictures.sum(1)[:, None]
        best = means[1:].mean(2).argmin(0)
        reference = np.take_along_axis(means[1:], best[None, :, None], 0)[0]
        return 1 - _with_total(means[0]) / _with_total(reference), best

    value, best = gains(np.ones((1, count)))
    random = np.random.default_rng(seed)
    resampled, _ = gains(random.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64))
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    estimates = [GainEstimate(*map(float, row)) for row in zip(value[0], low, high, strict=True)]
    return RoutingGain(
        total=estimates[0],
        buckets=tuple(estimates[1:]),
        best=int(best[0]),
        routed=routed.mean(0),
        single=single.mean(1),
        share=share.mean(1),
    )


def worth_training(estimate: GainEstimate) -> Answer:
    """Return "yes" or "no" if the whole interval of the gain is above or below WORTH_TRAINING, else "undecided"."""
    if estimate.low > WORTH_TRAINING:
        return "yes"
    return "no" if estimate.high < WORTH_TRAINING else "undecided"


def _with_total(means: np.ndarray) -> np.ndarray:
    """Prepend the mean of all buckets, equally weighted, to means by bucket ``[r, buckets]``."""
    return np.concatenate([means.mean(1, keepdims=True), means], 1)
