"""Diffusers folders: what is written comes back, and whatever is wrong with one is said by file and key."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from afa_jax import files
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.models.configs import ConfigError, UNetConfig, VAEConfig
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats import folders
from afa_jax.weights.formats.folders import FolderCheckpoint, save_folder, write_folder
from afa_jax.weights.json_files import read_json
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae
from afa_jax.weights.opened import open_checkpoint, text_config, unet_config, vae_config
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors
from tests import tiny
from tests.models import goldens

TOKENIZER = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji" / "tokenizer"

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
    folder = base / "new" / "model"
    save_folder(folder, **modules, tokenizer=TOKENIZER, scheduler=SCHEDULER, metadata={"step": "7"})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """The same, to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def text_only(saved, tmp_path):
    """A folder with the text encoder alone, which is small, to spoil."""
    shutil.copytree(saved / "text_encoder", tmp_path / "model" / "text_encoder")
    shutil.copy(saved / "model_index.json", tmp_path / "model")
    return tmp_path / "model"


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
        *(f"tokenizer/{path.name}" for path in TOKENIZER.iterdir()),
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


def test_a_vae_that_says_that_it_overflows_float16_is_float32(copied):
    """``force_upcast``, as Stable Diffusion XL's has it; bfloat16 does not overflow."""
    config = copied / "vae" / "config.json"
    for upcast, asked, expected in (
        (True, "float16", "float32"),
        (False, "float16", "float16"),
        (True, "bfloat16", "bfloat16"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(force_upcast=upcast)))
        vae = load_vae(copied, dtype=jnp.dtype(asked), param_dtype=jnp.dtype(asked))
        assert {jnp.dtype(vae.dtype)} | {leaf.dtype for leaf in jax.tree.leaves(vae)} == {jnp.dtype(expected)}


def test_a_kernel_of_more_than_one_pixel_is_not_cut(copied):
    key = "decoder.mid_block.attentions.0.to_q.weight"
    change(copied / FILES["vae"], lambda tensors: tensors.update({key: tensors[key][:, :, None, None].repeat(3, 2)}))
    with pytest.raises(WeightsError, match=rf"1 misshapen \({key} is \(.*3, 1\)"):
        load_vae(copied)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_network_may_be_the_folder_itself(saved, modules, tmp_path, name):
    folder = shutil.copytree(saved / name, tmp_path / "alone")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.components == (name,)
    assert checkpoint.what(name) == f"{folder}/diffusion_pytorch_model.safetensors"
    assert checkpoint.what(name, config=True) == f"{folder}/config.json"
    assert checkpoint.sha256(name) == open_checkpoint(saved).sha256(name)
    assert_same(LOAD[name](checkpoint), modules[name])
    as_variant(folder / "diffusion_pytorch_model.safetensors", "fp16")
    assert_same(LOAD[name](open_checkpoint(folder, variant="fp16")), modules[name])
    with pytest.raises(WeightsError, match=rf"^{folder}/text_encoder/config\.json: no such file"):
        load_text_encoder(folder)


