"""Guidance in a part of the path: the steps outside are conditional predictions alone, and cost half."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.config.files import load_config
from afa_jax.config.method_options import check_entry
from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import image_noise
from afa_jax.errors import InputError
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions, guided_timesteps
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import to_pixels
from afa_jax.sampling.generation import Request, generate
from afa_jax.trees import take

OPTIONS = SampleOptions(size=(32, 64), steps=4, guidance=4.0, batch=1)


@pytest.fixture(scope="module")
def method(root):
    return make_method(dict(kind="expert", expert="a"), Models(load_config(f"{root}/config.py")))


def test_outside_the_part_steps_are_conditional_ones(method):

    options = dataclasses.replace(OPTIONS, guidance_interval=(0.25, 0.75))
    (picture,) = generate([Request(prompt="octopus")], method.denoiser, method.experts, seed=3, options=options)
    experts, sampler = method.experts, DDIM(schedule=method.experts.schedule)
    conditional, unconditional = (
        encode_prompts(experts.text_encoder, jnp.asarray(experts.tokenizer([text]))) for text in ("octopus", "")
    )
    factor = experts.vae.config.factor
    shape = (32 // factor, 64 // factor, experts.vae.config.latent_channels)
    x = image_noise(jax.random.key(np.uint32(3)), jnp.zeros(1, int), shape)
    constants = sampler.constants(4)
    for step in range(4):
        k = take(constants, step)
        scale = 4.0 if step in (1, 2) else 1
        prediction = guided(method.denoiser, conditional, unconditional, scale)(x, k.t[None])
        x, _ = sampler.step(k, x, prediction, (), None)
    wanted = np.asarray(to_pixels(experts.vae.decode(x))[0], int)
    assert np.abs(picture.pixels.astype(int) - wanted).max() <= 1
    (whole,) = generate([Request(prompt="octopus")], method.denoiser, method.experts, seed=3, options=OPTIONS)
    assert np.abs(picture.pixels.astype(int) - whole.pixels).max() > 3
    assert method.evaluations(options) == 6 and method.evaluations(OPTIONS) == 8


def test_a_method_may_have_its_own_and_what_is_no_part_is_named():
    entry = check_entry(dict(kind="expert", expert="a", guidance_interval=[0, 0.5]))
    assert entry["guidance_interval"] == (0.0, 0.5)
    for wrong in ([0.5, 0.5], [0.6, 0.2], [-0.1, 1], [0, 1.1], 0.5, "all", [0, float("nan")]):
        with pytest.raises(InputError, match="guidance_interval"):
            check_entry(dict(kind="expert", expert="a", guidance_interval=wrong))


def test_the_part_in_timesteps():
    t = np.arange(9, -1, -1)
    np.testing.assert_array_equal(guided_timesteps(t, (0.0, 1.0)), (9, 0))
    np.testing.assert_array_equal(guided_timesteps(t, (0.2, 0.5)), (7, 5))
    first, last = guided_timesteps(t[:1], (0.5, 0.6))  # no evaluation lies in it
    assert not [value for value in t if last <= value <= first]
