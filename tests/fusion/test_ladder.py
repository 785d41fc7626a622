"""The ladder: what each of its parts does, and that the path's memory is what training said it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afa_jax.diffusion.guidance import Denoiser, PathDenoiser
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.ladder import LadderConfig
from afa_jax.fusion.registry import fusion_config, init_fusion
from afa_jax.models.conditioning import Conditioning
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten, stack
from tests import tiny

SMALL = dict(block_out_channels=[8], heads=2, norm_num_groups=4)
# One level compiles in a fraction of the time; one test has two.
UNETS = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(2)])
SCHEDULE = NoiseSchedule(prediction_type="v_prediction")
LATENTS, T, CONDITIONING = tiny.inputs(3, 2)


def fresh(unets: Any = UNETS, **options: Any) -> Any:
    return init_fusion(fusion_config("ladder", {**SMALL, **options}), unets, 2, 0)


def ensemble(ladder: Any, unets: Any = UNETS) -> Any:
    return ladder.assemble(unets, None, SCHEDULE)[0]


@jax.jit
def predict(ladder: Any, previous: Any) -> Any:
    return ensemble(ladder).predict(LATENTS, T, CONDITIONING, previous)


@pytest.mark.parametrize("part", ["features", "previous", "global_logits", "residual", "gates"])
def test_each_part_is_an_option_that_changes_the_prediction_once_trained(part):
    """Every part starts as the uniform average; a trained one is felt, and is gone without its option."""
    value = not getattr(LadderConfig(), part)
    for ladder in (fresh(), fresh(**{part: value})):
        prediction, maps, each = predict(ladder, jnp.zeros_like(LATENTS))
        np.testing.assert_array_equal(maps, 0.5)
        np.testing.assert_allclose(prediction, each.mean(0), atol=1e-5)
    names = {flag: set(flatten(fresh(**{part: flag}))) for flag in (True, False)}
    assert names[False] <= names[True]
    assert part == "previous" or names[False] < names[True]  # which widens conv_in
    trained = tiny.randomised(fresh(), 1), tiny.randomised(fresh(**{part: value}), 1)
    results = [predict(ladder, jnp.ones_like(LATENTS))[0] for ladder in trained]
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_gates_alone_change_what_the_experts_predict():
    ladder = tiny.randomised(fresh(gates=True), 1)
    _, _, apart = predict(tiny.randomised(fresh(), 1), jnp.zeros_like(LATENTS))
    _, _, mixed = predict(ladder, jnp.zeros_like(LATENTS))
    assert np.abs(apart - mixed).max() > 1e-3
    for rung in ladder.rungs:
        if rung.gate is not None:
            rung.gate.scale[...] = jnp.zeros_like(rung.gate.scale[...])
    _, _, shut = predict(ladder, jnp.zeros_like(LATENTS))
    np.testing.assert_allclose(shut, apart, atol=1e-6)


def test_the_memory_is_the_clean_latents_of_the_unguided_halves():
    """Two steps by hand, each half with its own memory, are the sampler's; without the option there is no memory."""
    unets = stack([tiny.unet(seed) for seed in range(2)])  # two levels
    denoiser = ensemble(tiny.randomised(fresh(unets, block_out_channels=[8, 8]), 1), unets)
    assert all(isinstance(denoiser, protocol) for protocol in (PathDenoiser, Denoiser))
    assert not isinstance(ensemble(fresh(previous=False)), PathDenoiser)
    nothing = Conditioning(text=jnp.zeros_like(CONDITIONING.text))
    step, one, zeros = jax.jit(denoiser.guided_with_maps), jax.jit(denoiser.predict), jnp.zeros_like(LATENTS)
    (guided, maps), memory = step(LATENTS, T, CONDITIONING, nothing, 3.0, denoiser.start(LATENTS))
    (c, wanted, _), (u, _, _) = (one(LATENTS, T, own, zeros) for own in (CONDITIONING, nothing))
    np.testing.assert_allclose(guided, u + 3 * (c - u), atol=1e-4)
    np.testing.assert_allclose(maps[0], wanted, atol=1e-5)
    clean = [SCHEDULE.clean(LATENTS, half, T) for half in (u, c)]
    np.testing.assert_allclose(memory, jnp.concatenate(clean), atol=1e-4)
    (again, _), _ = step(LATENTS, T, CONDITIONING, nothing, 3.0, memory)
    u, c = (one(LATENTS, T, own, before)[0] for own, before in zip((nothing, CONDITIONING), clean, strict=True))
    np.testing.assert_allclose(again, u + 3 * (c - u), atol=1e-4)
    (alone, _), kept = jax.jit(lambda memory: denoiser.guided_with_maps(LATENTS, T, CONDITIONING, nothing, 1, memory))(
        memory
    )
    np.testing.assert_allclose(alone, c, atol=1e-5)
    np.testing.assert_array_equal(kept[:3], memory[:3])


def test_the_penalty_is_the_divergence_from_the_experts_posterior():
    denoiser = ensemble(fresh(pseudo_weight=0.5, pseudo_temperature=0.25, pseudo_rows=4))
    target = jnp.zeros((1, 1, 1, 2))
    predictions = jnp.sqrt(jnp.asarray([1.0, 3.0]))[:, None, None, None, None] * jnp.ones((2, 1, 1, 1, 2))
    maps = (jnp.asarray([0.5, 0.5])[:, None, None, None],)
    p = np.exp(-np.array([1, 3]) / (0.25 * 2))
    p /= p.sum()
    wanted = 0.5 * (p * np.log(p / 0.5)).sum()
    for position, left in ((0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)):
        penalty = denoiser.penalty(maps, predictions, target, jnp.asarray([position]))
        np.testing.assert_allclose(penalty, [left * wanted], rtol=1e-5)


def test_a_step_reaches_every_parameter_of_every_part():
    ladder, optimizer = tiny.randomised(fresh(residual=True, gates=True), 5), optax.sgd(1.0)
    rng = np.random.default_rng(0)
    frozen = dict(unet=UNETS, text_encoder=stack([tiny.text_encoder(0)] * 2), vae=tiny.vae(0))
    batch: Any = dict(
        image=rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
        ids=rng.integers(1, 99, (4, 16)).astype(np.int32),
        position=np.arange(4),
    )
    step = make_train_step(
        ladder, frozen, optimizer, SCHEDULE, caption_dropout=0.0, no_caption=jnp.zeros(16, jnp.int32)
    )
    state = init_state(ladder, optimizer)
    new, _ = step(state, batch, flatten(frozen), jax.random.key(0))
    assert not [name for name, array in new["params"].items() if (array == state["params"][name]).all()]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (dict(block_out_channels=[8, 8]), "fusion.block_out_channels has 2 levels; choose 1 to 1"),
        (dict(heads=3), "fusion.heads=3"),
        (dict(norm_num_groups=0), "fusion.norm_num_groups=0"),
        (dict(gates=True, features=False), "fusion.gates"),
        (dict(pseudo_weight=-1.0), "fusion.pseudo_weight"),
        (dict(pseudo_temperature=0.0), "fusion.pseudo_temperature"),
    ],
)
def test_options_that_do_not_fit_are_named(options, field):
    with pytest.raises(InputError, match=field.replace("[", r"\[")):
        fresh(**options)
