"""The routing gain: its definition, what it must be where the answer is known, and the errors it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.evaluation.screen import GainEstimate, RoutingGain, route, routing_gain, worth_training
from afa_jax.evaluation.screen_report import log_gain, log_mismatches, log_weights
from afa_jax.experts.checks import Mismatch
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.single import SingleExpert
from afa_jax.logs import printed
from afa_jax.models.conditioning import encode_prompts
from afa_jax.training.noise_error import bucket_timesteps, expert_errors
from afa_jax.trees import stack
from afa_jax.weights.compare import Difference
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.commands.conftest import TOKENIZER

SHAPE = (24, 3, 4, 32)  # pictures, buckets, draws, elements


def squares(scale: np.ndarray, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Squared normal errors, independent everywhere, times a mean for each expert and whatever broadcasts."""
    noise = np.random.default_rng(seed).standard_normal((len(scale), *shape))
    return (np.square(noise) * scale).astype(np.float32)


def halves(good: float, bad: float) -> np.ndarray:
    """Mean errors of two experts, each good on its half of the elements, ``[2, 1, 1, 1, elements]``."""
    left = np.arange(SHAPE[-1]) < SHAPE[-1] // 2
    return np.stack([np.where(left, good, bad), np.where(left, bad, good)])[:, None, None, None]


def gain_of(errors: np.ndarray, **options: int) -> RoutingGain:
    return routing_gain([route(errors)], **options)


