"""Kernel and Frechet distance and inception score against plain computations, and what they are for."""

import numpy as np
import pytest
import scipy.linalg

from afa_jax.evaluation import distances
from afa_jax.evaluation.distances import frechet_distance, inception_score, kernel_distance


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
    estimate = kernel_distance(one, two)
    np.testing.assert_allclose(estimate.value, discrepancy(one, two), rtol=1e-6)
    without_one = [discrepancy(np.delete(one, i, 0), two) for i in range(24)]
    without_two = [discrepancy(one, np.delete(two, i, 0)) for i in range(31)]
    variance = 23 * np.var(without_one) + 30 * np.var(without_two)
    np.testing.assert_allclose(estimate.error, np.sqrt(variance), rtol=1e-6)


def test_kernel_distance_does_not_depend_on_how_much_of_the_kernel_is_in_memory(monkeypatch):
    one, two = sample(24, 0), sample(31, 1, 0.4)
    whole = kernel_distance(one, two)
    monkeypatch.setattr(distances, "_ROWS", 7)
    np.testing.assert_allclose(kernel_distance(one, two), whole, rtol=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_within_its_error_however_few_the_pictures():
    values, errors = np.array([kernel_distance(sample(20, 2 * i), sample(25, 2 * i + 1)) for i in range(200)]).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
    assert values.std() < errors.mean() < 2 * values.std()


def test_error_of_a_kernel_distance_is_its_spread_over_samples():
    values, errors = np.array([kernel_distance(sample(40, 2 * i), sample(40, 2 * i + 1, 1.0)) for i in range(200)]).T
    np.testing.assert_allclose(errors.mean(), values.std(), rtol=0.15)
    assert values.mean() > 3 * errors.mean()


@pytest.mark.parametrize("rows", [(200, 150), (5, 4)])  # covariances of full rank, and not
def test_frechet_distance_is_its_definition(rows):
    one, two = sample(rows[0], 3), sample(rows[1], 4, 0.5) * 1.5
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (one, two)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = np.square(one.mean(0, np.float64) - two.mean(0, np.float64)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root)
    np.testing.assert_allclose(frechet_distance(one, two), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(one, one), 0, atol=1e-9)


def test_inception_score_is_its_definition():
    logits = sample(43, 5, width=7) * 3
    order = np.random.default_rng(0).permutation(43)
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    scores = []
    for part in np.array_split(p[order], 4):
        divergences = [sum(x * np.log(x / m) for x, m in zip(row, part.mean(0), strict=True)) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    np.testing.assert_allclose(inception_score(logits, parts=4), (np.mean(scores), np.std(scores)), rtol=1e-6)


def test_inception_score_is_one_to_the_number_of_classes():
    np.testing.assert_allclose(inception_score(np.tile(sample(1, 0), (40, 1))).value, 1, rtol=1e-12)
    # Sure of its class, each of the six as often as the others; exp(-1000) is 0 in float64.
    sure = np.tile(1000 * np.eye(6, dtype=np.float32), (5, 1))
    np.testing.assert_allclose(inception_score(sure, parts=1), (6, 0), rtol=1e-12)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="2 and 50 pictures"):
        kernel_distance(sample(2, 0), sample(50, 1))
    with pytest.raises(ValueError, match="1 and 50 pictures"):
        frechet_distance(sample(1, 0), sample(50, 1))
    with pytest.raises(ValueError, match="9 pictures: an inception score of 10 parts"):
        inception_score(sample(9, 0))
