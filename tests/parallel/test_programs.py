"""What the compiled programs do on eight devices: their results, their exchange, their work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.afa import FusedUNets, SABWConfig
from afa_jax.mesh import parallel
from afa_jax.mesh.collectives import ROWS, on_mesh
from afa_jax.mesh.parallel import make_mesh, place, place_rows, specs_of
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate
from afa_jax.scale.collectives import collectives
from afa_jax.scale.flops import flops
from afa_jax.training.step import batch_specs, init_state, make_train_step
from afa_jax.trees import flatten, stack, take
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.commands.conftest import TOKENIZER

N, BATCH, SIZE, TOKENS, FLOAT = 8, 8, 8, 5, 4
SABW = tiny.SABW
ALL, LAST = tiny.PLAIN_SABW, dataclasses.replace(tiny.PLAIN_SABW, sites="last")
MESHES = ((1, 8), (2, 4), (4, 2), (8, 1))
"""Devices along ``expert`` and ``data``."""
SPLIT, SAME = PartitionSpec(ROWS), PartitionSpec()


@functools.cache
def ensemble(sabw: SABWConfig = ALL) -> FusedUNets:
    """The forward is tested with SABW whole, the rest without its transformer blocks: they talk to no other device."""
    aggregators = tiny.trained(N, tiny.MICRO_UNET, sabw, 5)
    return FusedUNets(experts=stack([tiny.unet(i, tiny.MICRO_UNET) for i in range(N)]), aggregators=aggregators)


def mesh_of(expert: int, data: int, fsdp: int = 1) -> jax.sharding.Mesh:
    return make_mesh(dict(expert=expert, data=data, fsdp=fsdp), experts=N)


def forward(ensemble: FusedUNets, *inputs: Any) -> Any:
    return ensemble.with_maps(*inputs)


@functools.cache
def forward_program(expert: int, data: int, fsdp: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """Compiled, and its arguments."""
    mesh, inputs = mesh_of(expert, data, fsdp), tiny.inputs(BATCH, N, (SIZE, SIZE))
    specs = (specs_of(ensemble(SABW), mesh), SPLIT, SPLIT, PartitionSpec("expert", ROWS))
    run = jax.jit(on_mesh(forward, mesh, specs, (SPLIT, PartitionSpec(None, ROWS))))
    arguments = tuple(place(leaf, mesh, spec) for leaf, spec in zip((ensemble(SABW), *inputs), specs, strict=True))
    return run.lower(*arguments).compile(), arguments


@functools.cache
def forward_alone() -> Any:
    return jax.jit(forward).lower(ensemble(SABW), *tiny.inputs(BATCH, N, (SIZE, SIZE))).compile()


def sites() -> list[tuple[int, int]]:
    """Channels and positions of each fused feature."""
    shapes = jax.eval_shape(
        lambda unet, *inputs: [feature for _, feature in unet.features(*inputs)],
        take(ensemble().experts, 0),
        *tiny.inputs(BATCH, N, (SIZE, SIZE))[:2],
        take(tiny.inputs(BATCH, N, (SIZE, SIZE))[2], 0),
    )
    return [(feature.shape[-1], feature.shape[1] * feature.shape[2]) for feature in shapes]


def exchanged(program: Any, mesh: jax.sharding.Mesh) -> dict[tuple[str, str], int]:
    """Payload bytes of a device in a run, by axes and kind."""
    total: dict[tuple[str, str], int] = {}
    for one in collectives(program.as_text(), mesh.shape):
        assert one.times is not None and not one.conditional
        if one.group > 1:
            total[one.axes, one.kind] = total.get((one.axes, one.kind), 0) + one.bytes * one.times
    return total


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_the_forward_is_that_of_one_device(expert: int, data: int) -> None:
    program, arguments = forward_program(expert, data)
    prediction, maps = program(*arguments)
    wanted, wanted_maps = forward_alone()(ensemble(SABW), *tiny.inputs(BATCH, N, (SIZE, SIZE)))
    np.testing.assert_allclose(prediction, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))
    for site, wanted_site in zip(maps, wanted_maps, strict=True):
        np.testing.assert_allclose(site, wanted_site, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_the_forward_exchanges_what_the_formula_says(expert: int, data: int) -> None:
    """At each site 128 (here 8) + c channels and N logits, whatever N is; and no parameter at all."""
    program, _ = forward_program(expert, data)
    rows = BATCH // data
    if expert == 1:
        wanted: dict[tuple[str, str], int] = {}
    else:
        filled = -(-rows // expert) * expert
        positions = sum(size for _, size in sites())
        means = rows * (tiny.MICRO_UNET.time_width + TOKENS * tiny.MICRO_UNET.cross_attention_dim)
        wanted = {
            ("expert", "reduce-scatter"): filled * positions * SABW.hidden * FLOAT,
            ("expert", "all-gather"): filled * positions * N * FLOAT,
            ("expert", "all-reduce"): (rows * sum(c * size for c, size in sites()) + means) * FLOAT,
        }
    assert exchanged(program, mesh_of(expert, data)) == wanted


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_the_forward_is_divided_and_not_repeated(expert: int, data: int) -> None:
    program, _ = forward_program(expert, data)
    ours, alone = flops(program.as_text()), flops(forward_alone().as_text())
    assert ours.exact and alone.exact and not ours.unknown
    assert 8 * ours.products <= 1.1 * alone.products


@functools.cache
def frozen() -> dict[str, Any]:
    text_encoders = stack([tiny.text_encoder(i) for i in range(N)])
    return dict(unet=ensemble().experts, text_encoder=text_encoders, vae=tiny.vae(0))


@functools.cache
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return dict(
        image=rng.integers(0, 256, (BATCH, 4 * SIZE, 4 * SIZE, 3), np.uint8),
        ids=rng.integers(0, 600, (BATCH, TOKENS), np.int32),
        position=np.arange(BATCH),
    )


def fused_in_a_step(expert: int, data: int, fsdp: int = 1) -> SABWConfig:
    """At every site on the two meshes that split experts and rows; on the others at the last, half the compiling."""
    return ALL if min(expert, data) > 1 and fsdp == 1 else LAST


def make_step(sabw: SABWConfig, mesh: jax.sharding.Mesh | None) -> Any:
    return make_train_step(
        ensemble(sabw).aggregators,
        frozen(),
        optax.sgd(1.0),
        NoiseSchedule(),
        caption_dropout=0.3,
        no_caption=jnp.zeros(TOKENS, jnp.int32),
        mesh=mesh,
    )


@functools.cache
def step_alone(sabw: SABWConfig) -> tuple[Any, Any]:
    state = init_state(ensemble(sabw).aggregators, optax.sgd(1.0))
    arguments = (state, batch(), flatten(frozen()), jax.random.key(0))
    program = make_step(sabw, None).lower(*arguments).compile()
    return program, program(*arguments)


@functools.cache
def step_program(expert: int, data: int, fsdp: int = 1) -> tuple[Any, tuple[Any, ...]]:
    mesh, arrays = mesh_of(expert, data, fsdp), flatten(frozen())
    sabw = fused_in_a_step(expert, data, fsdp)
    state = init_state(ensemble(sabw).aggregators, optax.sgd(1.0))
    arguments = (
        place(state, mesh, SAME),
        place_rows(batch(), mesh, batch_specs(batch())),
        place(arrays, mesh, specs_of(arrays, mesh)),
        place(jax.random.key(0), mesh, SAME),
    )
    return make_step(sabw, mesh).lower(*arguments).compile(), arguments


def check_step(expert: int, data: int, fsdp: int = 1) -> None:
    """The same loss, routing and, by way of one step of gradient descent at rate 1, gradient."""
    program, arguments = step_program(expert, data, fsdp)
    sabw = fused_in_a_step(expert, data, fsdp)
    (state, metrics), (wanted, wanted_metrics) = program(*arguments), step_alone(sabw)[1]
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    before = init_state(ensemble(sabw).aggregators, optax.sgd(1.0))["params"]
    for name, value in wanted["params"].items():
        gradient = value - before[name]
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(state["params"][name] - before[name], gradient, rtol=0, atol=1e-6 + 2e-4 * scale)


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_a_step_is_that_of_one_device(expert: int, data: int) -> None:
    check_step(expert, data)


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_a_step_exchanges_what_the_formula_says(expert: int, data: int) -> None:
    """Of the forward twice, back and forth, and the aggregators' gradient once; and no frozen parameter."""
    program, _ = step_program(expert, data)
    mesh, rows, filled = mesh_of(expert, data), BATCH // data, -(-BATCH // data // expert) * expert
    sabw, found = fused_in_a_step(expert, data), exchanged(program, mesh)
    # A residual block adds the bias of its first convolution and that of its time embedding in one place: their
    # gradients are one, and the compiler sums one of them.
    trained = flatten(ensemble(sabw).aggregators)
    parameters = sum(leaf.size for path, leaf in trained.items() if not path.endswith("time_emb_proj.bias"))
    channels = tiny.VAE_CONFIG.latent_channels
    every = sites() if sabw == ALL else sites()[-1:]
    positions, features = sum(size for _, size in every), sum(c * size for c, size in every)
    means = rows * tiny.MICRO_UNET.time_width  # the text's mean would go to the transformer blocks
    # A feature's gradient is summed where it goes into the next stage, and where it is a skip.
    stages = list(take(ensemble().experts, 0).stages)[-len(every) :]
    into_stages = sum(c * size for c, size in every[:-1])
    into_skips = sum(c * size for (c, size), stage in zip(every, stages, strict=True) if stage.leaves_skip)
    over_experts = {
        ("expert", "reduce-scatter"): filled * positions * SABW.hidden * FLOAT,
        ("expert", "all-gather"): filled * (positions * (N + SABW.hidden) + SIZE * SIZE * channels) * FLOAT,
        ("expert", "all-reduce"): rows * (features + into_stages + into_skips + positions * N) * FLOAT + means * FLOAT,
    }
    over_rows = {("data", "all-reduce"): (1 + 1 + N) * FLOAT}  # loss, entropy and weights
    over_all = {("data" if expert == 1 else "expert" if data == 1 else "data+expert", "all-reduce"): parameters * FLOAT}
    wanted: dict[tuple[str, str], int] = {}
    for part in (over_experts if expert > 1 else {}, over_rows if data > 1 else {}, over_all):
        for key, value in part.items():
            wanted[key] = wanted.get(key, 0) + value
    assert found == wanted


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_a_step_is_divided_and_not_repeated(expert: int, data: int) -> None:
    alone = flops(step_alone(fused_in_a_step(expert, data))[0].as_text())
    ours = flops(step_program(expert, data)[0].as_text())
    assert ours.exact and alone.exact
    assert 8 * ours.products <= 1.1 * alone.products


