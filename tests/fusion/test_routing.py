"""Other routing than was trained: what it does to maps, and when it does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.errors import InputError
from afa_jax.fusion.afa import FusedUNets, routing_of
from afa_jax.fusion.routing import Permuted, Sharpened, TopK
from afa_jax.mesh.experts import weighted_sum
from afa_jax.trees import stack
from tests import tiny

AGGREGATORS = tiny.trained(3, tiny.MICRO_UNET, tiny.PLAIN_SABW, 7)
RNG = np.random.default_rng(0)
INPUTS = tuple(jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((3, 2, 4, 4, 8), (2, 32), (2, 5, 8)))


@jax.jit
def maps_of(aggregators):
    """The fused feature and the maps of one site."""
    return aggregators.site(2)(*INPUTS)


@pytest.fixture(scope="module")
def plain():
    fused, maps = maps_of(AGGREGATORS)
    assert np.asarray(maps).std(0).max() > 0.1
    return fused, np.asarray(maps)


def test_routing_tells_even_maps_from_hard_ones():
    even, hard = np.full((2, 3, 4, 4), 0.5, np.float32), np.zeros((2, 3, 2, 2), np.float32)
    hard[0, :2], hard[1, 2] = 1, 1
    routing = routing_of((jnp.asarray(even), jnp.asarray(hard)))
    np.testing.assert_allclose(routing["entropy"], [[1, 0]] * 3, atol=1e-6)
    np.testing.assert_allclose(routing["weights"][:, 0], [[0.5, 0.5]] * 3)
    np.testing.assert_allclose(routing["weights"][:, 1], [[1, 0], [1, 0], [0, 1]])


def test_a_temperature_divides_the_logits(plain):
    fused, maps = plain
    same, at_one = maps_of(Sharpened(aggregators=AGGREGATORS, temperature=1))
    np.testing.assert_allclose(at_one, maps, atol=1e-6)
    np.testing.assert_allclose(same, fused, atol=1e-5)
    logits = AGGREGATORS.sites[2].logits(*INPUTS)
    for temperature in (0.25, 3.0):
        _, changed = maps_of(Sharpened(aggregators=AGGREGATORS, temperature=temperature))
        np.testing.assert_allclose(changed, jax.nn.softmax(logits / temperature, 0), atol=1e-5)
    # Weights of zero, as a trained router's can be, stay zero.
    hard = jnp.asarray([1, 0, 0], jnp.float32)[:, None, None, None]
    np.testing.assert_array_equal(Sharpened(aggregators=None, temperature=2).change(hard), hard)


def test_the_k_largest_share_what_the_others_had(plain):
    fused, maps = plain
    same, all_of_them = maps_of(TopK(aggregators=AGGREGATORS, k=3))
    np.testing.assert_allclose(all_of_them, maps, atol=1e-6)
    np.testing.assert_allclose(same, fused, atol=1e-5)
    _, hard = maps_of(TopK(aggregators=AGGREGATORS, k=1))
    np.testing.assert_array_equal(hard, np.moveaxis(np.eye(3)[maps.argmax(0)], -1, 0))
    _, two = maps_of(TopK(aggregators=AGGREGATORS, k=2))
    kept = np.where(maps == maps.min(0), 0, maps)
    np.testing.assert_allclose(two, kept / kept.sum(0), atol=1e-6)
    # Of equal weights exactly k stay.
    even = jnp.full((3, 1, 2, 2), 1 / 3)
    np.testing.assert_allclose(TopK(aggregators=None, k=2).change(even)[:, 0, 0, 0], [0.5, 0.5, 0])


def test_other_experts_get_the_maps(plain):
    fused, maps = plain
    order = (2, 0, 1)
    swapped, permuted = maps_of(Permuted(aggregators=AGGREGATORS, order=order))
    for expert in range(3):
        np.testing.assert_array_equal(permuted[expert], maps[order[expert]])
    np.testing.assert_allclose(swapped, weighted_sum(permuted, INPUTS[0]), atol=1e-6)
    assert np.abs(swapped - fused).max() > 0.1
    sharper = Permuted(aggregators=TopK(aggregators=AGGREGATORS, k=1), order=order)
    np.testing.assert_array_equal(maps_of(sharper)[1], np.moveaxis(np.eye(3)[maps.argmax(0)], -1, 0)[list(order)])


def test_in_an_ensemble_the_same_order_is_the_same_picture_bit_for_bit():
    experts = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(3)])
    run = jax.jit(lambda ensemble, *inputs: ensemble.with_maps(*inputs))
    last = tiny.randomised(
        tiny.aggregators(3, tiny.MICRO_UNET, type(tiny.SABW)(**{**vars(tiny.SABW), "sites": "last"})), 7
    )
    for aggregators, sites in ((AGGREGATORS, 5), (last, 1)):
        plain = run(FusedUNets(experts=experts, aggregators=aggregators), *tiny.inputs(2, 3))
        wrapped = Permuted(aggregators=aggregators, order=(0, 1, 2))
        same = run(FusedUNets(experts=experts, aggregators=wrapped), *tiny.inputs(2, 3))
        for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(plain[1]) == sites


def test_options_that_do_not_fit_are_named():
    for make, message in (
        (lambda: Sharpened(aggregators=None, temperature=0.0), "temperature=0.0; choose more than 0"),
        (lambda: TopK(aggregators=None, k=0), "k=0; choose 1 or more"),
        (lambda: Permuted(aggregators=None, order=(0, 2)), "is not a permutation of 0 to 1"),
        (lambda: maps_of(Permuted(aggregators=AGGREGATORS, order=(1, 0))), "is not one of 3 experts"),
    ):
        with pytest.raises(InputError, match=message):
            make()