def test_another_config_in_a_folder_makes_no_network(saved, tmp_path):
    folder = shutil.copytree(saved / "text_encoder", tmp_path / "clip")
    with pytest.raises(WeightsError, match=r"clip is a folder of single files \(model\.safetensors\)"):
        open_checkpoint(folder)
    shutil.copytree(saved / "vae", tmp_path / "clip" / "vae")
    shutil.copy(saved / "unet" / "config.json", folder)
    assert open_checkpoint(folder).components == ("vae",)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_both_spellings_of_the_text_encoder_are_read(copied, modules, prefix):
    tensors = {prefix + key: value for key, value in goldens.weights("clip_sd15").items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    write_tensors(copied / FILES["text_encoder"], tensors)
    assert_same(load_text_encoder(copied), modules["text_encoder"])


# Variants


def as_variant(file, variant):
    """The file under its variant's name."""
    return file.rename(file.with_suffix(f".{variant}.safetensors"))


def test_the_variant_that_is_asked_for_is_read(copied, modules):
    file = copied / FILES["text_encoder"]
    plain, stored = read_tensors(file), {}
    for i, variant in enumerate(("fp16", "my-own_1.5")):
        stored[variant] = {key: value + i + 1 for key, value in plain.items()}
        write_tensors(file.with_name(f"model.{variant}.safetensors"), stored[variant])
    assert_same(load_text_encoder(open_checkpoint(copied)), modules["text_encoder"])
    file.unlink()
    for variant, expected in stored.items():
        checkpoint = FolderCheckpoint(copied, variant)
        found = checkpoint.tensors("text_encoder")
        assert all(np.array_equal(found[key], value) for key, value in expected.items())
        assert checkpoint.what("text_encoder") == f"{copied}/text_encoder/model.{variant}.safetensors"
        # A component that has no variants at all: its plain file, as in diffusers.
        assert checkpoint.what("vae") == f"{copied}/{FILES['vae']}"
    several = r"text_encoder: several variants \(fp16, my-own_1\.5\); choose one with variant$"
    with pytest.raises(WeightsError, match=rf"^{copied}/{several}"):
        load_text_encoder(copied)


def test_the_only_variant_is_read_and_said(text_only, modules):
    only = as_variant(text_only / FILES["text_encoder"], "non_ema")
    assert_same(load_text_encoder(text_only), modules["text_encoder"])
    assert open_checkpoint(text_only).what("text_encoder") == str(only)


def test_a_variant_that_is_not_there_lists_those_that_are(copied):
    as_variant(copied / FILES["unet"], "fp16")
    for component, found in (("unet", "fp16"), ("vae", "one without a variant")):
        with pytest.raises(WeightsError, match=rf"^{copied}/{component}: no variant 'bf16'; there is {found}$"):
            open_checkpoint(copied, variant="bf16").tensors(component)
    as_variant(copied / FILES["vae"], "non_ema")
    with pytest.raises(WeightsError, match=r"vae: no variant 'fp16'; there is non_ema$"):
        open_checkpoint(copied, variant="fp16").tensors("vae")


def test_a_component_without_the_variant_is_its_plain_file_whatever_else_it_has(copied):
    """SD1.5's repository: the U-Net as non_ema, the others as fp16, and all of them plain."""
    for name, variant in (("unet", "non_ema"), ("unet", "fp16"), ("vae", "fp16"), ("text_encoder", "fp16")):
        shutil.copy(copied / FILES[name], (copied / FILES[name]).with_suffix(f".{variant}.safetensors"))
    checkpoint = open_checkpoint(copied, variant="non_ema")
    assert checkpoint.what("unet").endswith("/diffusion_pytorch_model.non_ema.safetensors")
    for name in ("vae", "text_encoder"):
        assert checkpoint.what(name) == f"{copied}/{FILES[name]}"


# Shards


def split(file, index, shards, count=3):
    """Replace a file by ``count`` shards and their index."""
    tensors = read_tensors(file)
    names = [shards.format(i + 1) for i in range(count)]
    weight_map = {key: names[i % count] for i, key in enumerate(tensors)}
    for name in names:
        write_tensors(file.with_name(name), {key: tensors[key] for key in tensors if weight_map[key] == name})
    file.with_name(index).write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=weight_map)))
    file.unlink()
    return file.with_name(index)


@pytest.mark.parametrize(
    ("variant", "index", "shards"),
    [
        (None, "safetensors.index.json", "-0000{}-of-00003.safetensors"),
        ("fp16", "safetensors.index.fp16.json", ".fp16-0000{}-of-00003.safetensors"),
        ("fp16", "fp16.safetensors.index.json", ".fp16-0000{}-of-00003.safetensors"),
        ("fp16", "safetensors.fp16.index.json", "-0000{}-of-00003.fp16.safetensors"),
    ],
)
def test_shards_are_one_state_dict(text_only, modules, variant, index, shards):
    path = split(text_only / FILES["text_encoder"], f"model.{index}", f"model{shards}")
    for checkpoint in (open_checkpoint(text_only), open_checkpoint(text_only, variant=variant)):
        assert checkpoint.what("text_encoder") == str(path)
        assert_same(load_text_encoder(checkpoint), modules["text_encoder"])


@pytest.fixture
def sharded(text_only):
    """A text encoder in three shards: its folder, and its index."""
    path = split(text_only / FILES["text_encoder"], "model.safetensors.index.json", "model-0000{}-of-00003.safetensors")
    return text_only, path


