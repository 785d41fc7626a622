"""The autoencoder against PyTorch diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.models.vae import VAE
from tests import tiny
from tests.models.goldens import assert_close, deviation, given, jit, record, reference, vae

# float32 rounding is 7e-6, in the faint decoder 1.4e-5; a wrong epsilon costs 4e-5 and 0.1.
WITHIN = {"vae_sd": 2e-5, "vae_f4": 2e-5, "vae_sd_faint": 1e-4}
CASES = [(case, which) for case in WITHIN for which in record(case)["inputs"]]


@jit
def both_ways(vae: VAE, images: jax.Array, latents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return *vae.moments(images), vae.decode(latents)


@pytest.mark.parametrize(("case", "which"), CASES)
def test_moments_and_pictures_equal_pytorch(case, which):
    spec, golden, model = record(case)["inputs"][which], reference(case), vae(case)
    assert model.config.factor == record(case)["factor"]
    # The golden's latents are those that the decoder sees, ours are scaled.
    scaled = given(spec["latents"]) * model.config.scaling_factor
    names = ("mean", "logvar", "decoded")
    answers = zip(names, both_ways(model, given(spec["image"]), scaled), strict=True)
    assert_close(WITHIN[case], {name: (answer, golden[f"{which}.{name}"]) for name, answer in answers})


@pytest.fixture(scope="module")
def pictures():
    return jnp.sin(jnp.arange(2 * 8 * 12 * 3, dtype=jnp.float32)).reshape(2, 8, 12, 3)


def test_encode_is_the_scaled_mean_or_a_sample(pictures):
    key = jax.random.key(3)
    mean, logvar, fixed, drawn = jit(lambda vae, x: (*vae.moments(x), vae.encode(x), vae.encode(x, key)))(
        tiny.vae(0), pictures
    )
    scale = tiny.VAE_CONFIG.scaling_factor
    assert deviation(fixed, mean * scale) < 1e-6
    noise = jax.random.normal(key, mean.shape)
    assert deviation(drawn, scale * (mean + jnp.exp(logvar / 2) * noise)) < 1e-6


def test_bfloat16_computes_what_float32_does(pictures):
    exact, half = tiny.vae(0), tiny.vae(0)
    half.dtype = jnp.bfloat16
    latents = pictures[:, :2, :3, [0, 1, 2, 0]]
    wanted, answers = both_ways(exact, pictures, latents), both_ways(half, pictures, latents)
    for answer, want in zip(answers, wanted, strict=True):
        assert answer.dtype == want.dtype == jnp.float32
        # Of the whole, not of the worst value, which depends on the backend's rounding.
        error = np.asarray(answer - want)
        assert 1e-4 < np.sqrt(np.mean(np.square(error)) / np.mean(np.square(np.asarray(want)))) < 0.05


def test_sizes_that_do_not_divide_are_refused(pictures):
    with pytest.raises(ValueError, match="6x12: both sides must be multiples of 4"):
        jax.eval_shape(tiny.vae(0).moments, pictures[:, :6])
