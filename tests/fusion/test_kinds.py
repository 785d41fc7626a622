"""What must hold of everything that is trained to fuse experts: AFA's rivals here, AFA itself in test_facts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.files import load_aggregators, load_fusion, save_fusion
from afa_jax.fusion.registry import FUSIONS, fusion_config, init_fusion, kind_of
from afa_jax.fusion.single import ConstantMaps, SingleExpert
from afa_jax.models.conditioning import encode_prompts
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten, stack, take, unflatten
from afa_jax.weights.tensors import WeightsError, read_tensors
from tests import tiny

RIVALS: dict[str, dict[str, Any]] = dict(
    gate=dict(hidden=8),
    router=dict(block_out_channels=[8], heads=2, norm_num_groups=4),
    ladder=dict(block_out_channels=[8], heads=2, norm_num_groups=4),
    mbw={},
)
SCHEDULE = NoiseSchedule()
UNETS = [tiny.unet(seed, tiny.MICRO_UNET) for seed in range(2)]
TEXT_ENCODERS = [tiny.text_encoder(seed) for seed in range(2)]


def fresh(kind: str, **options: Any) -> Any:
    return init_fusion(fusion_config(kind, {**RIVALS[kind], **options}), stack(UNETS), 2, 0)


def with_experts(*experts: int) -> tuple[Any, Any]:
    return stack([UNETS[i] for i in experts]), stack([TEXT_ENCODERS[i] for i in experts])


def one_hot(kind: str, expert: int) -> Any:
    """A fusion whose logits leave no doubt."""
    fusion, sure = fresh(kind), 1e4 * jax.nn.one_hot(expert, 2)
    if kind == "gate":
        fusion.linear_2.bias[...] = sure
    elif kind == "router":
        for unet, logit in zip(fusion.unets, sure, strict=True):
            unet.stages[-1].conv_out.bias[...] = logit[None]
    elif kind == "ladder":
        fusion.head.logits.bias[...] = sure
    else:
        fusion.logits[...] = jnp.broadcast_to(sure, fusion.logits.shape)
    return fusion


def inputs() -> tuple[Any, Any, Any]:
    latents, t, _ = tiny.inputs(3, 2)
    return latents, t, jnp.asarray(np.random.default_rng(0).integers(1, 99, (3, 16)), jnp.int32)


@jax.jit
def run(fusion: Any, experts: Any, latents: Any, t: Any, ids: Any) -> Any:
    denoiser, text_encoder = fusion.assemble(*experts, SCHEDULE)
    return denoiser.with_maps(latents, t, encode_prompts(text_encoder, ids))


@jax.jit
def run_one(unet: Any, text_encoder: Any, latents: Any, t: Any, ids: Any) -> Any:
    return unet(latents, t, text_encoder.encode(ids))


def alone(expert: int) -> np.ndarray:
    return np.asarray(run_one(UNETS[expert], TEXT_ENCODERS[expert], *inputs()))


def assert_close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(jnp.asarray(other)).max()))


@pytest.mark.parametrize("kind", RIVALS)
def test_untrained_it_is_a_uniform_average(kind):
    prediction, maps = run(fresh(kind), with_experts(0, 1), *inputs())
    for site in maps:
        np.testing.assert_array_equal(site, np.float32(0.5))
    names = fresh(kind).site_names(with_experts(0, 1)[0])
    assert len(maps) == len(names) == dict(gate=5, router=1, ladder=1, mbw=6)[kind]
    if kind in ("router", "ladder"):
        assert_close(prediction, (alone(0) + alone(1)) / 2)
    if kind == "mbw":
        mean = jax.tree.map(lambda a, b: (a + b) / 2, (UNETS[0], TEXT_ENCODERS[0]), (UNETS[1], TEXT_ENCODERS[1]))
        assert_close(prediction, run_one(*mean, *inputs()))
    assert np.abs(prediction - alone(0)).max() > 0.1


def test_what_has_maps_says_where_they_belong():
    unet, text_encoder = with_experts(0, 1)
    config = dict(hidden=8, transformer_layers=1, heads=2, norm_num_groups=4)
    last = init_fusion(fusion_config("afa", dict(config, sites="last")), unet, 2, 0)
    for fusion in (*map(fresh, RIVALS), last):
        assert fusion.assemble(unet, text_encoder, SCHEDULE)[0].sites == fusion.site_names(unet)
    stages = [stage.name for stage in unet.stages]
    assert FusedUNets(experts=unet, aggregators=ConstantMaps(weights=jnp.ones(2) / 2)).sites == stages
    assert not hasattr(SingleExpert(experts=unet, index=0), "sites")


def test_block_weights_can_compute_again_what_their_gradient_needs():
    """The same prediction, and a gradient that keeps less."""
    fusion, experts, (latents, t, ids) = tiny.randomised(fresh("mbw"), 3), with_experts(0, 1), inputs()

    def predict(fusion, remat):
        denoiser, text_encoder = fusion.assemble(*experts, SCHEDULE, remat=remat)
        return denoiser(latents, t, encode_prompts(text_encoder, ids))

    for remat in ("none", "stage", "fused"):
        gradient = jax.make_jaxpr(jax.grad(lambda fusion, remat=remat: predict(fusion, remat).sum()))(fusion)
        assert ("remat" in str(gradient)) == (remat != "none")
    again = jax.jit(predict, static_argnums=1)(fusion, "fused")
    assert_close(again, run(fusion, experts, latents, t, ids)[0])


@pytest.mark.parametrize("kind", RIVALS)
def test_equal_experts_give_that_expert_and_one_hot_logits_theirs(kind):
    trained = tiny.randomised(fresh(kind), 3)
    assert_close(run(trained, with_experts(1, 1), *inputs())[0], alone(1))
    mixed, maps = run(trained, with_experts(0, 1), *inputs())
    for site in maps:
        np.testing.assert_allclose(site.sum(0), 1, atol=1e-6)
        assert np.abs(site - 0.5).max() > 1e-3
    if kind == "gate":  # a weight for the timestep, whatever site and pixel
        for site in maps:
            np.testing.assert_array_equal(site, np.broadcast_to(maps[0][:, :, :1, :1], site.shape))
        assert np.asarray(maps[0]).std(1).max() > 1e-3
    for expert in range(2):
        prediction, _ = run(one_hot(kind, expert), with_experts(0, 1), *inputs())
        assert_close(prediction, alone(expert))
        assert np.abs(mixed - prediction).max() > 0.01


@pytest.mark.parametrize("kind", RIVALS)
def test_a_step_reaches_every_parameter_and_nothing_frozen(kind):
    fusion, optimizer = fresh(kind), optax.adam(1e-2)
    unet, text_encoder = with_experts(0, 1)
    arrays = flatten(dict(unet=unet, text_encoder=text_encoder, vae=tiny.vae(0)))
    before = {name: np.array(array) for name, array in arrays.items()}
    frozen = dict(unet=unet, text_encoder=text_encoder, vae=tiny.vae(0))
    rng = np.random.default_rng(0)
    batch: Any = dict(
        image=rng.integers(0, 256, (2, 32, 32, 3), np.uint8),
        ids=rng.integers(1, 99, (2, 16)).astype(np.int32),
        position=np.arange(2),
    )
    no_caption = jnp.zeros(16, jnp.int32)
    step = make_train_step(fusion, frozen, optimizer, NoiseSchedule(), caption_dropout=0.0, no_caption=no_caption)
    state = init_state(fusion, optimizer)
    new, metrics = step(state, batch, arrays, jax.random.key(0))
    np.testing.assert_allclose([metrics["weight_0"], metrics["weight_1"], metrics["entropy"]], [0.5, 0.5, 1], rtol=1e-5)
    # Zero layers learn first, as in AFA.
    learnt = {name for name, array in new["params"].items() if (array != state["params"][name]).any()}
    zero = dict(gate="linear_2", router="conv_out.conv_out.", ladder=".l", mbw="logits")[kind]
    assert learnt and learnt <= {name for name in state["params"] if zero in name or "conv_out" in name}
    state = init_state(tiny.randomised(fusion, 5), optimizer)
    new, metrics = step(state, batch, arrays, jax.random.key(0))
    same = [name for name, array in new["params"].items() if (array == state["params"][name]).all()]
    assert not same
    assert float(metrics["entropy"]) < 0.9999
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_pair_comes_back_as_it_was(kind, tmp_path):
    trained = tiny.randomised(fresh(kind), 3)
    save_fusion(tmp_path, trained, dict(experts=[]))
    assert all(name.startswith(f"{kind}.") for name in read_tensors(tmp_path / "aggregators.safetensors"))
    again = load_fusion(tmp_path, stack(UNETS), 2)
    assert again.config == trained.config and kind_of(again.config) == kind
    assert jax.tree.map(jnp.shape, flatten(again)) == jax.tree.map(jnp.shape, flatten(trained))
    for name, array in flatten(trained).items():
        np.testing.assert_array_equal(array, flatten(again)[name], err_msg=name)
    with pytest.raises(WeightsError, match=f"a trained {kind}, not AFA's aggregators"):
        load_aggregators(tmp_path, stack(UNETS), 2)
    with pytest.raises(WeightsError, match=r"aggregators\.safetensors"):
        load_fusion(tmp_path, stack(UNETS), 3)


def test_a_shared_trunk_comes_back_too(tmp_path):
    config = fusion_config("afa", dict(hidden=8, transformer_layers=1, heads=2, norm_num_groups=4, shared=True))
    trained = tiny.randomised(init_fusion(config, stack(UNETS), 2, 0), 3)
    save_fusion(tmp_path, trained, dict(experts=[]))
    names = read_tensors(tmp_path / "aggregators.safetensors").keys()
    assert {"aggregators.0.conv_in.weight", "aggregators.trunk.conv_out.weight"} <= names
    assert not any("res_block" in name and "trunk" not in name for name in names)
    again = flatten(load_aggregators(tmp_path, stack(UNETS), 2))
    for name, array in flatten(trained).items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def test_a_fusion_is_data_and_its_parts_are_not_mixed_up():
    """Leaves taken apart and put together, as a step does, are the same fusion."""
    for kind in RIVALS:
        trained = tiny.randomised(fresh(kind), 3)
        shapes = jax.eval_shape(lambda kind=kind: fresh(kind))
        again = flatten(unflatten(shapes, flatten(trained)))
        assert again.keys() == flatten(trained).keys()
    # A merge leaves the experts as they were, and the merged one has their structure.
    stacked, _ = with_experts(0, 1)
    merged = fresh("mbw").assemble(*with_experts(0, 1), SCHEDULE)[0].experts
    assert jax.tree.map(jnp.shape, flatten(take(merged, 0))) == jax.tree.map(jnp.shape, flatten(take(stacked, 0)))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {2}


def test_a_whole_number_may_be_written_as_a_float():
    assert repr(fusion_config("gate", dict(hidden=1e2))) == repr(fusion_config("gate", dict(hidden=100)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("magic", {}, "fusion.kind='magic'; choose afa, ladder, gate, router, mbw"),
        ("gate", dict(depth=2), "fusion.depth: gate has no such option; there are hidden"),
        ("gate", dict(hidden="wide"), "fusion.hidden='wide': expected int"),
        ("gate", dict(hidden=0), "fusion.hidden=0; choose 1 or more"),
        ("gate", dict(hidden=1.5), "fusion.hidden=1.5: expected int"),
        ("gate", dict(hidden=1e30), "choose 0 to"),
        ("afa", dict(heads=0), "sabw.heads=0; choose 1 or more"),
        ("mbw", dict(hidden=2), "fusion.hidden: mbw has no such option"),
        ("afa", dict(hiden=2), "sabw.hiden: afa has no such option"),
        ("router", dict(block_out_channels=[8, 8]), "fusion.block_out_channels has 2 levels; choose 1 to 1"),
        ("router", dict(block_out_channels=[6], norm_num_groups=4), "fusion: norm_num_groups 4 does not divide"),
        ("router", dict(block_out_channels=[8], heads=0), "fusion.heads=0; choose 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_named(kind, options, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        init_fusion(fusion_config(kind, options), stack(UNETS), 2, 0)
    assert set(RIVALS) | {"afa"} == set(FUSIONS)
