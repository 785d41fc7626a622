"""NoiseAverage and MagicFusion against numpy, and what must hold of them whatever the experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.diffusion.guidance import Denoiser, PathDenoiser, guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.rivals.blending import MagicFusion, NoiseAverage, saliency
from afa_jax.trees import stack, take
from tests import tiny
from tests.fusion.experts import as_text, echoes

SCHEDULE = NoiseSchedule()

blend = jax.jit(lambda method, *inputs: method.guided(*inputs, ())[0], static_argnums=5)


def minus(conditioning):
    return jax.tree.map(jnp.negative, conditioning)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unets(count, dtype=jnp.float32):
    nets = [tiny.unet(seed, tiny.MICRO_UNET) for seed in range(count)]
    for net in nets:
        net.dtype = dtype
    return nets


def noise_of(kind, x, prediction, t):
    """The noise that a prediction implies: x = signal x_0 + sigma eps, v = signal eps - sigma x_0."""
    alpha = SCHEDULE.alphas_cumprod[t].astype(np.float64)
    signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
    if kind == "epsilon":
        return prediction
    return (x - signal * prediction) / sigma if kind == "sample" else sigma * x + signal * prediction


def smoothed(response):
    """One picture's saliency map from its response ``[h, w, c]``, a pixel and a channel at a time."""
    h, w, channels = response.shape
    total = np.zeros((h, w))
    for channel in range(channels):
        padded = np.zeros((h + 2, w + 2))
        padded[1:-1, 1:-1] = np.abs(response[..., channel])
        pooled = np.asarray([[padded[i : i + 4, j : j + 4].sum() / 16 for j in range(w - 1)] for i in range(h - 1)])
        for i in range(h):
            for j in range(w):
                # Half-pixel centres, and the nearest pixel beyond the border.
                y = np.clip((i + 0.5) * (h - 1) / h - 0.5, 0, h - 2)
                x = np.clip((j + 0.5) * (w - 1) / w - 0.5, 0, w - 2)
                top, left = int(y), int(x)
                bottom, right = min(top + 1, h - 2), min(left + 1, w - 2)
                upper = pooled[top, left] * (1 - (x - left)) + pooled[top, right] * (x - left)
                lower = pooled[bottom, left] * (1 - (x - left)) + pooled[bottom, right] * (x - left)
                total[i, j] += upper * (1 - (y - top)) + lower * (y - top)
    return total / channels


def magic(c, u, scale, k, general, noise):
    """MagicFusion of one batch in numpy; ``noise`` turns predictions into noise."""
    fused = np.empty(c.shape[1:])
    for b in range(c.shape[1]):
        shares = []
        for i in range(len(c)):
            values = np.exp(k[i] * smoothed(scale * (noise(c[i, b], b) - noise(u[general, b], b))))
            shares.append(values / values.sum())
        order = [general, *[i for i in range(len(c)) if i != general]]
        for pixel in np.ndindex(*c.shape[2:4]):
            winner = order[int(np.argmax([shares[i][pixel] for i in order]))]  # the first of equals
            own_c, own_u = c[winner, b][pixel], u[winner, b][pixel]
            fused[b][pixel] = own_u + scale * (own_c - own_u)
    return fused


@pytest.mark.parametrize("size", [(8, 8), (2, 6)])
def test_saliency_is_a_window_mean_of_the_same_size(size):
    response = draw(2, 2, *size, 4)
    expected = [[smoothed(picture) for picture in expert] for expert in response]
    np.testing.assert_allclose(jax.jit(saliency)(response), expected, rtol=1e-5)


