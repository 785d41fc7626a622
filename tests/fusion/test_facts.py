"""The facts that must hold of an ensemble, whatever the weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from afa_jax.experts.architectures import different_architectures
from afa_jax.fusion.afa import Aggregators, FusedUNets, SABWConfig
from afa_jax.fusion.single import ConstantMaps, SingleExpert
from afa_jax.mesh.experts import Shared, map_experts
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import UNet, size_at
from afa_jax.trees import parameter_count, stack, take
from tests import tiny


@pytest.fixture(scope="module")
def experts() -> UNet:
    return stack([micro(seed) for seed in range(3)])


@pytest.fixture(scope="module")
def trained() -> Aggregators:
    """Aggregators with random weights everywhere: their maps are far from 1/N."""
    return tiny.trained(3, tiny.MICRO_UNET, seed=7)


def micro(seed: int) -> UNet:
    """One level, where the fact does not need features of several sizes."""
    return tiny.unet(seed, tiny.MICRO_UNET)


# Compiled once for each kind of ensemble and size, for all tests.
run = jax.jit(lambda ensemble, *inputs: ensemble.with_maps(*inputs))
run_one = jax.jit(lambda unet, *inputs: unet(*inputs))


def test_untrained_maps_are_exactly_uniform_and_give_the_feature_average(experts):
    inputs = tiny.inputs(3, 3)
    fresh, maps = run(FusedUNets(experts=experts, aggregators=tiny.aggregators(3, tiny.MICRO_UNET)), *inputs)
    for site in maps:
        np.testing.assert_array_equal(site, np.float32(1 / 3))
    uniform, _ = run(FusedUNets(experts=experts, aggregators=ConstantMaps(weights=jnp.full((3,), 1 / 3))), *inputs)
    np.testing.assert_allclose(fresh, uniform, rtol=1e-5, atol=1e-6)


def test_maps_sum_to_one_and_differ_between_pixels_samples_and_experts(experts, trained):
    _, maps = run(FusedUNets(experts=experts, aggregators=trained), *tiny.inputs(3, 3))
    for site in maps:
        np.testing.assert_allclose(site.sum(0), 1, atol=1e-6)
        for axis in range(4):
            assert np.asarray(site).std(axis).max() > 1e-4


@pytest.mark.parametrize(
    ("config", "size", "sabw"),
    [(tiny.MICRO_UNET, (8, 8), tiny.SABW), (tiny.SMALL_UNET, (3, 6), tiny.PLAIN_SABW)],  # 3 rows do not halve
)
def test_copies_of_one_model_give_that_model_whatever_the_aggregators(config, size, sabw):
    one, trained = tiny.unet(5, config), tiny.trained(3, config, sabw, 7)
    latents, t, states = tiny.inputs(3, 1, size)
    alone = run_one(one, latents, t, take(states, 0))
    inputs = (latents, t, tiny.copies(states, 3))
    fused, maps = run(FusedUNets(experts=stack([one] * 3), aggregators=trained), *inputs)
    np.testing.assert_allclose(fused, alone, atol=2e-5 * float(jnp.abs(alone).max()))
    assert [site.shape[2:] for site in maps] == [size_at(size, stage.level) for stage in one.stages]
    if config is not tiny.MICRO_UNET:  # the sizes' other fact; of one level it is below
        mixed = FusedUNets(
            experts=stack([tiny.unet(1, config), one, one]), aggregators=ConstantMaps(weights=jax.nn.one_hot(1, 3))
        )
        np.testing.assert_allclose(run(mixed, *inputs)[0], alone, atol=2e-5 * float(jnp.abs(alone).max()))


def test_an_ensemble_of_one_is_that_one():
    latents, t, states = tiny.inputs(2, 1)
    aggregators = tiny.trained(1, tiny.MICRO_UNET, tiny.PLAIN_SABW, 7)
    ensemble = FusedUNets(experts=stack([micro(5)]), aggregators=aggregators)
    fused, maps = run(ensemble, latents, t, states)
    for site in maps:
        np.testing.assert_array_equal(site, 1)
    alone = run_one(micro(5), latents, t, take(states, 0))
    np.testing.assert_allclose(fused, alone, atol=2e-5 * float(jnp.abs(alone).max()))


def test_one_hot_maps_give_that_experts_own_output(experts):
    latents, t, states = tiny.inputs(3, 3)
    outputs = [run_one(micro(k), latents, t, take(states, k)) for k in range(3)]
    for k, alone in enumerate(outputs):
        inside, _ = run(
            FusedUNets(experts=experts, aggregators=ConstantMaps(weights=jax.nn.one_hot(k, 3))), latents, t, states
        )
        np.testing.assert_allclose(inside, alone, atol=2e-5 * float(jnp.abs(alone).max()))
        single = run_one(SingleExpert(experts=experts, index=k), latents, t, states)
        np.testing.assert_allclose(single, alone, atol=2e-5 * float(jnp.abs(alone).max()))
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 0.1


def test_there_are_25_maps_of_the_sites_sizes():
    experts = stack([tiny.unet(seed, tiny.UNET) for seed in range(2)])
    ensemble = FusedUNets(experts=experts, aggregators=tiny.aggregators(2, tiny.UNET))
    prediction, maps = jax.eval_shape(lambda e, *a: e.with_maps(*a), ensemble, *tiny.inputs(2, 2, (64, 128)))
    assert prediction.shape == (2, 64, 128, 4)
    rows = [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64]
    assert [site.shape for site in maps] == [(2, 2, size, 2 * size) for size in rows]


def test_parameter_counts_of_sd15():
    config = UNetConfig()
    unet = jax.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    stages = list(unet.stages)

    def count(experts: int, **sabw: Any) -> int:
        fresh = jax.eval_shape(lambda: Aggregators(SABWConfig(**sabw), experts, stages, config, rngs=nnx.Rngs(0)))
        return parameter_count(fresh)

    counts = {2: 42_425_344, 3: 45_132_416, 4: 47_839_488, 5: 50_546_560, 6: 53_253_632}
    assert {n: count(n) for n in counts} == counts
    assert count(3, transformer_layers=1) == 32_790_016
    # The 25 conv_in as before, and one trunk instead of 25.
    conv_in = sum(3 * stage.channels * 128 + 128 for stage in stages)
    assert count(3, shared=True) == conv_in + (counts[3] - conv_in) // 25
    assert [stage.channels for stage in stages] == ([320] * 4 + [640] * 3 + [1280] * 12 + [640] * 3 + [320] * 2 + [4])


def test_only_aggregators_learn_and_all_of_them_do(experts):
    """At step 1 every conv_out has a gradient; from step 2 on every other weight has one too."""
    latents, t, states = tiny.inputs(2, 3)
    target = jax.random.normal(jax.random.key(1), latents.shape)

    def loss(aggregators, experts):
        prediction = FusedUNets(experts=experts, aggregators=aggregators)(latents, t, states)
        return jnp.square(prediction - target).mean()

    gradient = jax.jit(jax.grad(loss))
    aggregators = tiny.aggregators(3, tiny.MICRO_UNET)
    first = gradient(aggregators, experts)
    for site in first.sites:
        assert float(jnp.abs(site.conv_out.kernel[...]).max()) > 0
        assert float(optax.tree.norm(site.conv_in)) == 0
    aggregators = optax.apply_updates(
        aggregators, jax.tree.map(lambda g: -0.1 * g / jnp.abs(g).max().clip(1e-9), first)
    )
    second = gradient(aggregators, experts)
    # A key projection's gradient can be tiny but not zero; biases before a softmax over tokens are not used.
    zero = [path for path, g in jax.tree_util.tree_leaves_with_path(second) if float(jnp.abs(g).max()) == 0]
    assert not zero


def test_a_shared_trunk_keeps_the_facts():
    """Uniform untrained, whatever model its copies are, every parameter learns, and sites differ."""
    config = dataclasses.replace(tiny.PLAIN_SABW, shared=True)
    aggregators = tiny.aggregators(3, tiny.MICRO_UNET, config)
    own = tiny.aggregators(3, tiny.MICRO_UNET, tiny.PLAIN_SABW)
    trunk = parameter_count(own.sites[0]) - parameter_count(own.sites[0].conv_in)
    assert parameter_count(aggregators) == parameter_count(own) - 4 * trunk
    latents, t, states = tiny.inputs(2, 3)

    @jax.jit
    def gradient(aggregators, experts, states):
        def loss(aggregators):
            prediction, maps = FusedUNets(experts=experts, aggregators=aggregators).with_maps(latents, t, states)
            return jnp.square(prediction).mean(), (prediction, maps)

        return jax.grad(loss, has_aux=True)(aggregators)

    experts = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(3)])
    _, (_, maps) = gradient(aggregators, experts, states)
    for site in maps:
        np.testing.assert_array_equal(site, np.float32(1 / 3))
    trained = tiny.randomised(aggregators, 7)
    learns, (_, maps) = gradient(trained, experts, states)
    assert not [path for path, g in jax.tree_util.tree_leaves_with_path(learns) if float(jnp.abs(g).max()) == 0]
    assert np.abs(maps[1] - maps[2]).max() > 0.01 and maps[1].shape == maps[2].shape
    one = tiny.unet(5, tiny.MICRO_UNET)
    alone = run_one(one, latents, t, take(states, 0))
    _, (fused, _) = gradient(trained, stack([one] * 3), tiny.copies(states, 3))
    np.testing.assert_allclose(fused, alone, atol=2e-5 * float(jnp.abs(alone).max()))


def test_map_experts_means_vmap():
    unets = stack([micro(seed) for seed in range(2)])
    latents, t, states = tiny.inputs(2, 2)
    expected = jax.jit(jax.vmap(lambda m, s: m(latents, t, s)))(unets, states)
    actual = jax.jit(lambda *own: map_experts(lambda m, s, x, t: m(x, t, s), *own, Shared(latents), Shared(t)))(
        unets, states
    )
    np.testing.assert_allclose(actual, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("option", "leaf"),
    [
        (dict(use_time=False), "time_emb_proj"),
        (dict(use_text=False, transformer_layers=1), "attn2"),
        (dict(hidden=16, heads=4, transformer_layers=2), None),
        (dict(per_pixel=False), None),
        (dict(sites="last"), None),
    ],
)
def test_options_for_studies(experts, option, leaf):
    config = SABWConfig(**{**dict(hidden=8, transformer_layers=0, heads=2, norm_num_groups=4), **option})
    aggregators = tiny.trained(3, tiny.MICRO_UNET, config, 3)
    inputs = tiny.inputs(3, 3)
    output, maps = run(FusedUNets(experts=experts, aggregators=aggregators), *inputs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(aggregators)]
    if leaf:
        assert not any(leaf in path for path in paths)
    for site in maps:
        np.testing.assert_allclose(site.sum(0), 1, atol=1e-6)
        assert np.asarray(site).std(0).max() > 1e-4
    if option.get("per_pixel") is False:
        for site in maps:
            np.testing.assert_array_equal(site, np.broadcast_to(np.asarray(site)[:, :, :1, :1], site.shape))
    if option.get("sites") == "last":
        # The experts run apart: the output is their own predictions, mixed by one map.
        assert len(maps) == 1
        latents, t, states = inputs
        own = jnp.stack([run_one(micro(k), latents, t, take(states, k)) for k in range(3)])
        expected = (maps[0][..., None] * own).sum(0)
        np.testing.assert_allclose(output, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    if option == dict(use_time=False):
        site = aggregators.sites[0]
        features = jnp.ones((3, 1, 4, 4, 8))
        text = jnp.ones((1, 5, 8))
        np.testing.assert_array_equal(
            site.logits(features, jnp.zeros((1, 32)), text), site.logits(features, jnp.ones((1, 32)), text)
        )


def test_experts_that_do_not_fit_are_named():
    wider = dataclasses.replace(tiny.SMALL_UNET, cross_attention_dim=16)
    [(name, message)] = different_architectures([tiny.SMALL_UNET, wider], ["a", "b"])
    assert name == "b" and "'a' and 'b'" in message and "cross_attention_dim is 8 and 16" in message
    # The same network, said in another way.
    same = dataclasses.replace(tiny.SMALL_UNET, attention_head_dim=(2, 2), upcast_attention=True)
    assert not [*different_architectures([tiny.SMALL_UNET, same], ["a", "b"])]
    ensemble = FusedUNets(experts=stack([tiny.unet(0)] * 2), aggregators=ConstantMaps(weights=jnp.ones(2) / 2))
    with pytest.raises(ValueError, match="text states of 3 experts for an ensemble of 2"):
        ensemble(*tiny.inputs(1, 3))
