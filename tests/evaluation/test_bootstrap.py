"""Intervals over prompts: against direct resampling, and paired."""

import numpy as np
import pytest

from afa_jax.evaluation.bootstrap import BootstrapEstimate, Resamples, kernel, mean, wins
from afa_jax.evaluation.distances import kernel_distance

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.random((12, 3))
RESAMPLES = Resamples(prompts=12, count=400)


def direct(draws, function):
    """``function`` of the rows that a resample draws, repeated as often as it draws them."""
    return np.array([function(np.repeat(np.arange(12), counts.astype(int))) for counts in draws])


def test_each_resample_draws_as_many_prompts_as_there_are():
    assert RESAMPLES.draws.shape == (400, 12)
    np.testing.assert_array_equal(RESAMPLES.draws.sum(1), 12)
    np.testing.assert_array_equal(RESAMPLES.draws, Resamples(prompts=12, count=400).draws)


def test_a_mean_and_its_interval_are_those_of_the_drawn_rows():
    figure = mean(SCORES, RESAMPLES)
    assert figure.value == pytest.approx(SCORES.mean())
    expected = direct(RESAMPLES.draws, lambda rows: SCORES[rows].mean())
    np.testing.assert_allclose(figure.resampled, expected)
    assert figure.interval == pytest.approx(tuple(np.quantile(expected, (0.025, 0.975))))


def test_a_group_takes_its_own_rows_only():
    rows = [1, 4, 7]
    figure = mean(SCORES, RESAMPLES, rows)
    assert figure.value == pytest.approx(SCORES[rows].mean())

    def of_rows(drawn):
        chosen = drawn[np.isin(drawn, rows)]
        return SCORES[chosen].mean() if len(chosen) else np.nan

    expected = direct(RESAMPLES.draws, of_rows)
    np.testing.assert_allclose(figure.resampled, expected)
    assert np.isfinite(figure.interval).all()


def test_of_one_prompt_there_is_no_interval():
    """All its resamples are alike, which says nothing of how far the value is off; so it is with pairs of two."""
    one = mean(SCORES, RESAMPLES, [3])
    assert one.to_json() == dict(value=pytest.approx(SCORES[3].mean()), low=None, high=None)
    assert one.minus(mean(2 * SCORES, RESAMPLES, [3])).to_json()["low"] is None
    features = RANDOM.standard_normal((12, 2, 4))
    assert kernel(features, features[:, :1], RESAMPLES, [3]).to_json() == dict(value=None, low=None, high=None)
    two = kernel(features, features[:, :1], RESAMPLES, [3, 4]).to_json()
    assert two["value"] is not None and two["low"] is two["high"] is None


def test_differences_are_paired():
    better = SCORES + 0.1 + 0.001 * RANDOM.random(SCORES.shape)
    apart = mean(better, RESAMPLES).minus(mean(SCORES, RESAMPLES))
    low, high = apart.interval
    assert 0.1 <= low <= apart.value <= high <= 0.101  # far narrower than either interval
    nothing = mean(SCORES, RESAMPLES).minus(mean(SCORES, RESAMPLES))
    assert nothing.to_json() == dict(value=0, low=0, high=0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = []
    for seed in range(200):
        sample = np.random.default_rng(seed).standard_normal((40, 1))
        low, high = mean(sample, Resamples(prompts=40, count=400, seed=seed)).interval
        covered.append(low <= 0 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_kernel_leaves_out_pairs_of_one_prompt_in_every_resample():
    features, real = RANDOM.standard_normal((12, 2, 6)), RANDOM.standard_normal((12, 3, 6))

    def k(one, two):
        return (one @ two / 6 + 1) ** 3

    def between(one, two, rows, others):
        return np.mean([k(x, y) for i in rows for j in others if i != j for x in one[i] for y in two[j]])

    def distance(rows):
        everyone = np.arange(12)  # real ones are not resampled
        return (
            between(features, features, rows, rows)
            + between(real, real, everyone, everyone)
            - 2 * np.mean([between(features, real, [i], everyone) for i in rows])
        )

    few = Resamples(prompts=12, count=5)
    figure = kernel(features, real, few)
    assert figure.value == pytest.approx(distance(np.arange(12)))
    np.testing.assert_allclose(figure.resampled, direct(few.draws, distance))
    rows = [0, 3, 4, 9]
    assert kernel(features, real, few, rows).value == pytest.approx(
        kernel(features[rows], real[rows], Resamples(prompts=4, count=2)).value
    )


def test_kernel_of_one_distribution_is_nothing_on_average_even_where_prompts_are_matched():
    """Pictures that show their own prompt are near its real picture; that alone makes no method better."""
    values = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        prompts = 2 * random.standard_normal((12, 1, 4))
        one, real = (prompts + 0.1 * random.standard_normal((12, 2, 4)) for _ in range(2))
        values.append(kernel(one, real, Resamples(prompts=12, count=1)).value)
    # The matched pairs alone would make it some -10.
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values)) and np.std(values) < 10


def test_kernel_tends_to_the_kernel_distance_and_grows_with_a_shift():
    same, real = RANDOM.standard_normal((60, 2, 8)), RANDOM.standard_normal((60, 2, 8))
    resamples = Resamples(prompts=60, count=500)
    figure = kernel(same, real, resamples)
    low, high = figure.interval
    assert low < 0.02 and high > -0.02
    assert figure.value == pytest.approx(kernel_distance(same.reshape(-1, 8), real.reshape(-1, 8)).value, abs=0.02)
    assert kernel(same + 0.5, real, resamples).interval[0] > high


def test_wins_count_prompts_by_their_mean():
    one, other = np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([[0, 1.0], [0, 0], [1, 0]])
    assert wins(one, other) == dict(wins=1, losses=1, ties=1)
    assert wins(one, other, higher=False) == dict(wins=1, losses=1, ties=1)
    assert wins(one, one) == dict(wins=0, losses=0, ties=3)


def test_what_is_not_a_number_becomes_none():
    figure = BootstrapEstimate(value=3.0, resampled=np.full(4, np.nan))
    assert figure.to_json() == dict(value=3.0, low=None, high=None)