def test_fsdp_gathers_a_stage_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "LARGE", 128)
    program, arguments = step_program(2, 2, 2)
    check_step(2, 2, 2)
    split = [leaf for leaf in arguments[2].values() if "fsdp" in str(leaf.sharding.spec)]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in split)
    assert (
        4 * held
        == sum(leaf.nbytes for leaf in split)
        > 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(ensemble().experts))
    )
    # What two devices hold of an expert each has for the time of its stage.
    assert exchanged(program, mesh_of(2, 2, 2))["fsdp", "all-gather"] == 2 * held


@functools.cache
def pictures(expert: int, data: int) -> np.ndarray:
    mesh = None if expert * data == 1 else mesh_of(expert, data)
    experts = Experts(
        names=tuple("abcdefgh"), hashes=("",) * N, vae_hash="", tokenizer=Tokenizer(TOKENIZER),
        schedule=NoiseSchedule(), mesh=mesh, **frozen(),
    )  # fmt: skip
    requests = [Request(prompt="octopus, noto style", number=i) for i in range(5)]
    options = SampleOptions(size=(4 * SIZE, 4 * SIZE), steps=2, guidance=2.0, batch=4)
    return np.stack([p.pixels for p in generate(requests, ensemble(LAST), experts, seed=0, options=options)])


@pytest.mark.parametrize(("expert", "data"), MESHES)
def test_a_picture_is_the_same_on_every_mesh(expert: int, data: int) -> None:
    ours, alone = pictures(expert, data), pictures(1, 1)
    if expert == 1:
        np.testing.assert_array_equal(ours, alone)
    else:  # sums over the experts are in another order
        assert np.abs(ours.astype(int) - alone).max() <= 1
