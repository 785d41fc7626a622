"""AFA's training step: what it may change, what it must not, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import to_images
from afa_jax.training.optimizer import update_average
from afa_jax.training.step import init_state, make_train_step, published
from afa_jax.trees import flatten, shapes_of, stack
from tests import tiny

ROWS = 4
NO_CAPTION = jnp.zeros(16, jnp.int32)


@pytest.fixture(scope="module")
def frozen():
    return dict(
        unet=stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(2)]),
        text_encoder=stack([tiny.text_encoder(seed) for seed in range(2)]),
        vae=tiny.vae(0),
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return dict(
        image=rng.integers(0, 256, (ROWS, 32, 32, 3), np.uint8),
        ids=rng.integers(1, 99, (ROWS, 16)).astype(np.int32),
        position=np.arange(ROWS),
    )


@pytest.fixture(scope="module")
def aggregators():
    """As after some training: conv_out is not zero, so that every weight gets a gradient."""
    return tiny.trained(2, tiny.MICRO_UNET, tiny.PLAIN_SABW, 7)


SGD = optax.sgd(1.0)
"""With a rate of one: what the parameters lose is the gradient."""


def step_of(aggregators, frozen, no_caption=NO_CAPTION, **options):
    step = make_train_step(
        aggregators, frozen, SGD, NoiseSchedule(), caption_dropout=0.5, no_caption=no_caption, **options
    )
    state = init_state(aggregators, SGD, average=bool(options.get("ema")))
    return lambda batch: step(state, batch, flatten(frozen), jax.random.key(3))


@pytest.fixture(scope="module")
def plain_step(aggregators, frozen):
    """Without any option; compiled once."""
    return make_train_step(aggregators, frozen, SGD, NoiseSchedule(), caption_dropout=0.5, no_caption=NO_CAPTION)


@pytest.fixture(scope="module")
def plain(plain_step, aggregators, frozen, batch):
    """State and metrics after a step."""
    return plain_step(init_state(aggregators, SGD), batch, flatten(frozen), jax.random.key(3))


def assert_same(one, other):
    for name, array in one[0]["params"].items():
        np.testing.assert_allclose(array, other[0]["params"][name], atol=2e-5, rtol=1e-4, err_msg=name)
    for name, value in one[1].items():
        np.testing.assert_allclose(value, other[1][name], rtol=1e-4, err_msg=name)


def test_a_step_changes_every_site_and_nothing_frozen(plain_step, frozen, batch):
    aggregators = tiny.aggregators(2, tiny.MICRO_UNET, tiny.PLAIN_SABW)
    before = {name: np.array(array) for name, array in flatten(frozen).items()}
    arrays, state = flatten(frozen), init_state(aggregators, SGD)
    assert state["params"].keys() == flatten(aggregators).keys()
    new, metrics = plain_step(state, batch, arrays, jax.random.key(0))
    assert float(metrics["loss"]) > 0 and new["step"] == 1
    # Untrained maps are even.
    np.testing.assert_allclose([metrics["weight_0"], metrics["weight_1"], metrics["entropy"]], [0.5, 0.5, 1], rtol=1e-5)
    changed = {name for name, array in new["params"].items() if (array != state["params"][name]).any()}
    # conv_out starts at zero, so the first gradient reaches nothing before it.
    assert changed == {name for name in state["params"] if "conv_out" in name}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_memory_and_order_change_nothing(aggregators, frozen, batch, plain):
    """Neither what is computed again, nor in how many parts, nor who sits beside whom."""
    again = step_of(aggregators, frozen, remat="stage", accumulate=2)
    assert_same(plain, again({name: rows[[2, 0, 3, 1]] for name, rows in batch.items()}))


def test_parts_must_divide_the_batch(aggregators, frozen, batch):
    with pytest.raises(InputError, match="accumulate=3 does not divide the batch of 4"):
        step_of(aggregators, frozen, accumulate=3)(batch)


def test_a_cached_batch_makes_the_same_step_and_an_average_follows(aggregators, frozen, batch, plain):
    """With the other way to compute again what the gradient needs."""
    mean, std = frozen["vae"].posterior(to_images(jnp.asarray(batch["image"])))
    states = encode_prompts(frozen["text_encoder"], jnp.asarray(np.vstack([batch["ids"], NO_CAPTION]))).text
    cached = dict(mean=mean, std=std, states=jnp.moveaxis(states[:, :-1], 1, 0), position=batch["position"])
    step = step_of(
        aggregators, dict(unet=frozen["unet"]), no_caption=states[:, -1], vae=shapes_of(frozen["vae"]), ema=0.9,
        remat="fused",
    )  # fmt: skip
    state, metrics = step(cached)
    assert_same(plain, (state, metrics))
    assert published(plain[0]) is plain[0]["params"] and published(state) is state["average"]
    expected = update_average(flatten(aggregators), plain[0]["params"], jnp.int32(0), 0.9)
    for name, array in state["average"].items():
        np.testing.assert_allclose(array, expected[name], atol=2e-5, rtol=1e-4, err_msg=name)