def test_the_window_counts_the_zeros_around_the_picture():
    actual = np.asarray(saliency(jnp.ones((1, 1, 8, 8, 4)))[0, 0])
    np.testing.assert_allclose(actual[[0, 0, 4], [0, 4, 4]], [9 / 16, 12 / 16, 1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("general", "k"), [(0, (1.0, 1.0)), (2, (1.0, 3.0, 0.5))])
def test_magicfusion_is_what_numpy_says(kind, general, k):
    n = len(k)
    x, c, u = draw(2, 6, 8, 4), draw(n, 2, 6, 8, 4, seed=1), draw(n, 2, 6, 8, 4, seed=2)
    schedule = dataclasses.replace(SCHEDULE, prediction_type=kind)
    method = MagicFusion(experts=echoes(n), schedule=schedule, general=general, k=jnp.asarray(k))
    actual = blend(method, x, jnp.full(2, 700), as_text(c), as_text(u), 7.5)
    expected = magic(c, u, 7.5, k, general, lambda p, b: noise_of(kind, x[b], p, 700))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    own = u + 7.5 * (c - u)
    for i in range(n):  # each of them paints somewhere
        assert np.isclose(actual, own[i], rtol=1e-4, atol=1e-4).all(-1).any()


@pytest.mark.parametrize("general", [0, 1, 2])
def test_the_general_model_wins_ties(general):
    """The experts answer the prompt alike and differ in their unconditionals: saliency cannot tell them apart."""
    x, u = draw(1, 4, 4, 4), draw(3, 1, 4, 4, 4, seed=1)
    c = np.repeat(draw(1, 1, 4, 4, 4, seed=2), 3, axis=0)
    method = MagicFusion(experts=echoes(3), schedule=SCHEDULE, general=general)
    fused = blend(method, x, jnp.full(1, 900), as_text(c), as_text(u), 5.0)
    np.testing.assert_allclose(fused, (u + 5 * (c - u))[general], rtol=1e-5, atol=1e-5)


def test_pixels_go_to_whom_they_matter_most():
    """Each expert responds in its half of the picture; a stronger response everywhere would not win everywhere."""
    c = np.ones((2, 1, 8, 16, 4), np.float32)
    c[0, :, :, :8] = 3
    c[1, :, :, 8:] = 9
    zero, x = np.zeros_like(c), draw(1, 8, 16, 4)
    fused = np.asarray(blend(MagicFusion(experts=echoes(2), schedule=SCHEDULE), x, jnp.full(1, 900),
                             as_text(c), as_text(zero), 1.0))  # fmt: skip
    np.testing.assert_array_equal(fused[0, 2:-2, :6], 3)
    np.testing.assert_array_equal(fused[0, 2:-2, 10:], 9)


@pytest.mark.parametrize("general_first", [False, True])
def test_outside_its_timesteps_only_the_general_model_runs(general_first):
    x, u, c = draw(1, 4, 4, 4), draw(3, 1, 4, 4, 4, seed=1), draw(3, 1, 4, 4, 4, seed=2)
    alone = (u + 3 * (c - u))[1]
    c[[0, 2]], u[[0, 2]] = np.nan, np.nan  # they show wherever they are looked at
    method = MagicFusion(experts=echoes(3), schedule=SCHEDULE, general=1, general_first=general_first)
    for t in (999, 601, 600, 0):
        fused = blend(method, x, jnp.full(1, t), as_text(c), as_text(u), 3.0)
        if (t > 600) != general_first:
            assert np.isnan(fused).all()
            assert (method.evaluations(t, 3.0), method.evaluations(t, 1.0)) == (6, 6)
        else:
            np.testing.assert_allclose(fused, alone, rtol=1e-5)
            assert (method.evaluations(t, 3.0), method.evaluations(t, 1.0)) == (2, 1)


@pytest.mark.parametrize("n", [1, 3])
def test_equal_experts_give_that_expert(n):
    x, c, u = draw(2, 6, 8, 4), draw(1, 2, 6, 8, 4, seed=1), draw(1, 2, 6, 8, 4, seed=2)
    texts = [as_text(np.repeat(p, n, axis=0)) for p in (c, u)]
    fused = blend(MagicFusion(experts=echoes(n), schedule=SCHEDULE), x, jnp.full(2, 800), *texts, 3.0)
    np.testing.assert_allclose(fused, (u + 3 * (c - u))[0], rtol=1e-5, atol=1e-5)
    average = NoiseAverage(experts=echoes(n), weights=jnp.full(n, 1 / n))
    np.testing.assert_allclose(average(jnp.asarray(x), jnp.full(2, 800), texts[0]), c[0], rtol=1e-5, atol=1e-5)


def test_real_unets_in_bfloat16_run_with_their_own_text():
    """Where every pixel is one expert's, it is that expert's own guided prediction; the rest is the other's."""
    nets = unets(2, jnp.bfloat16)
    x, _, text = tiny.inputs(2, 2)
    t = jnp.full(2, 800)
    one = jax.jit(lambda net, x, t, text: guided(lambda x, t, s: net(x, t, take(s, 0)), text, minus(text), 3.0)(x, t))
    own = np.stack([one(net, x, t, take(text, slice(i, i + 1))) for i, net in enumerate(nets)])
    fused = blend(MagicFusion(experts=stack(nets), schedule=SCHEDULE), x, t, text, minus(text), 3.0)
    assert fused.dtype == jnp.float32
    tolerance = 0.03 * abs(own).max()  # a matter of order: bfloat16 has 8 bits
    distance = abs(np.asarray(fused) - own).max(-1)
    assert (distance.min(0) < tolerance).all()
    for i in range(2):
        assert (distance[i] < tolerance).any()


def test_sampling_fuses_first_and_goes_on_with_the_general_model():
    """Along a DDIM path, a picture after the other as on a CPU; the steps in numpy."""
    x, c, u = draw(2, 6, 8, 4), draw(2, 2, 6, 8, 4, seed=1), draw(2, 2, 6, 8, 4, seed=2)
    method = MagicFusion(experts=echoes(2), schedule=SCHEDULE)
    assert isinstance(method, PathDenoiser)
    assert not isinstance(method, Denoiser)

    def sample(row):
        x, c, u = jax.tree.map(lambda leaf: leaf[None], row)
        c, u = (jax.tree.map(lambda own: jnp.moveaxis(own, 0, 1), whole) for whole in (c, u))
        return tiny.ddim(
            lambda x, t, m: method.guided(x, t, c, u, 3.0, m), SCHEDULE, x, steps=4, carry=method.start(x)
        )[0]

    made = jax.jit(lambda rows: jax.lax.map(sample, rows))(
        (jnp.asarray(x), *(jax.tree.map(lambda own: jnp.moveaxis(own, 1, 0), as_text(one)) for one in (c, u)))
    )
    steps = (751, 501, 251, 1)
    alphas = [*SCHEDULE.alphas_cumprod[list(steps)], SCHEDULE.alphas_cumprod[0]]
    for t, here, there in zip(steps, alphas[:-1], alphas[1:], strict=True):
        alone = (u + 3 * (c - u))[0]
        noise = magic(c, u, 3.0, (1, 1), 0, lambda p, b: p) if t > 600 else alone
        x = np.sqrt(there / here) * (x - np.sqrt(1 - here) * noise) + np.sqrt(1 - there) * noise
    np.testing.assert_allclose(made, x, rtol=1e-4, atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch_mates():
    x, c, u = draw(3, 6, 6, 4), draw(2, 3, 6, 6, 4, seed=1), draw(2, 3, 6, 6, 4, seed=2)
    method = MagicFusion(experts=echoes(2), schedule=SCHEDULE)
    together = blend(method, x, jnp.full(3, 900), as_text(c), as_text(u), 7.5)
    for b in range(3):
        one = slice(b, b + 1)
        alone = blend(method, x[one], jnp.full(1, 900), as_text(c[:, one]), as_text(u[:, one]), 7.5)
        np.testing.assert_allclose(together[one], alone, rtol=1e-5, atol=1e-5)


def test_the_noise_average_is_the_weighted_sum_of_the_experts():
    nets = unets(3)
    x, t, text = tiny.inputs(2, 3)
    one = jax.jit(lambda net, *a: net(*a))
    each = np.stack([one(net, x, t, take(text, i)) for i, net in enumerate(nets)])
    run = jax.jit(lambda method, *a: method(*a))
    for weights in ([0.5, 0.2, 0.3], [1.5, -0.25, -0.25], [0, 1, 0]):
        fused = run(NoiseAverage(experts=stack(nets), weights=jnp.asarray(weights, jnp.float32)), x, t, text)
        expected = np.einsum("n,nbhwc->bhwc", weights, each)
        np.testing.assert_allclose(fused, expected, atol=1e-5 * abs(each).max())


def test_guiding_the_average_is_averaging_the_guided():
    x, c, u = draw(2, 4, 4, 4), draw(3, 2, 4, 4, 4, seed=1), draw(3, 2, 4, 4, 4, seed=2)
    weights = np.asarray([0.5, 0.2, 0.3], np.float32)
    average = NoiseAverage(experts=echoes(3), weights=jnp.asarray(weights))
    actual = guided(average, as_text(c), as_text(u), 7.5)(jnp.asarray(x), jnp.full(2, 10))
    np.testing.assert_allclose(actual, np.einsum("n,nbhwc->bhwc", weights, u + 7.5 * (c - u)), rtol=1e-4, atol=1e-4)


def test_text_states_of_another_number_of_experts_are_an_error():
    x, t, text = tiny.inputs(1, 2)
    with pytest.raises(ValueError, match="text states of 2 experts for a stack of 3"):
        NoiseAverage(experts=echoes(3), weights=jnp.ones(3))(x, t, text)
