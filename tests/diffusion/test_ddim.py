"""The scanned sampler against diffusers' DDIMScheduler, closed forms, and other batches of the same pictures."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import take
from tests.reference.weights import random_input
from tests.tiny import ddim

GOLDENS = Path(__file__).parent.parent / "goldens"
FACTS = json.loads((GOLDENS / "ddim.json").read_text())
SD15 = NoiseSchedule()


def nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


@pytest.fixture(scope="module")
def trajectories():
    return load_file(GOLDENS / "ddim.safetensors")


@pytest.mark.parametrize("case", FACTS["cases"], ids=lambda case: case["name"])
def test_every_step_equals_diffusers(case, trajectories):
    schedule, steps, eta = NoiseSchedule.from_json(case["config"]), case["steps"], case["eta"]
    expected = np.moveaxis(trajectories[f"{case['name']}.trajectory"], 2, -1)
    spec = FACTS["inputs"]
    outputs, noises = (
        jnp.stack([nhwc(random_input(spec[k]["key"].format(i=i), spec[k]["shape"])) for i in range(steps)])
        for k in ("model_output", "variance_noise")
    )
    x = start = nhwc(random_input(**spec["latents"]))
    sampler = DDIM(schedule=schedule, eta=eta)
    constants = sampler.constants(steps)
    assert constants.t.tolist() == case["timesteps"]
    for i in range(steps):
        x, _ = sampler.step(take(constants, i), x, outputs[i], (), noises[i] if eta else None)
        np.testing.assert_allclose(x, expected[i], rtol=2e-5, atol=2e-5 * np.abs(expected[i]).max())
    at = {int(t): i for i, t in enumerate(constants.t)}
    table = jnp.asarray([at.get(t, 0) for t in range(1000)])
    scanned = jax.jit(
        lambda x: ddim(
            lambda x, t: outputs[table[t[0]]], schedule, x, steps=steps, eta=eta, noise_at=lambda i: noises[i]
        )
    )(start)
    np.testing.assert_allclose(scanned, expected[-1], rtol=2e-5, atol=2e-5 * np.abs(expected[-1]).max())


def test_a_point_is_found_exactly_in_any_number_of_steps():
    """All data at one point: eps is known exactly and x_0 is that point after every step."""
    point = 0.7
    alphas = jnp.asarray(SD15.alphas_cumprod)
    schedule = NoiseSchedule(set_alpha_to_one=True, steps_offset=0)

    def predict(x, t):
        a = alphas[t][:, None, None, None]
        return (x - jnp.sqrt(a) * point) / jnp.sqrt(1 - a)

    for steps in (1, 2, 25):
        x = ddim(predict, schedule, image_noise(jax.random.key(0), jnp.arange(2), (4, 4, 1)), steps=steps)
        np.testing.assert_allclose(x, point, atol=2e-5)


def test_a_standard_gaussian_is_scaled_as_the_closed_form_says():
    """Data N(0, 1): E[eps | x] = sigma x, so each step multiplies x by cos(angle_t - angle_s)."""
    alphas = jnp.asarray(SD15.alphas_cumprod)
    x = image_noise(jax.random.key(1), jnp.arange(1), (8, 8, 1))
    constants = DDIM(schedule=SD15).constants(20)
    angles = np.arctan2(np.asarray(constants.sigma, np.float64), constants.signal)
    next_angles = np.arctan2(np.asarray(constants.next_sigma, np.float64), constants.next_signal)
    sampled = ddim(lambda x, t: jnp.sqrt(1 - alphas[t])[:, None, None, None] * x, SD15, x, steps=20)
    np.testing.assert_allclose(sampled, np.prod(np.cos(angles - next_angles)) * np.asarray(x), rtol=1e-5)
    fine = ddim(lambda x, t: jnp.sqrt(1 - alphas[t])[:, None, None, None] * x, SD15, x, steps=1000)
    np.testing.assert_allclose(fine, x, rtol=2e-3)


def test_noise_depends_on_the_number_alone():
    key = jax.random.key(3)
    seven = image_noise(key, jnp.arange(7), (4, 4, 2))
    four = image_noise(key, jnp.asarray([9, 5, 2, 0]), (4, 4, 2))
    np.testing.assert_array_equal(seven[5], four[1])
    np.testing.assert_array_equal(image_noise(key, jnp.asarray([2]), (4, 4, 2))[0], seven[2])
    assert not np.array_equal(seven[0], seven[1])


def test_strength_leaves_out_the_first_steps():
    full, half = DDIM(schedule=SD15).constants(10), DDIM(schedule=SD15).constants(10, strength=0.5)
    np.testing.assert_array_equal(half.t, full.t[5:])
    np.testing.assert_array_equal(half.next_sigma, full.next_sigma[5:])


def test_guidance_mixes_the_fused_prediction_and_keeps_the_conditional_maps():
    def denoiser(x, t, conditioning):
        states = conditioning.text
        return x * 0 + states.mean((0, 2, 3))[:, None, None, None], (states[:, :, :1, :1],)

    x, t = jnp.zeros((2, 4, 4, 1)), jnp.zeros(2, jnp.int32)
    conditional, unconditional = (Conditioning(text=jnp.full((3, 2, 5, 8), value)) for value in (2.0, 1.0))
    prediction, maps = guided(denoiser, conditional, unconditional, 3.0, has_maps=True)(x, t)
    np.testing.assert_allclose(prediction, 1 + 3 * (2 - 1))
    np.testing.assert_allclose(maps[0], 2)
    assert maps[0].shape == (3, 2, 1, 1)
    alone = guided(lambda *a: denoiser(*a)[0], conditional, unconditional, 1.0)(x, t)
    np.testing.assert_allclose(alone, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "0 sampling steps"),
        (dict(steps=1001), "1001 sampling steps"),
        (dict(steps=5, eta=-0.1), "eta=-0.1"),
        (dict(steps=5, strength=0.0), "strength=0.0"),
    ],
)
def test_options_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ddim(lambda x, t: x, SD15, jnp.zeros((1, 4, 4, 1)), **arguments)


def test_what_is_carried_along_the_path_meets_every_step_in_order():
    seen = ddim(
        lambda x, t, carry: ((jnp.zeros_like(x), carry), carry * 10 + t[0] % 10),
        SD15,
        jnp.zeros((1, 4, 4, 1)),
        steps=3,
        has_aux=True,
        carry=jnp.zeros((), jnp.int32),
    )[1]
    last = [int(t) % 10 for t in SD15.timesteps(3)]
    assert list(map(int, seen)) == [0, last[0], last[0] * 10 + last[1]]