def test_it_is_its_definition_one_element_after_the_other():
    errors = squares(np.ones((3, 1, 1, 1, 1)), shape=(5, 2, 3, 4))
    n, b, k, d, x = errors.shape
    routed = np.zeros((b, k))
    chosen = np.zeros((n, b, k))
    for i, t, draw, element in np.ndindex(b, k, d, x):
        others = [sum(errors[e, i, t, o, element] for o in range(d) if o != draw) / (d - 1) for e in range(n)]
        winner = others.index(min(others))
        chosen[winner, i, t] += 1 / (d * x)
        routed[i, t] += errors[winner, i, t, draw, element] / (d * x)
    found = route(errors)
    np.testing.assert_allclose(found.routed, routed, rtol=1e-6)
    np.testing.assert_allclose(found.share, chosen, rtol=1e-6)
    np.testing.assert_allclose(found.single, errors.mean((3, 4)), rtol=1e-6)
    best = min(errors[e].mean() for e in range(n))
    assert gain_of(errors).total.gain == pytest.approx(1 - routed.mean() / best, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_experts_gain_nothing_to_the_last_bit(count):
    errors = np.repeat(squares(np.ones((1, 1, 1, 1, 1))), count, axis=0)
    gain = gain_of(errors)
    assert gain.total == GainEstimate(0, 0, 0) and set(gain.buckets) == {GainEstimate(0, 0, 0)}
    np.testing.assert_allclose(gain.share, 1 / count)
    assert worth_training(gain.total) == "no"


def test_experts_that_are_good_on_one_half_each_gain_what_the_halves_say():
    errors = np.broadcast_to(halves(1, 3), (2, *SHAPE)).astype(np.float32)
    gain = gain_of(errors)
    assert gain.total == pytest.approx((0.5, 0.5, 0.5))
    np.testing.assert_allclose(gain.share, 0.5)
    # With random errors choices go wrong, less often with more draws, and the halves' gain is the limit.
    gains = [gain_of(squares(halves(1, 3), shape=(24, 3, draws, 32))).total for draws in (2, 4, 16)]
    assert 0.1 < gains[0].gain < gains[1].gain < gains[2].gain < 0.5
    assert gains[2].gain > 0.45
    assert all(worth_training(gain) == "yes" for gain in gains)


def test_chance_is_no_gain():
    """Errors that differ by chance alone: choosing by the draw that is measured would claim more than half."""
    errors = squares(np.ones((3, 1, 1, 1, 1)), shape=(64, 3, 4, 64))
    claimed = 1 - errors.min(0).mean() / errors.mean((1, 2, 3, 4)).min()
    assert claimed > 0.5
    gain = gain_of(errors)
    assert gain.total.low < 0.005 and abs(gain.total.gain) < 0.02
    gains = [gain_of(squares(np.ones((3, 1, 1, 1, 1)), seed, (16, 2, 4, 16))).total.gain for seed in range(40)]
    assert np.mean(gains) < 0  # the best single expert is chosen with hindsight, the routes are not


def test_a_large_gain_does_not_promise_that_a_router_can_learn_it():
    """Experts alike but for errors that stay the same for a picture: only those errors tell who is right."""
    errors = squares(np.ones((2, 1, 1, 1, 1)), shape=(64, 3, 1, 64)).repeat(4, axis=3)
    gain = gain_of(errors)
    assert gain.total.low > 0.3
    # The choices are the pictures' own: with those of other pictures the same experts have none.
    others = np.roll(errors, 1, axis=1)
    routed = np.take_along_axis(errors, others.argmin(0)[None], 0).mean()
    assert 1 - routed / errors.mean((1, 2, 3, 4)).min() < 0.02


def test_an_expert_that_is_better_everywhere_leaves_nothing_to_gain():
    errors = squares(np.ones((1, 1, 1, 1, 1)))
    gain = gain_of(np.concatenate([errors + 0.5, errors, errors * 2 + 1]))
    assert gain.best == 1
    assert gain.total == GainEstimate(0, 0, 0)
    np.testing.assert_array_equal(gain.share.mean(1), [0, 1, 0])


def test_the_best_single_expert_is_chosen_once_and_not_for_each_picture():
    """Each expert is the better one on its half of the pictures: routing by picture gains, no single expert does."""
    errors = np.ones((2, *SHAPE), np.float32)
    errors[0, ::2] = errors[1, 1::2] = 3
    assert gain_of(errors).total.gain == pytest.approx(0.5)


def test_the_order_of_the_experts_and_the_parts_do_not_matter():
    errors = squares(np.array([1, 1.1, 0.9]).reshape(3, 1, 1, 1, 1) * np.linspace(0.5, 2, 32))
    whole, turned = gain_of(errors), gain_of(errors[[2, 0, 1]])
    assert whole.best == 2 and turned.best == 0
    np.testing.assert_allclose(turned.share, whole.share[[2, 0, 1]])
    parts = routing_gain(route(errors[:, first : first + 7]) for first in range(0, SHAPE[0], 7))
    for other in (turned, parts):
        np.testing.assert_allclose([other.total, *other.buckets], [whole.total, *whole.buckets], atol=1e-9)


def test_the_buckets_weighted_by_their_errors_are_the_total():
    scale = np.array([1, 1.2]).reshape(2, 1, 1, 1, 1) * np.array([9, 3, 1]).reshape(1, 1, 3, 1, 1)
    gain = gain_of(squares(scale * np.where(halves(0, 1), 1.0, 0.2)))
    weights = gain.single[gain.best] / gain.single[gain.best].sum()
    assert sum(weights * [bucket.gain for bucket in gain.buckets]) == pytest.approx(gain.total.gain)
    assert gain.routed.mean() == pytest.approx((1 - gain.total.gain) * gain.single[gain.best].mean())


def test_a_factor_of_the_timestep_changes_no_route_and_no_bucket():
    """Errors of v or of the clean latents are those of the noise times such a factor."""
    errors = squares(halves(1, 2) * np.array([1, 1.3]).reshape(2, 1, 1, 1, 1))
    factors = np.random.default_rng(1).uniform(0.1, 10, SHAPE[:2])[:, :, None, None]
    one, other = route(errors), route(errors * factors)
    np.testing.assert_array_equal(one.share, other.share)
    np.testing.assert_allclose(one.routed / one.single, other.routed / other.single)
    by_bucket = factors[:1]  # one timestep for all pictures of a bucket
    np.testing.assert_allclose(gain_of(errors * by_bucket).buckets, gain_of(errors).buckets)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4))
