"""The front end of a training step: the same from pictures as from the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import VAE, to_images
from afa_jax.training.step import latents_and_conditioning, row_keys
from afa_jax.trees import stack
from tests import tiny

ROWS = 8


@pytest.fixture(scope="module")
def frozen():
    return dict(vae=tiny.vae(0), text_encoder=stack([tiny.text_encoder(seed) for seed in range(2)]))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (ROWS, 16, 24, 3), np.uint8)
    return dict(image=image, ids=rng.integers(0, 99, (ROWS, 16)).astype(np.int32))


@pytest.fixture(scope="module")
def cached(frozen, pictures):
    mean, std = jax.jit(lambda vae, x: vae.posterior(to_images(x)))(frozen["vae"], pictures["image"])
    states = jax.jit(encode_prompts)(frozen["text_encoder"], pictures["ids"]).text
    return dict(mean=np.asarray(mean), std=np.asarray(std), states=np.moveaxis(np.asarray(states), 0, 1))


no_ids = np.zeros(16, np.int32)
front_end = jax.jit(latents_and_conditioning, static_argnums=3)


def test_pictures_and_cache_give_the_same(frozen, pictures, cached):
    no_states = encode_prompts(frozen["text_encoder"], jnp.asarray(no_ids)[None]).text[:, 0]
    keys = row_keys(jax.random.key(5), np.arange(ROWS))
    direct = jax.tree.leaves(front_end(frozen, pictures, keys, 0.5, no_ids))
    from_cache = jax.tree.leaves(front_end(frozen, cached, keys, 0.5, no_states))
    for one, other in zip(direct, from_cache, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-5)
    # Some captions are dropped and some are not, of both experts alike; latents differ from their means.
    empty = np.isclose(from_cache[1], np.asarray(no_states)[:, None], atol=1e-5).all((2, 3))
    assert (empty[0] == empty[1]).all() and 0 < empty[0].sum() < ROWS
    kept = np.asarray(from_cache[1])[:, ~empty[0]]
    np.testing.assert_array_equal(np.moveaxis(kept, 0, 1), cached["states"][~empty[0]])
    noise = np.asarray(from_cache[0]) / tiny.VAE_CONFIG.scaling_factor - cached["mean"]
    assert 0.8 < (noise / cached["std"]).std() < 1.2


def test_a_row_depends_on_its_position_and_not_on_its_batch(frozen, cached):
    no_states = np.zeros_like(cached["states"][0])
    keys = row_keys(jax.random.key(5), np.arange(ROWS))
    latents, states = jax.tree.leaves(front_end(frozen, cached, keys, 0.5, no_states))
    order = np.array([3, 0, 7])
    some = dict(mean=cached["mean"][order], std=cached["std"][order], states=cached["states"][order])
    again = jax.tree.leaves(front_end(frozen, some, row_keys(jax.random.key(5), order), 0.5, no_states))
    np.testing.assert_array_equal(again[0], latents[order])
    np.testing.assert_array_equal(again[1], states[:, order])
    later = front_end(frozen, cached, row_keys(jax.random.key(5), np.arange(ROWS) + ROWS), 0.5, no_states)
    assert (np.asarray(later[0]) != np.asarray(latents)).mean() > 0.99


def test_a_cached_step_touches_neither_vae_nor_text_encoders(frozen, pictures, cached):
    keys = row_keys(jax.random.key(0), np.arange(ROWS))

    def program(frozen, batch, no_caption):
        made = jax.make_jaxpr(lambda batch: latents_and_conditioning(frozen, batch, keys, 0.1, no_caption))
        return str(made(batch))

    products = ("conv_general_dilated", "dot_general")
    direct = program(frozen, pictures, no_ids)
    assert all(product in direct for product in products)
    shapes = jax.eval_shape(lambda: VAE(tiny.VAE_CONFIG, rngs=nnx.Rngs(0)))  # has no arrays to touch
    indirect = program(dict(vae=shapes), cached, cached["states"][0])
    assert not any(product in indirect for product in products)
