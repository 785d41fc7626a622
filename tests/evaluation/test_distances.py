"""Kernel and Frechet distance against plain computations, and what they are for."""

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]

from afa_jax.evaluation.distances import frechet_distance, kernel_distance


def sample(rows: int, seed: int, shift: float = 0.0, width: int = 6) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) + shift).astype(np.float32)


def discrepancy(one: np.ndarray, two: np.ndarray) -> float:
    """The definition, one pair after the other."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows: np.ndarray) -> float:
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in one for y in two]
    return within(one) + within(two) - 2 * sum(across) / len(across)


def test_kernel_distance_is_its_definition():
    one, two = sample(24, 0), sample(31, 1, 0.4)
    np.testing.assert_allclose(kernel_distance(one, two, subsets=4).value, discrepancy(one, two), rtol=1e-6)


def test_kernel_distance_of_one_distribution_is_zero_within_its_error_however_few_the_pictures():
    estimates = [kernel_distance(sample(40, 2 * seed), sample(40, 2 * seed + 1)) for seed in range(30)]
    values = np.array([estimate.value for estimate in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(30)
    # The error is on the safe side, and not by orders of magnitude.
    assert values.std() < np.mean([estimate.error for estimate in estimates]) < 10 * values.std()
    far = kernel_distance(sample(40, 0), sample(40, 1, 1.0))
    assert far.value > 3 * far.error


def test_kernel_distance_depends_on_nothing_but_the_seed():
    one, two = sample(30, 0), sample(30, 1, 0.3)
    assert kernel_distance(one, two) == kernel_distance(one, two)
    assert kernel_distance(one, two).value == kernel_distance(one, two, seed=1).value
    assert kernel_distance(one, two).error != kernel_distance(one, two, seed=1).error


@pytest.mark.parametrize("rows", [(200, 150), (5, 4)])  # covariances of full rank, and not
def test_frechet_distance_is_its_definition(rows):
    one, two = sample(rows[0], 3), sample(rows[1], 4, 0.5) * 1.5
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (one, two)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = np.square(one.mean(0, np.float64) - two.mean(0, np.float64)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root)
    np.testing.assert_allclose(frechet_distance(one, two), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(one, one), 0, atol=1e-9)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="19 and 50 pictures"):
        kernel_distance(sample(19, 0), sample(50, 1))
    with pytest.raises(ValueError, match="subsets"):
        kernel_distance(sample(50, 0), sample(50, 1), subsets=1)
    with pytest.raises(ValueError, match="1 and 50 pictures"):
        frechet_distance(sample(1, 0), sample(50, 1))