def test_it_never_beats_the_best_choice_at_every_draw(seed, experts, draws):
    rng = np.random.default_rng(seed)
    errors = rng.exponential(size=(experts, 4, 2, draws, 3)) * rng.exponential(size=(experts, 4, 2, 1, 3))
    found = gain_of(errors, resamples=50)
    assert found.total.gain <= 1 - errors.min(0).mean() / errors.mean((1, 2, 3, 4)).min() + 1e-9
    assert found.total.low <= found.total.high
    np.testing.assert_allclose(found.share.sum(0), 1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Pictures differ in how much there is to gain; the truth is that of very many of them."""

    def sample(pictures: int, seed: int) -> np.ndarray:
        gains = np.random.default_rng((1, seed)).uniform(1, 3, (1, pictures, 1, 1, 1))
        return squares(np.concatenate([halves(1, 0), halves(0, 1)], 4) * gains + 1, seed, (pictures, 1, 3, 64))

    truth = gain_of(sample(10_000, 10**6), resamples=10).total.gain
    intervals = [gain_of(sample(32, seed), resamples=300).total for seed in range(150)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.985
    assert intervals[0] == gain_of(sample(32, 0), resamples=300).total  # the same numbers every time


@pytest.mark.parametrize(
    ("low", "high", "answer"), [(0.021, 0.06, "yes"), (-0.01, 0.019, "no"), (0.01, 0.03, "undecided")]
)
def test_the_answer_is_clear_only_if_the_whole_interval_is(low, high, answer):
    assert worth_training(GainEstimate((low + high) / 2, low, high)) == answer


def test_too_little_to_measure_is_refused():
    with pytest.raises(ValueError, match="1 draws of noise"):
        route(squares(np.ones((2, 1, 1, 1, 1)), shape=(4, 1, 1, 4)))
    with pytest.raises(ValueError, match="1 pictures"):
        gain_of(squares(np.ones((2, 1, 1, 1, 1)), shape=(1, 1, 2, 4)))


def test_every_bucket_of_timesteps_is_filled_evenly():
    timesteps = bucket_timesteps(25, 4, 1000, seed=3)
    for bucket, column in enumerate(timesteps.T):
        np.testing.assert_array_equal(np.sort(column), 250 * bucket + 10 * np.arange(25) + 5)
    assert len({tuple(np.argsort(column)) for column in timesteps.T}) == 4
    assert bucket_timesteps(3, 10, 1000, seed=0).max() < 1000


def make_experts(*seeds: int) -> Experts:
    names = tuple(f"{number}" for number in range(len(seeds)))
    return Experts(
        names=names,
        hashes=names,
        vae_hash="",
        unet=stack([tiny.unet(seed) for seed in seeds]),
        text_encoder=stack([tiny.text_encoder(seed) for seed in seeds]),
        vae=tiny.vae(0),
        tokenizer=Tokenizer(TOKENIZER.parent),
        schedule=NoiseSchedule(prediction_type="v_prediction"),
    )


SIZES = dict(buckets=2, draws=2, batch=2)  # the same in all tests: one compilation
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 64, 3)).astype(np.uint8)
CAPTIONS = [f"{subject}, noto style" for subject in ("fox", "pizza", "car", "owl", "key")]


def test_the_errors_are_each_experts_own_in_the_noises_units():
    experts = make_experts(1, 2)
    parts = list(expert_errors(experts, PIXELS, CAPTIONS, seed=7, **SIZES))
    assert [part.shape for part in parts] == [(2, pictures, 2, 2, 8, 16, 4) for pictures in (2, 2, 1)]
    errors = np.concatenate(parts, 1)

    latents, states = jax.jit(lambda x, ids: (experts.vae.encode(x), encode_prompts(experts.text_encoder, ids)))(
        PIXELS.astype(np.float32) / 127.5 - 1, experts.tokenizer(CAPTIONS)
    )
    predict = jax.jit(lambda xt, t, index: SingleExpert(experts=experts.unet, index=index)(xt, t, states))
    timesteps = jnp.asarray(bucket_timesteps(5, 2, 1000, seed=7))
    for bucket, draw in np.ndindex(2, 2):
        keys = [jax.random.key(7)] * 5
        for folded in (range(5), [bucket] * 5, [draw] * 5):
            keys = [jax.random.fold_in(key, number) for key, number in zip(keys, folded, strict=True)]
        noise = jnp.stack([jax.random.normal(key, (8, 16, 4)) for key in keys])
        t = timesteps[:, bucket]
        xt = experts.schedule.add_noise(latents, noise, t)
        for number in range(2):
            expected = jnp.square(experts.schedule.noise(xt, predict(xt, t, number), t) - noise)
            np.testing.assert_allclose(errors[number, :, bucket, draw], expected, rtol=1e-3, atol=1e-4)


def test_copies_of_one_expert_have_no_gain_and_different_ones_have_their_own_errors():
    for seeds, same in (((1, 1), True), ((1, 2), False)):
        parts = list(expert_errors(make_experts(*seeds), PIXELS, CAPTIONS, **SIZES))
        errors = np.concatenate(parts, 1)
        assert np.array_equal(errors[0], errors[1]) is same
        gain = routing_gain([route(part) for part in parts])
        assert (gain.total == GainEstimate(0, 0, 0)) is same


def test_names_of_a_config_draw_nothing_on_the_terminal(capsys):
    names = ["a\x1b[2J", "b\nverdict: train"]
    gain = routing_gain([route(np.random.default_rng(0).random((2, 8, 2, 2, 4)))])
    with printed():
        log_mismatches(names, [Mismatch(names[1], "architecture", f"{names[1]} differs")])
        log_weights({(names[0], names[1]): Difference(total=0.5, blocks={"mid": 0.5})})
        log_gain(names, gain, "")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\nverdict" not in said and "b verdict: train differs" in said
