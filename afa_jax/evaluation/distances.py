"""Distances between two sets of pictures, by their features.

Kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401) is unbiased: two halves of one set are 0 apart on
average, however small they are. Frechet distance (FID; Heusel et al. 2017, arXiv 1706.08500) is not, and needs
thousands of pictures; it is here because papers report it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kernel_distance(
    one: Float[np.ndarray, "n d"], two: Float[np.ndarray, "m d"], *, subsets: int = 10, seed: int = 0
) -> Estimate:
    """Squared maximum mean discrepancy under the kernel (x . y / d + 1)^3, in float64.

    Args:
        one: features of one set, a row a picture.
        two: features of the other.
        subsets: into how many parts, without overlap, both sets are split to estimate the error.
        seed: another split for another seed.

    Returns:
        The unbiased estimate from all pairs of pictures, which is what the mean over random subsets tends to; and the
        standard error of the mean over the parts. Parts have fewer pairs, so that error is on the safe side.

    Raises:
        ValueError: fewer than two pictures a part.
    """
    if subsets < 2 or min(len(one), len(two)) < 2 * subsets:
        raise ValueError(f"{len(one)} and {len(two)} pictures: {subsets} subsets of at least two each, and two subsets")
    one, two = one.astype(np.float64), two.astype(np.float64)
    random = np.random.default_rng(seed)
    parts = zip(*(np.array_split(random.permutation(rows), subsets) for rows in (one, two)), strict=True)
    values = [_squared_discrepancy(x, y) for x, y in parts]
    return Estimate(_squared_discrepancy(one, two), float(np.std(values, ddof=1) / np.sqrt(subsets)))


def frechet_distance(one: Float[np.ndarray, "n d"], two: Float[np.ndarray, "m d"]) -> float:
    """|mu - mu'|^2 + tr(C + C' - 2 (C C')^1/2) of the means and covariances, in float64.

    Raises:
        ValueError: a set of fewer than two pictures.
    """
    if min(len(one), len(two)) < 2:
        raise ValueError(f"{len(one)} and {len(two)} pictures: a covariance needs two")
    one, two = one.astype(np.float64), two.astype(np.float64)
    roots = [np.linalg.qr((rows - rows.mean(0)) / np.sqrt(len(rows) - 1), mode="r") for rows in (one, two)]
    # With C = A'A and C' = B'B, the trace of (C C')^1/2 is the sum of the singular values of A B'.
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    means = np.square(one.mean(0) - two.mean(0)).sum()
    return float(means + sum(np.square(root).sum() for root in roots) - 2 * shared)


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
