"""Experts along the time axis: each answers for intervals of the noise level, one U-Net a step.

Intervals are of training timesteps and go upwards, from little noise to much: ``edges`` are the timesteps at which an
interval ends and the next one begins, ``order`` says which expert has each, so that interval 0 is ``[0, edges[0])`` and
the last one goes on from ``edges[-1]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa_jax.errors import InputError
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import axis_size, take
from afa_jax.types import Latents, Timesteps

Edges = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeExperts:
    """A Denoiser whose expert depends on the timestep: eps(x, t) = eps_r(t)(x, t).

    Attributes:
        experts: a stack of N U-Nets, or a tuple of N of any architectures (MEME; Lee et al. 2024, arXiv 2306.04990)
            that share latents, noise schedule, prediction type and the width of their text states.
        edges: ascending timesteps, one fewer than intervals.
        order: index of the expert of each interval, from little noise to much; one expert may have several.

    Raises:
        InputError: edges that do not ascend from above 0, or another number of intervals in ``order``.
    """

    experts: Any
    edges: Edges
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(low >= high for low, high in zip((0, *self.edges), self.edges, strict=False)):
            raise InputError(f"edges={self.edges}; choose timesteps that ascend, the first one above 0")
        if len(self.order) != len(self.edges) + 1:
            raise InputError(
                f"order={self.order} for {len(self.edges)} edges; name the expert of each of the "
                f"{len(self.edges) + 1} intervals"
            )
        if min(self.order) < 0:
            raise InputError(f"order={self.order}; experts are counted from 0")

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Predict each row with the expert of its timestep and that expert's text states; float32.

        An expert that no row needs is not run. If all rows have one timestep, as in a sampler, only one U-Net runs.

        Args:
            latents: ``[b, h, w, c]``.
            t: ``[b]``.
            conditioning: of each expert, ``[n, b, ...]``.

        Raises:
            ValueError: the numbers of text states and experts differ, or ``order`` has an index without an expert.
        """
        apart = isinstance(self.experts, tuple)
        count = len(self.experts) if apart else axis_size(self.experts)
        if axis_size(conditioning) != count or max(self.order) >= count:
            raise ValueError(
                f"text states of {axis_size(conditioning)} experts and order={self.order} for {count} experts in time"
            )
        chosen = self.expert_at(t)

        def fill(index: Any, prediction: Latents) -> Latents:
            """Return the prediction with the rows of one expert filled in."""

            def answer() -> Latents:
                # Taken inside the branch: the weights of the others are not even copied.
                unet = self.experts[index] if apart else take(self.experts, index)
                own = unet(latents, t, take(conditioning, index))
                return jnp.where((chosen == index)[:, None, None, None], own, prediction)

            return jax.lax.cond((chosen == index).any(), answer, lambda: prediction)

        prediction = jnp.zeros(latents.shape, jnp.float32)
        if apart:
            for index in range(count):
                prediction = fill(index, prediction)
            return prediction
        # A loop, so that the program holds one U-Net.
        return jax.lax.fori_loop(0, count, fill, prediction)

    def expert_at(self, t: Timesteps) -> Array:
        """Return the index of the expert for each timestep, ``[b]``."""
        return jnp.asarray(self.order)[jnp.searchsorted(jnp.asarray(self.edges, jnp.int32), t, side="right")]

    def evaluations(self, t: Timesteps) -> int:
        """Count the U-Nets that run for these timesteps: one an expert that is needed, so 1 for a sampler's step."""
        return len(np.unique(self.expert_at(t)))


jax.tree_util.register_dataclass(TimeExperts, data_fields=["experts"], meta_fields=["edges", "order"])


def uniform_edges(intervals: int, total: int = 1000) -> Edges:
    """Return edges of intervals of equal length (ERNIE-ViLG 2.0; Feng et al. 2023, arXiv 2210.15257: ten intervals).

    Raises:
        InputError: fewer than 1 interval, or more than timesteps.
    """
    if not 1 <= intervals <= total:
        raise InputError(f"{intervals} intervals; choose 1 to {total}")
    return tuple(round(i * total / intervals) for i in range(1, intervals))


def binary_tree_edges(low: int = 2, high: int = 2, total: int = 1000) -> Edges:
    """Return edges of eDiff-I's three leaves, a base and two ends (Balaji et al. 2022, arXiv 2211.01324, section 4).

    The tree halves the noise levels "by area": each half holds as much of the distribution from which training draws
    its levels. Here that is uniform over the timesteps, so areas are numbers of timesteps. (Theirs is log-normal over
    sigma, with leaves of levels 3 and 9, as its upper tail is long.)
    The tree is split further towards both ends only. Its leaves are that of least noise, that of most, and one for all
    levels between.

    Args:
        low, high: levels of the tree at either end: ``total / 2 ** level`` timesteps.

    Raises:
        InputError: a level below 1, two leaves with nothing between them, or one of less than a timestep.
    """
    edges = (round(total / 2**low), total - round(total / 2**high)) if min(low, high) >= 1 else (0, 0)
    if not 0 < edges[0] < edges[1] < total:
        raise InputError(f"binary tree with leaves of levels {low} and {high}; choose 1 or more, one of them 2 or more")
    return edges


def base_refiner_edges(t: int = 200) -> Edges:
    """Return the edge below which a base hands over to a refiner (200 in SDXL; Podell et al. 2023, arXiv 2307.01952).

    Raises:
        InputError: no timestep is below t.
    """
    if t < 1:
        raise InputError(f"hand-over at t={t}; choose 1 or more")
    return (t,)


def alternating(timesteps: Sequence[int] | np.ndarray, experts: int) -> tuple[Edges, tuple[int, ...]]:
    """Return edges and order of experts that take turns, step by step; the first one begins at the noisiest.

    Args:
        timesteps: what the sampler visits, as ``NoiseSchedule.timesteps`` gives them; each begins an interval, so that
            the expert is a function of the timestep.
        experts: N.
    """
    grid = np.unique(np.asarray(timesteps))
    return tuple(int(t) for t in grid[1:]), tuple(i % experts for i in reversed(range(len(grid))))