def test_the_hash_is_of_the_tensors_however_they_are_stored(sharded, saved):
    folder, _ = sharded
    one = open_checkpoint(saved).sha256("text_encoder")
    assert open_checkpoint(folder).sha256("text_encoder") == one
    write_tensors(saved / FILES["text_encoder"], read_tensors(saved / FILES["text_encoder"]), {"title": "other"})
    assert open_checkpoint(saved).sha256("text_encoder") == one
    hashes = {one}
    for i in (1, 2, 3):
        shard = folder / "text_encoder" / f"model-0000{i}-of-00003.safetensors"
        change(shard, lambda tensors: tensors.update({key: value + 1 for key, value in tensors.items()}))
        hashes.add(open_checkpoint(folder).sha256("text_encoder"))
    assert len(hashes) == 4


def test_shards_in_the_hubs_cache_are_links_that_leave_the_folder(sharded, modules, tmp_path):
    folder, _ = sharded
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(list((folder / "text_encoder").iterdir())):
        file.symlink_to(file.rename(tmp_path / "blobs" / str(i)))
    assert_same(load_text_encoder(folder), modules["text_encoder"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../secret.safetensors", "is not the name of a file beside it"),
        ("/etc/secret.safetensors", "is not the name of a file beside it"),
        ("sub/model.safetensors", "is not the name of a file beside it"),
        ("..\\secret.safetensors", "is not the name of a file beside it"),
        ("C:secret.safetensors", "is not the name of a file beside it"),
        ("..", "is not the name of a file beside it"),
        ("", "is not the name of a file beside it"),
        ("pytorch_model-00001-of-00003.bin", "is a pickle"),
        ("model.txt", "is not a safetensors file"),
        ("a\nb.safetensors", "1 missing"),
        ("model-00004-of-00004.safetensors", r"1 missing \(model-00004-of-00004\.safetensors\) of 4 files"),
    ],
)
def test_an_index_may_name_files_beside_it_only(sharded, name, message):
    folder, path = sharded
    (folder / "secret.safetensors").touch()
    index = json.loads(path.read_text())
    index["weight_map"]["text_model.final_layer_norm.bias"] = name
    path.write_text(json.dumps(index))
    for read in (load_text_encoder, lambda folder: open_checkpoint(folder).sha256("text_encoder")):
        with pytest.raises(WeightsError, match=rf"^{path}: .*{message}") as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[", ""]
)
def test_an_index_that_is_none_is_named(sharded, text):
    folder, path = sharded
    path.write_text(text)
    with pytest.raises(WeightsError, match=f"^{path}: "):
        load_text_encoder(folder)


def test_index_and_shards_must_agree(sharded):
    folder, path = sharded
    index = json.loads(path.read_text())
    key = "text_model.final_layer_norm.bias"
    was = index["weight_map"].pop(key)
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"^{path}: 1 surplus \({key} in {was}\)"):
        load_text_encoder(folder)
    other = next(name for name in index["weight_map"].values() if name != was)
    index["weight_map"][key] = other
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"1 missing \({key} in {other}\); 1 surplus \({key} in {was}\)"):
        load_text_encoder(folder)


# Old folders


