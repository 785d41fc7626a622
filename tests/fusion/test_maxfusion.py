"""MaxFusion against the paper's rule in numpy, and what must hold of it whatever the features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.rivals.maxfusion import MaxFusion
from afa_jax.trees import stack, take
from tests import tiny


@jax.jit
def run(fuser, features):
    b = features.shape[1]
    return fuser(features, jnp.zeros((b, 8)), jnp.zeros((b, 5, 8)))


def draw(n, shape=(2, 4, 6, 16), seed=0, common=1.0):
    """Features of N experts of unlike strength that share a part: some pixels correlate, some do not."""
    rng = np.random.default_rng(seed)
    strength = rng.uniform(0, 2, (n, *shape[:3], 1))
    return (common * rng.standard_normal(shape) + strength * rng.standard_normal((n, *shape))).astype(np.float32)


def shares(features):
    """Each expert's variance over the channels as a share of its picture's, ``[n, b, h, w]``."""
    variance = features.astype(np.float64).var(-1, ddof=1)
    return variance / variance.sum((2, 3), keepdims=True)


def test_two_experts_are_fused_by_the_papers_rule():
    features = draw(2)
    share = shares(features)
    fused, maps = run(MaxFusion(), features)
    seen = set()
    for index in np.ndindex(*features.shape[1:4]):
        a, b = (features[(i, *index)] for i in range(2))
        if np.corrcoef(a, b)[0, 1] > 0.7:
            case, expected = "mean", (a + b) / 2
        elif share[(0, *index)] >= share[(1, *index)]:
            case, expected = "first", a
        else:
            case, expected = "second", b
        seen.add(case)
        np.testing.assert_allclose(fused[index], expected, rtol=1e-5, atol=1e-6)
        weights = dict(mean=[0.5, 0.5], first=[1, 0], second=[0, 1])[case]
        np.testing.assert_array_equal(np.asarray(maps)[(slice(None), *index)], weights)
    assert seen == {"mean", "first", "second"}


def test_of_four_the_strongest_is_averaged_with_those_that_agree_with_it():
    features = draw(4)
    share = shares(features)
    fused, maps = run(MaxFusion(threshold=0.6), features)
    sizes = set()
    for index in np.ndindex(*features.shape[1:4]):
        each = features[(slice(None), *index)]
        first = share[(slice(None), *index)].argmax()
        agree = [i for i in range(4) if i == first or np.corrcoef(each[i], each[first])[0, 1] > 0.6]
        sizes.add(len(agree))
        np.testing.assert_allclose(fused[index], each[agree].mean(0), rtol=1e-5, atol=1e-6)
    assert sizes == {1, 2, 3, 4}
    np.testing.assert_allclose(maps.sum(0), 1, rtol=1e-6)
    assert maps.dtype == jnp.float32


def test_the_order_of_the_experts_and_the_scale_of_one_do_not_matter():
    """Their scale matters to the mean alone: strength is relative, correlation has none."""
    features = draw(3)
    fused, maps = run(MaxFusion(), features)
    order = np.asarray([2, 0, 1])
    again, moved = run(MaxFusion(), features[order])
    np.testing.assert_array_equal(moved, maps[order])
    np.testing.assert_allclose(again, fused, rtol=1e-5, atol=1e-6)
    scaled = features.copy()
    scaled[0] *= 4
    np.testing.assert_array_equal(run(MaxFusion(), scaled)[1], maps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_equal_experts_give_that_expert(n, dtype):
    one = jnp.asarray(draw(1), dtype)
    fused, maps = run(MaxFusion(), jnp.repeat(one, n, axis=0))
    assert fused.dtype == dtype
    np.testing.assert_array_equal(maps, np.float32(1 / n))
    np.testing.assert_allclose(fused.astype(jnp.float32), one[0].astype(jnp.float32), rtol=1e-2 if n > 1 else 0)


def test_a_feature_without_variance_gives_way():
    features = draw(3)
    features[1] = 5  # nothing but a constant, everywhere
    features[2] = 0
    fused, maps = run(MaxFusion(), features)
    np.testing.assert_array_equal(maps[0], 1)
    np.testing.assert_allclose(fused, features[0], rtol=1e-6)
    fused, maps = run(MaxFusion(), np.stack([features[2], features[2]]))
    np.testing.assert_array_equal(fused, 0)
    np.testing.assert_array_equal(maps[0], 1)


def test_a_picture_does_not_depend_on_its_batch_mates():
    features = draw(3)
    features[:, 1] *= 100
    together = run(MaxFusion(), features)[0]
    for b in range(2):
        alone = run(MaxFusion(), features[:, b : b + 1])[0]
        np.testing.assert_allclose(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_inside_an_ensemble_every_stage_is_fused_and_the_predictions_may_be_averaged():
    experts = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(3)])
    last = len(experts.stages) - 1
    ensemble = FusedUNets(experts=experts, aggregators=MaxFusion(averaged=(last,)))
    prediction, maps = jax.jit(lambda ensemble, *a: ensemble.with_maps(*a))(ensemble, *tiny.inputs(2, 3))
    assert prediction.dtype == jnp.float32
    assert len(maps) == last + 1
    for site in maps:
        np.testing.assert_allclose(site.sum(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(maps[-1], np.float32(1 / 3))
    assert all(site.max() == 1 for site in maps[:-1])  # unlike experts are not averaged everywhere


def test_copies_of_one_model_give_that_model_in_bfloat16():
    one = tiny.unet(5, tiny.MICRO_UNET)
    one.dtype = jnp.bfloat16
    latents, t, states = tiny.inputs(2, 1)
    alone = jax.jit(lambda net, *a: net(*a))(one, latents, t, take(states, 0))
    ensemble = FusedUNets(experts=stack([one] * 3), aggregators=MaxFusion(), remat="fused")
    fused = jax.jit(lambda ensemble, *a: ensemble(*a))(ensemble, latents, t, tiny.copies(states, 3))
    np.testing.assert_allclose(fused, alone, atol=0.03 * float(jnp.abs(alone).max()))
