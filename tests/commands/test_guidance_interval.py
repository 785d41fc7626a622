"""Guidance in a part of the path: the steps outside are conditional predictions alone, and cost half."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.config.files import load_config
from afa_jax.config.method_options import check_entry
from afa_jax.diffusion.guidance import PathDenoiser, guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import image_noise
from afa_jax.errors import InputError
from afa_jax.experts.frozen import load_experts
from afa_jax.fusion.registry import fusion_config, init_fusion
from afa_jax.fusion.rivals.superdiff import SuperDiff
from afa_jax.fusion.sparse import SparseEnsemble, SparseOptions
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions, guided_timesteps
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import to_pixels
from afa_jax.sampling.generation import Request, generate
from afa_jax.trees import take
from tests import tiny

OPTIONS = SampleOptions(size=(32, 64), steps=4, guidance=4.0, batch=1)


@pytest.fixture(scope="module")
def method(root):
    return make_method(dict(kind="expert", expert="a"), Models(load_config(f"{root}/config.py")))


def by_hand(denoiser, experts, scales):
    """The picture of a loop in Python, with a guidance scale for each step."""
    sampler = DDIM(schedule=experts.schedule)
    conditional, unconditional = (
        encode_prompts(experts.text_encoder, jnp.asarray(experts.tokenizer([text]))) for text in ("octopus", "")
    )
    factor = experts.vae.config.factor
    x = image_noise(
        jax.random.key(np.uint32(3)),
        jnp.zeros(1, int),
        (32 // factor, 64 // factor, experts.vae.config.latent_channels),
    )
    constants = sampler.constants(len(scales))
    memory = denoiser.start(x) if isinstance(denoiser, PathDenoiser) else None
    for step, scale in enumerate(scales):
        k = take(constants, step)
        if isinstance(denoiser, PathDenoiser):
            own = jax.jit(denoiser.guided, static_argnums=4)
            prediction, memory = own(x, k.t[None], conditional, unconditional, scale, memory)
        else:
            prediction = guided(denoiser, conditional, unconditional, scale)(x, k.t[None])
        x, _ = sampler.step(k, x, prediction, (), None)
    return np.asarray(to_pixels(experts.vae.decode(x))[0], int)


def sampled(denoiser, experts, options):
    return next(generate([Request(prompt="octopus")], denoiser, experts, seed=3, options=options))


def test_outside_the_part_steps_are_conditional_ones(method):
    options = dataclasses.replace(OPTIONS, guidance_interval=(0.25, 0.75))
    pixels = sampled(method.denoiser, method.experts, options).pixels.astype(int)
    assert np.abs(pixels - by_hand(method.denoiser, method.experts, (1, 4.0, 4.0, 1))).max() <= 1
    assert np.abs(pixels - sampled(method.denoiser, method.experts, OPTIONS).pixels).max() > 3
    assert method.evaluations(options) == 6 and method.evaluations(OPTIONS) == 8


@pytest.mark.parametrize("kind", ["ladder", "sparse", "superdiff"])
def test_so_they_are_of_methods_with_a_memory(kind, root):
    """A half that does not run is not counted either, where the program counts; maps are there all the same."""
    experts = load_experts(load_config(f"{root}/config.py"))
    count = len(experts.names)
    denoiser: Any = SuperDiff(experts=experts.unet, schedule=experts.schedule)
    if kind != "superdiff":
        config = fusion_config("ladder", dict(block_out_channels=[8], heads=2, norm_num_groups=4, features=False))
        ladder = tiny.randomised(init_fusion(config, experts.unet, count, 0), 4)
        denoiser = ladder.assemble(experts.unet, None, experts.schedule)[0]
        if kind == "sparse":
            parts: dict[str, Any] = dict(router=ladder, options=SparseOptions(chunk=1))
            denoiser = SparseEnsemble(experts=experts.unet, schedule=experts.schedule, **parts)
    options = dataclasses.replace(OPTIONS, steps=2, guidance_interval=(0.0, 0.5), maps=kind != "superdiff")
    picture = sampled(denoiser, experts, options)
    assert np.abs(picture.pixels.astype(int) - by_hand(denoiser, experts, (4.0, 1))).max() <= 1
    if kind == "sparse":
        assert picture.work["done"] == 3 * count and picture.work["possible"] == 4 * count
    if kind != "superdiff":
        np.testing.assert_allclose(picture.maps[0].sum(1), 1, atol=1e-5)


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