def test_configs_of_2022_are_read_as_diffusers_reads_them(tmp_path):
    """SD1.4's: no field that is younger, a sample_size that was a slip, and a scheduler that was told to clip."""
    parts = {
        "unet/config.json": dict(
            _class_name="UNet2DConditionModel",
            _diffusers_version="0.2.2",
            act_fn="silu",
            attention_head_dim=8,
            block_out_channels=[320, 640, 1280, 1280],
            center_input_sample=False,
            cross_attention_dim=768,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            downsample_padding=1,
            flip_sin_to_cos=True,
            freq_shift=0,
            in_channels=4,
            layers_per_block=2,
            mid_block_scale_factor=1,
            norm_eps=1e-05,
            norm_num_groups=32,
            out_channels=4,
            sample_size=32,
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        ),
        "vae/config.json": dict(
            _class_name="AutoencoderKL",
            _diffusers_version="0.2.2",
            act_fn="silu",
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            in_channels=3,
            latent_channels=4,
            layers_per_block=2,
            out_channels=3,
            sample_size=512,
            up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        "scheduler/scheduler_config.json": dict(
            _class_name="DDIMScheduler",
            _diffusers_version="0.2.2",
            beta_end=0.012,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            clip_sample=True,
            num_train_timesteps=1000,
            set_alpha_to_one=False,
        ),
    }
    for name, fields in parts.items():
        folders.write_json(tmp_path / name, fields)
    checkpoint = open_checkpoint(tmp_path)
    assert unet_config(checkpoint) == UNetConfig()
    assert vae_config(checkpoint) == VAEConfig()
    assert NoiseSchedule.from_json(checkpoint.config("scheduler")) == NoiseSchedule()


def test_a_small_unet_of_today_keeps_its_size(copied):
    assert unet_config(open_checkpoint(copied)).sample_size == goldens.unet("unet_1layer").config.sample_size < 64


@pytest.mark.parametrize("both", [False, True])
def test_the_text_half_of_a_whole_clip_config_is_read(text_only, modules, both):
    """With text_config_dict over text_config, and what transformers leaves out as its defaults."""
    file = text_only / "text_encoder" / "config.json"
    fields = json.loads(file.read_text())
    wrong = dict(hidden_size=64, num_attention_heads=2, intermediate_size=None)
    nested = dict(text_config=fields | wrong, text_config_dict=fields) if both else dict(text_config=fields)
    file.write_text(json.dumps(dict(model_type="clip", architectures=["CLIPModel"], **nested)))
    assert_same(load_text_encoder(text_only), modules["text_encoder"])
    file.write_text(json.dumps(dict(model_type="clip", text_config=dict(hidden_size=1024))))
    found = text_config(text_only)
    assert (found.hidden_size, found.intermediate_size, found.num_attention_heads) == (1024, 2048, 8)


# Wrong folders


def missing(tensors):
    del tensors["text_model.encoder.layers.1.mlp.fc1.weight"], tensors["text_model.final_layer_norm.bias"]


def surplus(tensors):
    tensors["text_pooler.weight"] = np.zeros((4, 4), np.float32)


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
        (surplus, r"1 surplus \(text_model\.text_pooler\.weight\)"),
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
    with pytest.raises(WeightsError, match=r"51 missing \(.* and 46 more\)$"):
        load_text_encoder(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-100], "not a complete safetensors file"),
        (lambda whole: whole[:100], "not a complete safetensors file"),
        (lambda whole: b"", "not a complete safetensors file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "this is a git-lfs pointer"),
        (lambda whole: b"\xff" * 8 + whole[8:], "not a complete safetensors file"),
        (lambda whole: (len(whole) - 7).to_bytes(8, "little") + whole[8:], "not a complete safetensors file"),
        (lambda whole: whole + b"\0", "not a complete safetensors file"),
        (None, "no such file"),
    ],
    ids=["truncated", "header", "empty", "pointer", "enormous header", "header beyond the file", "longer", "missing"],
)
def test_broken_files_are_named(copied, content, message):
    file = copied / FILES["vae"]
    whole = file.read_bytes()
    file.unlink()
    if content:
        file.write_bytes(content(whole))
    with pytest.raises(WeightsError, match=rf"^{file}: {message}"):
        load_vae(copied)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(text_only, tmp_path, value):
    key = "text_model.final_layer_norm.bias"
    change(text_only / FILES["text_encoder"], lambda tensors: tensors[key].__setitem__(3, value))
    for use in (load_text_encoder, lambda folder: write_folder(tmp_path / "new", open_checkpoint(folder))):
        with pytest.raises(
            WeightsError, match=rf"^{text_only}/text_encoder/model\.safetensors: {key} holds NaN or inf"
        ):
            use(text_only)
    assert not (tmp_path / "new").exists()


