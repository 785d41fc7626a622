"""Diffusers folders: what is written comes back, and whatever is wrong with one is said by file and key."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from afa_jax.models.configs import ConfigError
from afa_jax.weights import folders
from afa_jax.weights.folders import save_folder
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae, open_checkpoint
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors
from tests import tiny
from tests.models import goldens

LOAD = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CASES = {"unet": "unet_1layer", "vae": "vae_f4", "text_encoder": "clip_sd15"}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "steps_offset": 1}


@pytest.fixture(scope="module")
def modules():
    return {
        "unet": goldens.unet("unet_1layer"),
        "vae": goldens.vae("vae_f4"),
        "text_encoder": goldens.text_encoder("clip_sd15"),
    }


@pytest.fixture(scope="module")
def saved(modules, tmp_path_factory):
    """A whole folder with the golden networks; tests only read it."""
    base = tmp_path_factory.mktemp("saved")
    (base / "tokens").mkdir()
    (base / "tokens" / "vocab.json").write_text("{}")
    folder = base / "new" / "model"
    save_folder(folder, **modules, tokenizer=base / "tokens", scheduler=SCHEDULER, metadata={"step": "7"})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """The same, to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def change(path, change_tensors):
    tensors = read_tensors(path)
    change_tensors(tensors)
    write_tensors(path, tensors)


def assert_same(loaded, expected):
    """Bit for bit, the structure and the dtypes included."""

    def check(ours, theirs):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))

    jax.tree.map(check, loaded, expected)


def test_the_folder_has_the_files_that_diffusers_expects(saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    configs = {f"{name}/config.json" for name in FILES}
    assert files == configs | {
        *FILES.values(),
        "model_index.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index == {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    assert open_checkpoint(saved).config("scheduler") == SCHEDULER
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", FILES)
def test_keys_shapes_and_values_are_pytorchs(saved, name):
    case = CASES[name]
    stored = read_tensors(saved / FILES[name])
    expected = goldens.weights(case, published=name == "text_encoder")
    assert stored.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(stored[key], value, err_msg=key)
    assert read_metadata(saved / FILES[name]) == {"format": "pt", "step": "7"}
    config, published = json.loads((saved / name / "config.json").read_text()), goldens.record(case)["config"]
    differing = {field for field in config.keys() & published.keys() if config[field] != published[field]}
    assert differing == set()
    assert config.keys() - published.keys() <= {"architectures"}


@pytest.mark.parametrize("name", FILES)
def test_float32_comes_back(saved, modules, name):
    assert_same(LOAD[name](saved), modules[name])


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_comes_back(variant, dtype, tmp_path):
    whole: dict[str, Any] = {"unet": tiny.unet(0), "vae": tiny.vae(0), "text_encoder": tiny.text_encoder(0)}
    save_folder(tmp_path / "model", **whole, dtype=dtype)
    for name, module in whole.items():
        file = tmp_path / "model" / FILES[name]
        assert {value.dtype for value in read_tensors(file).values()} == {np.dtype(dtype)}
        rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), module)
        # Variants are found under the names that diffusers gives them.
        file.rename(file.with_suffix(f".{variant}.safetensors"))
        assert_same(LOAD[name](tmp_path / "model", param_dtype=dtype), rounded)
        if name == "text_encoder":
            assert_same(
                load_text_encoder(tmp_path / "model"), jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)
            )


def test_parts_can_be_saved_alone(tmp_path, modules):
    save_folder(tmp_path / "model", text_encoder=modules["text_encoder"])
    assert json.loads((tmp_path / "model" / "model_index.json").read_text()).keys() == {"_class_name", "text_encoder"}
    with pytest.raises(WeightsError, match=r"model/unet/config\.json: no such file; is .*model a diffusers folder"):
        load_unet(tmp_path / "model")


def test_compute_and_parameter_dtypes_are_chosen_at_loading(saved):
    text = load_text_encoder(saved, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert text.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(text)} == {jnp.dtype(jnp.float16)}


# Other spellings of the same


