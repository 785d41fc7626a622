"""Two experts by their weights: equal, one model rounded twice, or two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.weights.compare import NEAR_IDENTICAL, compare_experts, difference
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.tensors import WeightsError, read_tensors, write_tensors
from tests import tiny


def save(folder, seed=1, scale=1.0, dtype=jnp.float32, **replaced):
    parts = dict(unet=tiny.unet(seed), text_encoder=tiny.text_encoder(seed)) | replaced
    parts = {name: jax.tree.map(lambda w: np.asarray(w) * np.float32(scale), part) for name, part in parts.items()}
    save_folder(folder, dtype=dtype, **parts)
    return folder


def test_the_difference_is_relative_to_the_mean_of_both(tmp_path):
    folders = {
        "one": save(tmp_path / "one"),
        "larger": save(tmp_path / "larger", scale=1.1),
        "text": save(tmp_path / "text", text_encoder=tiny.text_encoder(2)),
    }
    found = dict(compare_experts(folders))
    assert list(found) == [("one", "larger"), ("one", "text"), ("larger", "text")]
    larger = found["one", "larger"]
    stages = [stage.name for stage in tiny.unet(1).stages]
    assert sorted(larger.blocks) == sorted([*stages, "time_embedding", "text_encoder"])
    np.testing.assert_allclose([*larger.blocks.values(), larger.total], 0.1 / 1.05, rtol=1e-5)
    assert larger.kind == "different"
    text = found["one", "text"]
    assert text.most == "text_encoder" and text.blocks["text_encoder"] > 0.1
    assert {value for block, value in text.blocks.items() if block != "text_encoder"} == {0.0}
    assert 0 < text.total < text.blocks["text_encoder"]


def test_what_rounding_does_is_below_the_threshold_and_what_twice_as_much_does_is_not(tmp_path):
    dtypes = dict(whole=jnp.float32, copy=jnp.float32, half=jnp.float16, brain=jnp.bfloat16)
    folders = {name: save(tmp_path / name, dtype=dtype) for name, dtype in dtypes.items()}
    found = dict(compare_experts(folders))
    assert found["whole", "copy"].total == 0 and found["whole", "copy"].kind == "identical"
    assert found["whole", "half"].total == pytest.approx(2.1e-4, rel=0.2)
    for one in ("whole", "copy", "half"):
        assert found[one, "brain"].total == pytest.approx(1.65e-3, rel=0.1)
        assert found[one, "brain"].kind == "near-identical"
    arrays = dict(block=dict(a=np.full(9, 1, np.float32)))
    moved = dict(block=dict(a=np.full(9, 1 + 1.01 * NEAR_IDENTICAL, np.float32)))
    assert difference(arrays, moved).kind == "different"


def test_the_order_does_not_matter_and_zeros_are_equal():
    one = dict(a=dict(x=np.zeros(3)), b=dict(y=np.ones(2)))
    other = dict(a=dict(x=np.zeros(3)), b=dict(y=np.array([1.0, 2.0])))
    found = difference(one, other)
    assert found == difference(other, one)
    assert found.blocks["a"] == 0 and found.least == "a" and found.most == "b"
    assert found.total == pytest.approx(1 / np.sqrt(1 + 1.5**2))


def test_weights_that_are_not_finite_are_named(tmp_path):
    folders = {"good": save(tmp_path / "good"), "bad": save(tmp_path / "bad")}
    path = tmp_path / "bad" / "text_encoder" / "model.safetensors"
    tensors = read_tensors(path)
    tensors["text_model.final_layer_norm.bias"][3] = np.nan
    write_tensors(path, tensors)
    with pytest.raises(WeightsError, match=r"/bad/.* holds NaN or infinity"):
        list(compare_experts(folders))