def test_two_spellings_of_one_tensor_are_refused(copied):
    old, new = (f"decoder.mid_block.attentions.0.{name}.bias" for name in ("query", "to_q"))
    change(copied / FILES["vae"], lambda tensors: tensors.update({old: tensors[new]}))
    with pytest.raises(WeightsError, match=rf"^{copied}/{FILES['vae']}: some tensors are there under two names"):
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
    (tmp_path / "model" / "a").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path}/model exists; choose another name, or --overwrite"):
        save_folder(tmp_path / "model", text_encoder=modules["text_encoder"])
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_the_writing_stays(tmp_path, monkeypatch, text_only, overwrite):
    whole, target = folders.write_tensors, tmp_path / "new"

    def meanwhile(path, *rest, **how):
        whole(path, *rest, **how)
        target.mkdir()
        (target / "mine.txt").write_text("mine")

    monkeypatch.setattr(folders, "write_tensors", meanwhile)
    with pytest.raises(InputError, match=f"^{target}( exists|: not overwritten)"):
        write_folder(target, open_checkpoint(text_only), overwrite=overwrite)
    assert content(target) == {"mine.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    # And if it appears between the last look and the rename, the rename itself fails.
    shutil.rmtree(target)
    monkeypatch.setattr(folders, "check_target", lambda *_: None)
    monkeypatch.setattr(files, "check_new", lambda *_: None)
    with pytest.raises(InputError, match=f"^{target} cannot be written \\(Directory not empty"):
        write_folder(target, open_checkpoint(text_only))
    assert content(target) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("out", "overwrite", "message"),
    [
        ("file/model", False, "cannot be written (Not a directory"),
        ("n" * 250, False, "cannot be written (File name too long"),
        ("n" * 300, False, "cannot be written (File name too long"),
        (".", True, "not overwritten, for it has no model_index.json"),
        ("model/..", True, "not overwritten, for it has no model_index.json"),
        ("/", True, "not overwritten, for it has no model_index.json"),
        ("/proc/x", False, "cannot be written (No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, text_only, monkeypatch, out, overwrite, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        write_folder(out, open_checkpoint(text_only), overwrite=overwrite)
    assert str(error.value).startswith(os.path.realpath(out)) and message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_the_folder_one_is_in_can_be_written(text_only, monkeypatch):
    monkeypatch.chdir(text_only)
    write_folder(".", open_checkpoint(text_only), overwrite=True)
    assert set(content(text_only)) == {"model_index.json", "text_encoder/config.json", FILES["text_encoder"]}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_input_error(tmp_path, monkeypatch, text_only, code):
    def full(path, *rest, **how):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(folders, "write_tensors", full)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        write_folder(tmp_path / "new", open_checkpoint(text_only))
    assert error.value.errno == code
    assert not (tmp_path / "new").exists()


def test_the_partial_folders_of_the_dead_are_removed(tmp_path, text_only):
    with subprocess.Popen(["true"]) as dead, subprocess.Popen(["true"]) as other:
        dead.wait(), other.wait()
    names = {
        f".new.{dead.pid}.partial": False,
        f".new.{os.getpid()}.partial": False,
        f".new.{os.getppid()}.partial": True,
        f".new.{other.pid}.partial": True,  # another machine's, which is writing it
        ".new.mine.partial": True,
        f".new.1.{dead.pid}.partial": True,  # of an output new.1
    }
    for name in names:
        (tmp_path / name / "unet").mkdir(parents=True)
        if name != f".new.{other.pid}.partial":
            for path in (tmp_path / name, tmp_path / name / "unet"):
                os.utime(path, (time.time() - 3600,) * 2)
    write_folder(tmp_path / "new", open_checkpoint(text_only))
    left = {path.name for path in tmp_path.iterdir()} - {"model", "new"}
    assert left == {name for name, stays in names.items() if stays}


# What the folder says


@pytest.mark.parametrize(
    ("channels", "pipeline"),
    [
        (4, "StableDiffusionPipeline"),
        (8, "StableDiffusionInstructPix2PixPipeline"),
        (9, "StableDiffusionInpaintPipeline"),
    ],
)
def test_the_pipeline_is_the_one_of_the_unets_task(tmp_path, channels, pipeline):
    unet = tiny.unet(0, dataclasses.replace(tiny.MICRO_UNET, in_channels=channels))
    save_folder(tmp_path / "model", unet=unet)
    assert read_json(tmp_path / "model" / "model_index.json")["_class_name"] == pipeline
    assert_same(load_unet(tmp_path / "model"), unet)


def test_the_header_does_not_say_what_was_true_of_another_file(tmp_path, text_only):
    old = {"format": "np", "modelspec.hash_sha256": "0x1", "afa_jax.configs": "{}", "modelspec.title": "a title"}
    file = text_only / FILES["text_encoder"]
    write_tensors(file, read_tensors(file), old)
    write_folder(tmp_path / "new", open_checkpoint(text_only), metadata={"mine": "1"})
    expected = {"format": "pt", "modelspec.title": "a title", "mine": "1"}
    assert read_metadata(tmp_path / "new" / FILES["text_encoder"]) == expected


def test_of_a_tokenizers_folder_the_tokenizer_is_copied(tmp_path, text_only):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, text_only)
    (text_only / "README.md").write_text("read me")
    model = dataclasses.replace(MemoryCheckpoint.of(), tokenizer=text_only)
    write_folder(tmp_path / "new", model)
    assert set(content(tmp_path / "new")) == {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}


def test_weights_too_large_for_the_dtype_are_named(tmp_path, text_only):
    key = "text_model.final_layer_norm.bias"
    change(text_only / FILES["text_encoder"], lambda tensors: tensors[key].__setitem__(3, 1e5))
    with pytest.raises(WeightsError, match=f"{key} holds values too large for float16; choose bfloat16 or float32"):
        write_folder(tmp_path / "new", open_checkpoint(text_only), dtype=np.float16)
    assert not (tmp_path / "new").exists()


def test_configs_are_read_before_a_tensor_is_written(tmp_path, copied, monkeypatch):
    (copied / "scheduler" / "scheduler_config.json").write_text("{")
    monkeypatch.setattr(folders, "write_tensors", lambda *_, **__: pytest.fail("a tensor was written"))
    with pytest.raises(WeightsError, match=r"scheduler_config\.json: not readable"):
        write_folder(tmp_path / "new", open_checkpoint(copied))


@pytest.mark.parametrize("writer", ["write_tensors", "write_json"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, modules, writer):
    whole, calls = getattr(folders, writer), []

    def second_fails(path, *rest, **how):
        calls.append(path)
        if len(calls) == 2:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(b"half")
            raise OSError("disk full")
        whole(path, *rest, **how)

    monkeypatch.setattr(folders, writer, second_fails)
    parts = {"vae": modules["vae"], "text_encoder": modules["text_encoder"]}
    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "model", **parts)
    assert [*tmp_path.iterdir()] == []


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_overwritten_if_asked_even_from_itself(text_only, tmp_path):
    checkpoint = open_checkpoint(text_only)
    write_folder(text_only, checkpoint, overwrite=True)
    whole = content(text_only)
    assert set(whole) == {"model_index.json", "text_encoder/config.json", FILES["text_encoder"]}
    (text_only / "text_encoder" / "notes.txt").write_text("of the old one")
    (tmp_path / "link").symlink_to(text_only)
    write_folder(tmp_path / "link", checkpoint, overwrite=True)
    assert content(text_only) == whole
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_a_diffusers_folder_is_not_overwritten(tmp_path, modules, kind):
    target = tmp_path / "home"
    if kind == "folder":
        target.mkdir()
    mine = target / "thesis.txt" if kind == "folder" else target
    mine.write_text("mine")
    with pytest.raises(InputError, match=rf"^{target}: not overwritten, for it has no model_index\.json"):
        write_folder(target, MemoryCheckpoint.of(text_encoder=modules["text_encoder"]), overwrite=True)
    assert mine.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_no_pipeline_has_is_not_overwritten(text_only, tmp_path):
    for name in ("safety_checker", "feature_extractor", "image_encoder", "samples", ".git"):
        (text_only / name).mkdir()
    (text_only / "README.md").write_text("mine")
    old, others = content(text_only), r"3 other entries \(\.git, README\.md, samples\)"
    with pytest.raises(InputError, match=rf"^{text_only}: not overwritten, for it has {others}; move them away"):
        write_folder(text_only, open_checkpoint(text_only), overwrite=True)
    assert content(text_only) == old
    (text_only / "README.md").unlink()
    for name in ("samples", ".git"):
        (text_only / name).rmdir()
    write_folder(text_only, open_checkpoint(text_only), overwrite=True)
    assert sorted(path.name for path in text_only.iterdir()) == ["model_index.json", "text_encoder"]


def test_a_folder_that_could_not_be_replaced_stays(text_only, tmp_path, monkeypatch, modules):
    old, whole, calls = content(text_only), Path.rename, []

    def second_fails(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no")
        return whole(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    new = MemoryCheckpoint.of(text_encoder=modules["text_encoder"])
    with pytest.raises(OSError, match="no"):
        write_folder(text_only, new, overwrite=True)
    assert content(text_only) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # Killed between the two renames: the old folder is back before anything else is done.
    whole(text_only, tmp_path / ".model.replaced")
    with pytest.raises(InputError, match=f"{text_only} exists"):
        write_folder(text_only, new)
    assert content(text_only) == old