@pytest.mark.parametrize("pixels", [False, True])
def test_old_vae_attention_is_read(copied, modules, pixels):
    tensors = goldens.weights("vae_f4", published=True)
    old = [key for key in tensors if key.rpartition(".")[0].endswith(("query", "key", "value", "proj_attn"))]
    assert len(old) == 16
    if pixels:  # as 1x1 convolutions
        tensors |= {key: tensors[key][:, :, None, None] for key in old if key.endswith("weight")}
    write_tensors(copied / FILES["vae"], tensors)
    assert_same(load_vae(copied), modules["vae"])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_both_spellings_of_the_text_encoder_are_read(copied, modules, prefix):
    tensors = {prefix + key: value for key, value in goldens.weights("clip_sd15").items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    write_tensors(copied / FILES["text_encoder"], tensors)
    assert_same(load_text_encoder(copied), modules["text_encoder"])


# Wrong folders


def missing(tensors):
    del tensors["text_model.encoder.layers.1.mlp.fc1.weight"], tensors["text_model.final_layer_norm.bias"]


def surplus(tensors):
    tensors["text_projection.weight"] = np.zeros((4, 4), np.float32)


def misshapen(tensors):
    tensors["text_model.encoder.layers.1.mlp.fc1.weight"] = np.zeros((32, 64), np.float32)


def integers(tensors):
    tensors["text_model.encoder.layers.0.mlp.fc1.bias"] = np.zeros(64, np.int8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            missing,
            r"2 missing \(text_model\.encoder\.layers\.1\.mlp\.fc1\.weight, text_model\.final_layer_norm\.bias\)",
        ),
        (surplus, r"1 surplus \(text_model\.text_projection\.weight\)"),
        (misshapen, r"1 misshapen \(.*layers\.1\.mlp\.fc1\.weight is \(32, 64\), expected \(64, 32\)\)"),
        (integers, r"1 not floating point \(text_model\.encoder\.layers\.0\.mlp\.fc1\.bias\)"),
    ],
)
def test_wrong_tensors_are_named(copied, spoil, message):
    change(copied / FILES["text_encoder"], spoil)
    with pytest.raises(WeightsError, match=rf"^{copied}/text_encoder/model\.safetensors: {message}$"):
        load_text_encoder(copied)


@pytest.mark.parametrize(
    ("name", "key"),
    [("unet", "up_blocks.2.resnets.1.conv1.weight"), ("vae", "decoder.mid_block.attentions.0.to_q.bias")],
)
def test_wrong_tensors_of_other_parts_are_named(copied, name, key):
    change(copied / FILES[name], lambda tensors: tensors.update({f"{key}s": tensors.pop(key)}))
    with pytest.raises(WeightsError, match=rf"{FILES[name]}: 1 missing \({key}\); 1 surplus \({key}s\)"):
        LOAD[name](copied)


def test_many_wrong_keys_are_counted(copied):
    write_tensors(copied / FILES["text_encoder"], {"text_model.final_layer_norm.bias": np.zeros(32, np.float32)})
    with pytest.raises(WeightsError, match=r"51 missing \(.* and 43 more\)$"):
        load_text_encoder(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-100], "not a complete safetensors file"),
        (lambda whole: whole[:100], "not a complete safetensors file"),
        (lambda whole: b"", "not a complete safetensors file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "not a complete safetensors file"),
        (None, "no such file"),
    ],
    ids=["truncated", "header", "empty", "pointer", "missing"],
)
def test_broken_files_are_named(copied, content, message):
    file = copied / FILES["vae"]
    whole = file.read_bytes()
    file.unlink()
    if content:
        file.write_bytes(content(whole))
    with pytest.raises(WeightsError, match=rf"^{file}: {message}"):
        load_vae(copied)


def test_pickles_are_refused(copied):
    file = copied / FILES["unet"]
    pickle = file.with_suffix(".bin")
    pickle.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    load_unet(copied)  # beside safetensors it does not matter
    file.unlink()
    with pytest.raises(WeightsError, match=rf"^{pickle}: pickled weights are refused.*Convert"):
        load_unet(copied)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_config_that_is_none_is_named(copied, text):
    file = copied / "text_encoder" / "config.json"
    file.unlink()
    if text:
        file.write_text(text)
    with pytest.raises(WeightsError, match=rf"^{file}: (not readable as JSON|expected a JSON object|no such file)"):
        load_text_encoder(copied)


def test_another_architecture_is_refused(copied):
    shutil.copy(copied / "vae" / "config.json", copied / "unet" / "config.json")
    with pytest.raises(ConfigError, match=rf"^{copied}/unet/config\.json: .*'UNet2DConditionModel'.*'AutoencoderKL'"):
        load_unet(copied)


# Writing


def test_an_existing_folder_stays(tmp_path, modules):
    (tmp_path / "model").mkdir()
    with pytest.raises(WeightsError, match=f"{tmp_path}/model exists"):
        save_folder(tmp_path / "model", text_encoder=modules["text_encoder"])
    assert [*tmp_path.rglob("*")] == [tmp_path / "model"]


@pytest.mark.parametrize("writer", ["write_tensors", "write_json"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, modules, writer):
    whole, calls = getattr(folders, writer), []

    def second_fails(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(b"half")
            raise OSError("disk full")
        whole(path, *rest)

    monkeypatch.setattr(folders, writer, second_fails)
    parts = {"vae": modules["vae"], "text_encoder": modules["text_encoder"]}
    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "model", **parts)
    assert [*tmp_path.iterdir()] == []
    # What a killed run left is no obstacle.
    partial = calls[0].parent.parent
    (partial / "unet").mkdir(parents=True)
    save_folder(tmp_path / "model", **parts)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "unet").exists()
