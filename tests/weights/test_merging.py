"""Merging in parameter space against independent formulas in numpy, and what must hold for every kind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.models.configs import UNetConfig
from afa_jax.trees import take
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint, hash_tensors
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.load import load_unet
from afa_jax.weights.merging.blocks import BASE, PRESETS, block_names, parse_blocks
from afa_jax.weights.merging.combine import average
from afa_jax.weights.merging.merge import merge, needs_base
from afa_jax.weights.merging.rules import MERGE_RULES, kth_largest
from afa_jax.weights.opened import open_checkpoint, unet_blocks
from afa_jax.weights.tensors import Tensor, WeightsError, read_tensors, write_tensors
from tests import tiny

NAMES = ("a", "b", "c")


@functools.cache
def expert(seed: int, config: UNetConfig = tiny.MICRO_UNET) -> MemoryCheckpoint:
    return MemoryCheckpoint.of(unet=tiny.unet(seed, config), text_encoder=tiny.text_encoder(seed))


def experts(*seeds: int) -> dict[str, MemoryCheckpoint]:
    return {name: expert(seed) for name, seed in zip(NAMES, seeds or (1, 2, 3), strict=False)}


def arrays(checkpoint: Checkpoint, component: str = "unet") -> dict[str, np.ndarray]:
    return {key: np.asarray(tensor) for key, tensor in checkpoint.tensors(component).items()}


def changed(checkpoint: Checkpoint, function: Callable[[str, str, np.ndarray], np.ndarray]) -> MemoryCheckpoint:
    """The checkpoint with ``function(component, key, array)`` for each tensor."""
    states = {
        part: (
            checkpoint.config(part),
            {key: Tensor.of(function(part, key, value)) for key, value in arrays(checkpoint, part).items()},
        )
        for part in EXPERT_COMPONENTS
    }
    return MemoryCheckpoint(states)


def shifted(move: float) -> MemoryCheckpoint:
    """The base with every weight moved by as much."""
    return changed(expert(0), lambda part, key, value: value + np.float32(move))


def assert_equal(one, other, component=None, **tolerance):
    for part in EXPERT_COMPONENTS if component is None else [component]:
        expected = arrays(other, part)
        for key, value in arrays(one, part).items():
            np.testing.assert_allclose(value, expected[key], err_msg=key, **(tolerance or dict(rtol=0, atol=0)))


def vector(checkpoint: Checkpoint, component: str = "unet") -> np.ndarray:
    """All of a network as one vector, in float64."""
    return np.concatenate(
        [value.ravel().astype(np.float64) for _, value in sorted(arrays(checkpoint, component).items())]
    )


# What every kind must do.

OF_EQUALS = [
    ("average", {}),
    ("average", dict(weights=dict(a=0.2, b=0.3, c=0.5))),
    ("add_difference", dict(a="a", b="b", c="c", alpha=0.7)),
    ("mbw", dict(preset="GRAD_V", of="b")),
    ("mbw", dict(weights=dict(IN00=dict(a=1), M00=dict(b=0.5, c=0.5)))),
    ("task_arithmetic", dict(scale=1 / 3)),
    ("task_arithmetic", dict(scales=dict(a=0.25, c=0.75))),
    ("ties", dict(density=1, scale=1)),
    ("dare", dict(p=0, scale=1 / 3)),
    ("dare", dict(p=0, then="ties")),
    ("slerp", dict(a="a", b="b", t=0.3)),
    ("model_stock", {}),
]


@pytest.mark.parametrize(("kind", "options"), OF_EQUALS)
def test_equal_experts_give_that_expert(kind, options):
    assert_equal(merge(kind, experts(1, 1, 1), expert(0), options), expert(1), rtol=1e-5, atol=1e-6)


def test_every_kind_is_tested_on_equal_experts():
    assert {kind for kind, _ in OF_EQUALS} == set(MERGE_RULES)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("average", dict(weights=dict(b=1.0))),
        ("mbw", dict(weights={block: dict(b=1) for block in ("BASE", "IN00", "IN01", "M00", "OUT00", "OUT01")})),
        ("add_difference", dict(a="b", b="a", c="c", alpha=0)),
        ("add_difference", dict(a="a", b="b", c="a", alpha=1)),
        ("slerp", dict(a="b", b="c", t=0)),
        ("slerp", dict(a="a", b="b", t=1.0)),
        ("task_arithmetic", dict(scales=dict(b=1))),
    ],
)
def test_one_hot_weights_give_that_expert_bit_for_bit(kind, options):
    signed = changed(expert(2), lambda part, key, value: np.where(value < 0, np.float32(-0.0), value))
    found = merge(kind, experts() | dict(b=signed), expert(0), options)
    for part in EXPERT_COMPONENTS:
        assert hash_tensors(found.tensors(part)) == signed.sha256(part)
        assert found.config(part) == signed.config(part)


@pytest.mark.parametrize("kind", [kind for kind in MERGE_RULES if kind not in ("add_difference", "slerp")])
def test_an_expert_is_named_and_its_place_does_not_matter(kind):
    options: dict[str, Any] = dict(average=dict(weights=dict(a=0.2, b=0.3, c=0.5)), mbw=dict(preset="GRAD_A", of="b"))
    turned = {name: experts()[name] for name in ("c", "a", "b")}
    one, other = (merge(kind, own, expert(0), options.get(kind, {})) for own in (experts(), turned))
    assert_equal(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MERGE_RULES)
def test_without_experts_that_moved_the_base_stays(kind):
    options = dict(add_difference=dict(a="a", b="b"), slerp=dict(a="a", b="b"), mbw=dict(preset="MID", of="a"))
    assert_equal(merge(kind, experts(0, 0, 0), expert(0), options.get(kind, {})), expert(0), rtol=1e-6, atol=1e-7)


# The formulas.


def test_average_is_the_weighted_mean():
    weights = dict(a=0.5, c=-0.25, b=0.75)
    found = merge("average", experts(), None, dict(weights=weights))
    for part in EXPERT_COMPONENTS:
        expected = sum(weights[name] * vector(own, part) for name, own in experts().items())
        np.testing.assert_allclose(vector(found, part), expected, rtol=1e-5, atol=1e-6)
    even = merge("average", experts(), None, {})
    np.testing.assert_allclose(vector(even), np.mean([vector(own) for own in experts().values()], 0), atol=1e-6)


def test_add_difference():
    a, b, c, base = (vector(own) for own in (*experts().values(), expert(0)))
    found = merge("add_difference", experts(), expert(0), dict(a="a", b="b", alpha=0.5))
    np.testing.assert_allclose(vector(found), a + 0.5 * (b - base), rtol=1e-5, atol=1e-6)
    found = merge("add_difference", experts(), None, dict(a="b", b="a", c="c", alpha=-2))
    np.testing.assert_allclose(vector(found), b - 2 * (a - c), rtol=1e-5, atol=1e-5)
    found = merge("add_difference", experts(), expert(0), dict(a="base", b="b", c="c"))
    np.testing.assert_allclose(vector(found), base + b - c, rtol=1e-5, atol=1e-6)


def test_task_arithmetic():
    taus = {name: vector(own) - vector(expert(0)) for name, own in experts().items()}
    found = merge("task_arithmetic", experts(), expert(0), {})
    np.testing.assert_allclose(vector(found), vector(expert(0)) + 0.4 * sum(taus.values()), rtol=1e-5, atol=1e-6)
    found = merge("task_arithmetic", experts(), expert(0), dict(scales=dict(a=-1, c=0.5)))
    np.testing.assert_allclose(vector(found), vector(expert(0)) - taus["a"] + 0.5 * taus["c"], rtol=1e-5, atol=1e-5)


def ties_reference(base, models, density, scale, count_signs=False):
    """Yadav et al. 2023 on whole vectors, the sorted way; ``count_signs`` elects by the number of signs, wrongly."""
    taus = np.stack([model - base for model in models])
    kept = round(density * taus.shape[1])
    for tau in taus:
        tau[np.argsort(np.abs(tau), kind="stable")[: tau.size - kept]] = 0
    sign = np.sign(np.sign(taus).sum(0)) if count_signs else np.sign(taus.sum(0))
    merged = np.zeros_like(base)
    for place in range(base.size):
        agreeing = [tau[place] for tau in taus if tau[place] * sign[place] > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0
    return base + scale * merged


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_ties_is_the_papers(density):
    found = merge("ties", experts(), expert(0), dict(density=density, scale=0.8))
    for part in EXPERT_COMPONENTS:  # each network is a whole task vector
        models = [vector(own, part) for own in experts().values()]
        expected = ties_reference(vector(expert(0), part), models, density, 0.8)
        np.testing.assert_allclose(vector(found, part), expected, rtol=1e-5, atol=1e-6)


def test_ties_elects_by_magnitude_and_not_by_count():
    """Two small moves down against a large one up: up it goes, by the large one."""
    moved = {name: shifted(move) for name, move in dict(a=-0.1, b=-0.2, c=1.0).items()}
    found = merge("ties", moved, expert(0), dict(density=1.0))
    base = vector(expert(0))
    np.testing.assert_allclose(vector(found), base + 1.0, atol=1e-5)
    by_count = ties_reference(base, [vector(own) for own in moved.values()], 1.0, 1.0, count_signs=True)
    np.testing.assert_allclose(by_count, base - 0.15, atol=1e-5)  # what this test is there to tell apart


def test_ties_trims_the_whole_vector_and_not_each_tensor():
    """An expert that moved conv_in by 1 and the rest by a little keeps only conv_in."""
    moved = changed(expert(0), lambda part, key, value: value + np.float32(1 if key.startswith("conv_in") else 0.01))
    sizes = {key: value.size for key, value in arrays(expert(0)).items()}
    share = sum(size for key, size in sizes.items() if key.startswith("conv_in")) / sum(sizes.values())
    found, base = arrays(merge("ties", dict(a=moved), expert(0), dict(density=share))), arrays(expert(0))
    for key, value in found.items():
        np.testing.assert_allclose(value - base[key], 1 if key.startswith("conv_in") else 0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("k", [1, 2, 7, 500, 999, 1000])
def test_the_kth_largest_is_exact(k):
    rng = np.random.default_rng(k)
    values = np.abs(rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)).astype(np.float32)
    values[:50], values[50:100] = 0, values[100]  # equal ones
    parts = np.split(values.reshape(100, 10), [3, 40])
    assert kth_largest(lambda: parts, k) == np.sort(values)[-k]


def test_dare_drops_by_chance_and_keeps_the_expectation():
    moved = {"a": shifted(1.0)}
    found = vector(merge("dare", moved, expert(0), dict(p=0.75, scale=1))) - vector(expert(0))
    kept = found > 2
    np.testing.assert_allclose(found, np.where(kept, 4, 0), atol=1e-5)
    assert abs(kept.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / kept.size)
    tau = vector(expert(1)) - vector(expert(0))
    draws = [vector(merge("dare", experts(1), expert(0), dict(p=0.5, scale=1, seed=seed))) for seed in range(16)]
    error = np.mean(draws, 0) - vector(expert(1))
    np.testing.assert_allclose(np.square(error).mean(), np.square(tau).mean() / 16, rtol=0.1)  # var = tau^2 p / (1 - p)


def test_dare_follows_from_seed_name_and_key():
    def dared(seed, checkpoints):
        return vector(merge("dare", checkpoints, expert(0), dict(p=0.5, seed=seed)))

    whole = merge("dare", experts(1), expert(0), dict(p=0.5, seed=1))
    backwards = {key: np.asarray(whole.tensors("unet")[key]) for key in sorted(whole.tensors("unet"), reverse=True)}
    np.testing.assert_array_equal(vector(whole), np.concatenate([backwards[key].ravel() for key in sorted(backwards)]))
    np.testing.assert_array_equal(dared(1, experts(1)), vector(whole))
    assert (dared(2, experts(1)) != vector(whole)).mean() > 0.4
    assert (dared(1, dict(z=expert(1))) != vector(whole)).mean() > 0.4
    twice = [
        dared(1, own) - vector(expert(0))
        for own in (dict(a=expert(1)), dict(b=expert(1)), dict(a=expert(1), b=expert(1)))
    ]
    np.testing.assert_allclose(twice[0] + twice[1], twice[2], atol=1e-5)  # each expert its own draws


def test_dare_then_ties_elects_among_what_stays():
    found = vector(merge("dare", experts(), expert(0), dict(p=0.5, then="ties", seed=3)))
    thinned = [
        vector(merge("dare", {name: own}, expert(0), dict(p=0.5, seed=3, scale=1))) for name, own in experts().items()
    ]
    np.testing.assert_allclose(found, ties_reference(vector(expert(0)), thinned, 1.0, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_slerp_is_the_great_circle(t):
    found, a, b = (arrays(own) for own in (merge("slerp", experts(1, 2), None, dict(t=t)), expert(1), expert(2)))
    for key, value in found.items():
        x, y = a[key].ravel().astype(np.float64), b[key].ravel().astype(np.float64)
        angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
        if abs(np.cos(angle)) > 0.9995:
            expected = (1 - t) * x + t * y
        np.testing.assert_allclose(value.ravel(), expected, rtol=1e-4, atol=1e-5, err_msg=key)


def test_slerp_keeps_the_norm_and_is_linear_where_experts_hardly_differ():
    unit = {
        name: changed(own, lambda part, key, value: (value / np.linalg.norm(value)).astype(np.float32))
        for name, own in experts(1, 2).items()
    }
    for value in arrays(merge("slerp", unit, None, {})).values():
        assert np.linalg.norm(value) == pytest.approx(1, abs=1e-5)
    near = changed(expert(1), lambda part, key, value: value * np.float32(1.5))
    found = merge("slerp", dict(a=expert(1), b=near), None, dict(t=0.5))
    assert_equal(found, changed(expert(1), lambda part, key, value: value * np.float32(1.25)), rtol=1e-5, atol=1e-6)
    nothing = changed(expert(1), lambda part, key, value: np.zeros_like(value))
    found = merge("slerp", dict(a=expert(1), b=nothing), None, dict(t=0.5))
    assert_equal(found, changed(expert(1), lambda part, key, value: value / 2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_the_papers(count):
    shared = {part: arrays(expert(1), part) for part in EXPERT_COMPONENTS}
    near = {  # task vectors that share a half
        name: changed(own, lambda part, key, value: (value + shared[part][key]) / 2)
        for name, own in list(experts(2, 3, 4).items())[:count]
    }
    found, base = arrays(merge("model_stock", near, expert(0), {})), arrays(expert(0))
    moved, ratios = [arrays(own) for own in near.values()], []
    for key, value in found.items():
        taus = [(own[key] - base[key]).ravel().astype(np.float64) for own in moved]
        cosines = [
            taus[i] @ taus[j] / np.linalg.norm(taus[i]) / np.linalg.norm(taus[j])
            for i in range(count)
            for j in range(i)
        ]
        cosine = max(np.mean(cosines), 0)
        ratios.append(count * cosine / (1 + (count - 1) * cosine))
        expected = base[key].ravel() + ratios[-1] * np.mean(taus, 0)
        np.testing.assert_allclose(value.ravel(), expected, rtol=1e-4, atol=1e-5, err_msg=key)
    assert 0.2 < np.median(ratios) < 0.95


def test_model_stock_stays_at_the_base_where_experts_contradict():
    moved = dict(a=shifted(1.0), b=shifted(-1.0))
    assert_equal(merge("model_stock", moved, expert(0), {}), expert(0))


# Blocks.


def test_sd15_has_25_blocks_and_base():
    stages = [stage.name for stage in tiny.unet(1, tiny.UNET).stages]
    names = block_names(stages)
    expected = [*(f"IN{i:02d}" for i in range(12)), "M00", *(f"OUT{i:02d}" for i in range(12))]
    assert list(names) == [*stages, "time_embedding", "text_encoder"] and len(stages) == 25
    assert list(names.values()) == [*expected, BASE, BASE]
    assert (names["conv_in"], names["conv_out"], names["down_blocks.0.downsampler"]) == ("IN00", "OUT11", "IN03")
    small = block_names([stage.name for stage in tiny.unet(1).stages])
    assert list(dict.fromkeys(small.values())) == [
        "IN00",
        "IN01",
        "IN02",
        "IN03",
        "M00",
        "OUT00",
        "OUT01",
        "OUT02",
        "OUT03",
        "BASE",
    ]


def test_mbw_with_all_blocks_alike_is_the_average():
    weights = dict(a=0.2, b=0.3, c=0.5)
    stages = [stage.name for stage in tiny.unet(1, tiny.MICRO_UNET).stages]
    blocks = dict.fromkeys(block_names(stages).values(), weights)
    found = merge("mbw", experts(), None, dict(weights=blocks))
    assert_equal(found, merge("average", experts(), None, dict(weights=weights)))
    assert_equal(merge("mbw", experts(), None, {}), merge("average", experts(), None, {}))


def test_each_block_has_its_own_weights():
    weights: dict[str, Any] = dict(IN00=dict(a=1.0), M00=dict(b=0.25, c=0.75), BASE=dict(c=1))
    found = merge("mbw", experts(), None, dict(weights=weights, preset="OUT", of="b"))
    names, blocks = block_names([stage.name for stage in tiny.unet(1, tiny.MICRO_UNET).stages]), unet_blocks(expert(1))
    preset: dict[str, Any] = {key: dict(b=1) for key in ("OUT00", "OUT01")} | dict(IN01=dict(a=0.5, c=0.5))
    for part in EXPERT_COMPONENTS:
        own = {name: arrays(checkpoint, part) for name, checkpoint in experts().items()}
        for key, value in arrays(found, part).items():
            shares = (preset | weights)[names[blocks[key]] if part == "unet" else "BASE"]
            expected = sum(share * own[name][key] for name, share in shares.items())
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=key)
    by_stage = parse_blocks(weights, NAMES, [*names][:-2], preset="OUT", of="b")
    assert_equal(found, average(list(experts().values()), by_stage))  # the snapshot's is the same average


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [5, 9, 25])
def test_presets_are_symmetrical_curves_from_0_to_1(preset, count):
    stages = [*(f"down{i}" for i in range(count // 2)), "mid_block", *(f"up{i}" for i in range(count // 2))]
    blocks = parse_blocks({}, ("a", "b"), stages, preset=preset)
    curve = np.array([blocks[stage] for stage in stages])
    np.testing.assert_allclose(curve.sum(1), 1)
    own = curve[:, 1]
    assert ((own >= 0) & (own <= 1)).all() and blocks["text_encoder"] == blocks["time_embedding"] == [0.5, 0.5]
    mirrored = own[::-1]
    if preset in ("RISE", "FALL", "SMOOTHSTEP", "R_SMOOTHSTEP"):
        mirrored = 1 - mirrored
    if preset in ("IN", "OUT"):
        mirrored = 1 - mirrored - (np.arange(count) == count // 2)
    np.testing.assert_allclose(own, mirrored, atol=1e-12)
    three = parse_blocks({}, NAMES, stages, preset=preset, of="b")
    for stage in stages:
        np.testing.assert_allclose(three[stage], [blocks[stage][0] / 2, blocks[stage][1], blocks[stage][0] / 2])


def test_presets_by_their_figures():
    stages = [*(f"down{i}" for i in range(12)), "mid_block", *(f"up{i}" for i in range(12))]

    def curve(preset):
        return [parse_blocks({}, ("a", "b"), stages, preset=preset)[stage][1] for stage in stages]

    assert curve("GRAD_V")[:3] == pytest.approx([1, 11 / 12, 10 / 12]) and curve("GRAD_V")[12] == 0
    assert curve("GRAD_A")[12] == 1 and curve("FLAT") == [0.5] * 25
    assert curve("COSINE")[3] == pytest.approx(0.5 + np.sqrt(2) / 4)
    assert curve("SMOOTHSTEP")[6] == pytest.approx(0.15625)
    assert np.flatnonzero(curve("WRAP")).tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
    assert np.flatnonzero(curve("MID")).tolist() == list(range(6, 19))
    assert np.flatnonzero(curve("RING")).tolist() == [4, 5, 6, 7, 8, 16, 17, 18, 19, 20]
    assert np.flatnonzero(curve("OUT")).tolist() == list(range(13, 25))


# Text encoder, dtypes, hashes, errors.


def test_the_text_encoder_is_decided():
    whole = merge("average", experts(), None, {})
    assert not np.array_equal(vector(whole, "text_encoder"), vector(expert(1), "text_encoder"))
    for choice, own in (("base", expert(0)), ("b", expert(2))):
        found = merge("average", experts(), expert(0), dict(text_encoder=choice))
        assert_equal(found, own, "text_encoder")
        assert_equal(found, whole, "unet")
        assert found.sha256("text_encoder") == own.sha256("text_encoder")
        assert found.sha256("unet") == whole.sha256("unet")


@pytest.fixture(scope="module")
def with_position_ids(tmp_path_factory):
    """Three experts as old folders have them: integers beside the weights, here other ones in each."""
    place, stored = tmp_path_factory.mktemp("positions"), {}
    for seed, name in enumerate("abc", 1):
        save_folder(place / name, unet=tiny.unet(seed, tiny.MICRO_UNET), text_encoder=tiny.text_encoder(seed))
        file = place / name / "text_encoder" / "model.safetensors"
        position_ids = {"text_model.embeddings.position_ids": np.arange(16)[None] * seed}
        write_tensors(file, read_tensors(file) | position_ids)
        stored[name] = open_checkpoint(place / name)
    return stored


@pytest.mark.parametrize(("kind", "options"), OF_EQUALS)
def test_position_ids_are_not_merged(kind, options, with_position_ids):
    """They count positions, and a file that has none is read as 0, 1, 2, ...; a merge of them would not be."""
    found = merge(kind, with_position_ids, expert(0), options)
    assert {tensor.dtype for tensor in found.tensors("text_encoder").values()} == {np.dtype(np.float32)}
    assert not [key for key in found.tensors("text_encoder") if "position_ids" in key]
    assert_equal(found, merge(kind, experts(1, 2, 3), expert(0), options))


def test_a_merge_is_in_the_dtype_of_the_experts():
    half = {name: changed(own, lambda part, key, value: value.astype(np.float16)) for name, own in experts().items()}
    found = merge("ties", half, expert(0), {})
    assert {tensor.dtype for tensor in found.tensors("unet").values()} == {np.dtype(np.float16)}
    exact = {name: changed(own, lambda part, key, value: value.astype(np.float32)) for name, own in half.items()}
    expected = changed(merge("ties", exact, expert(0), {}), lambda part, key, value: value.astype(np.float16))
    assert_equal(found, expected)  # computed in float32, rounded once
    mixed = half | dict(b=changed(expert(2), lambda part, key, value: value.astype(ml_dtypes.bfloat16)))
    assert {t.dtype for t in merge("average", mixed, None, {}).tensors("unet").values()} == {np.dtype(np.float32)}
    float8 = ml_dtypes.float8_e4m3fn
    small = {name: changed(own, lambda part, key, value: value.astype(float8)) for name, own in experts().items()}
    assert {t.dtype for t in merge("average", small, None, {}).tensors("unet").values()} == {np.dtype(np.float16)}
    large = merge("add_difference", half, expert(0), dict(a="a", b="b", alpha=1e6))
    with pytest.raises(WeightsError, match="holds values too large for float16; choose bfloat16 or float32"):
        vector(large)


def test_a_hash_follows_from_sources_and_options_without_merging():
    read = []

    def counted(own):
        def tensor(key, value):
            def count():
                read.append(key)
                return value

            return Tensor(value.shape, value.dtype, count)

        states = {
            part: (own.config(part), {key: tensor(key, value) for key, value in arrays(own, part).items()})
            for part in EXPERT_COMPONENTS
        }
        return MemoryCheckpoint(states)

    def hashes(kind="ties", checkpoints=None, base=None, **options):
        found = merge(kind, checkpoints or experts(), base or expert(0), options)
        return found.sha256("unet"), found.sha256("text_encoder")

    different = [
        hashes(),
        hashes(density=0.3),
        hashes("task_arithmetic"),
        hashes("average"),
        hashes("average", weights=dict(a=1)),
        hashes(checkpoints=experts(1, 2, 4)),
        hashes(checkpoints=dict(zip("bac", experts().values(), strict=True))),
        hashes(base=expert(5)),
    ]
    assert len({one for pair in different for one in pair}) == 2 * len(different)
    assert hashes() == different[0] and hashes("average", base=expert(5)) == different[3]
    counting = {name: counted(own) for name, own in experts().items()}
    assert merge("ties", counting, expert(0), {}).sha256("unet") == different[0][0]
    assert len(read) == 3 * len(arrays(expert(1)))  # each tensor once


def test_options_may_be_of_a_config():
    weights = dict(a=0.25, b=0.75)
    found = merge("average", experts(), None, ConfigDict(dict(weights=weights)).to_dict())
    assert_equal(merge("average", experts(), None, dict(weights=ConfigDict(weights))), found)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mean", {}, "no merge 'mean'; there are average"),
        ("average", dict(alpha=1), "average: no option 'alpha'; there are weights, text_encoder"),
        ("average", dict(weights=dict(a=0.5, b=0.4)), "the weights sum to 0.9; make it 1"),
        ("average", dict(weights=dict(a=1, d=0)), "no expert 'd'; there are a, b, c"),
        ("average", dict(weights=dict(a=np.nan, b=1.0)), "a=nan; make it a finite number"),
        ("average", dict(weights=dict(a="much")), "a='much'; make it a finite number"),
        ("average", dict(weights=0.5), "0.5 names no experts; write dict(a=...)"),
        ("average", dict(text_encoder="d"), "text_encoder='d'; choose merge, base, a, b, c"),
        ("add_difference", dict(a="a"), "b is missing; name a and b, of a, b, c, and base"),
        ("add_difference", dict(a="a", b="d"), "b='d': no such expert"),
        ("add_difference", dict(a="a", b="b", alpha="x"), "alpha='x'; make it a finite number"),
        (
            "mbw",
            dict(weights=dict(IN12=dict(a=1))),
            "no block 'IN12'; this U-Net has IN00, IN01, M00, OUT00, OUT01, BASE",
        ),
        ("mbw", dict(weights=dict(IN00=dict(a=0.5))), "IN00: the weights sum to 0.5"),
        ("mbw", dict(weights=0.5), "names no blocks"),
        ("mbw", dict(preset="GRAD"), "no preset 'GRAD'; there are FLAT"),
        ("mbw", dict(preset="FLAT"), "one of 3 experts; name it, of="),
        ("mbw", dict(preset="FLAT", of="d"), "of=d: no such expert"),
        ("mbw", dict(of="a"), "give preset="),
        ("task_arithmetic", dict(scales=dict(a=np.inf)), "a=inf; make it a finite number"),
        ("ties", dict(density=0), "density=0; choose a share above 0, up to 1"),
        ("ties", dict(density=True), "density=True; make it a finite number"),
        ("dare", dict(p=1), "p=1; choose a probability"),
        ("dare", dict(seed=0.5), "seed=0.5; make it a whole number"),
        ("dare", dict(then="slerp"), "then='slerp'; choose task_arithmetic or ties"),
        ("dare", dict(density=0.5), "density is for then=ties"),
        ("slerp", {}, "between two of the 3 experts; name them"),
        ("slerp", dict(a="a", b="a"), "a and b are both a"),
        ("slerp", dict(a="a", b="b", t=1.5), "t=1.5; choose it from 0"),
    ],
)
def test_what_makes_no_sense_is_one_line(kind, options, message):
    with pytest.raises(InputError) as error:
        merge(kind, experts(), expert(0), options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_kinds_that_start_from_the_base_need_its_networks():
    unet_only = MemoryCheckpoint({"unet": expert(0).states["unet"]})
    for kind in ("task_arithmetic", "ties", "dare", "model_stock"):
        assert needs_base(kind, {})
        with pytest.raises(InputError, match=f"{kind} takes the base model's U-Net, and no base model is given"):
            merge(kind, experts(), None, {})
        with pytest.raises(InputError, match="takes the base model's text encoder, and a model in memory has none"):
            merge(kind, experts(), unet_only, {})
        merge(kind, experts(), unet_only, dict(text_encoder="a"))
    assert needs_base("average", dict(text_encoder="base")) and needs_base("add_difference", dict(a="a", b="b"))
    assert not any(needs_base(kind, {}) for kind in ("average", "mbw", "slerp"))
    with pytest.raises(InputError, match="takes the base model's text encoder"):
        merge("average", experts(), None, dict(text_encoder="base"))


def test_other_architectures_and_broken_weights_are_refused():
    other = dataclasses.replace(tiny.MICRO_UNET, block_out_channels=(16,))
    with pytest.raises(WeightsError, match="is of another architecture than a model in memory"):
        merge("average", dict(a=expert(1), b=expert(2, other)), None, {})
    broken = changed(
        expert(2), lambda part, key, value: np.where(key == "conv_in.bias", np.nan, value).astype(np.float32)
    )
    found = merge("average", dict(a=expert(1), b=broken), None, {})
    with pytest.raises(WeightsError, match=r"conv_in\.bias holds NaN or infinity"):
        np.asarray(found.tensors("unet")["conv_in.bias"])


def test_a_one_hot_merge_predicts_what_the_expert_does():
    inputs = tiny.inputs(2, 1)
    prediction = jax.jit(lambda unet, latents, t, context: unet(latents, t, take(context, 0)))
    merged = load_unet(
        merge(
            "mbw",
            experts(),
            None,
            dict(preset="OUT", of="b", weights={key: dict(b=1) for key in ("BASE", "IN00", "IN01", "M00")}),
        )
    )
    np.testing.assert_array_equal(prediction(merged, *inputs), prediction(tiny.unet(2, tiny.MICRO_UNET), *inputs))
    even = load_unet(merge("average", experts(), None, {}))
    assert float(jnp.abs(prediction(even, *inputs) - prediction(merged, *inputs)).max()) > 1e-3
