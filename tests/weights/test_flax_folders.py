"""Folders that Flax classes wrote: PyTorch's keys, layouts and values, bit for bit, and what is no such file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import Any

import ml_dtypes
import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict

from afa_jax.weights.formats import flax_folders
from afa_jax.weights.formats.flax_folders import open_flax, pytorch_key
from afa_jax.weights.formats.folders import FolderCheckpoint, write_folder
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae
from afa_jax.weights.tensors import WeightsError, read_metadata
from tests.models import goldens
from tests.weights.test_folders import assert_same

# component: the folder in tests/goldens, the case whose weights it has
FOLDERS = {
    "unet": ("unet_flax_folder", "unet_flax_folder"),
    "vae": ("vae_flax_folder", "vae_flax_folder"),
    "text_encoder": ("clip_flax_folder", "clip_sd15"),
}
LOAD = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
ONES = np.ones(2, np.float32)
MODULE = {"unet": goldens.unet, "vae": goldens.vae, "text_encoder": goldens.text_encoder}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three components as the Flax pipeline saves it; tests only read it."""
    whole = tmp_path_factory.mktemp("flax") / "model"
    for component, (saved, _) in FOLDERS.items():
        shutil.copytree(goldens.GOLDENS / saved, whole / component)
    (whole / "scheduler").mkdir()
    scheduler = dict(_class_name="FlaxPNDMScheduler", beta_start=0.00085, skip_prk_steps=True)
    (whole / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (whole / "model_index.json").write_text(json.dumps(dict(_class_name="FlaxStableDiffusionPipeline")))
    return whole


@pytest.mark.parametrize("component", FOLDERS)
def test_the_state_dict_is_pytorchs(folder, component):
    case = FOLDERS[component][1]
    found, expected = FolderCheckpoint(folder).tensors(component), goldens.weights(case)
    prefix = "text_model." if component == "text_encoder" else ""
    assert found.keys() == {prefix + key for key in expected}
    for key, value in expected.items():
        tensor = found[prefix + key]
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(tensor.read(), value, err_msg=key)


@pytest.mark.parametrize("component", FOLDERS)
def test_the_network_is_the_one_of_pytorchs_folder(folder, component):
    loaded: Any = LOAD[component](folder)
    expected: Any = MODULE[component](FOLDERS[component][1])
    assert_same(loaded, expected)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(expected.config)


def test_it_is_written_as_a_pytorch_folder(folder, tmp_path):
    checkpoint = FolderCheckpoint(folder)
    assert checkpoint.components == ("unet", "vae", "text_encoder", "scheduler")
    write_folder(tmp_path / "model", checkpoint)
    written = FolderCheckpoint(tmp_path / "model")
    for component in FOLDERS:
        ours, theirs = written.tensors(component), checkpoint.tensors(component)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key].read(), theirs[key].read()) for key in ours)
    configs = [json.loads((tmp_path / "model" / name / "config.json").read_text()) for name in ("unet", "vae")]
    assert [config["_class_name"] for config in configs] == ["UNet2DConditionModel", "AutoencoderKL"]
    assert "use_memory_efficient_attention" not in configs[0]
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert read_metadata(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors") == {"format": "pt"}


def test_safetensors_come_first(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "both")
    checkpoint = FolderCheckpoint(tmp_path / "both")
    assert checkpoint.what("vae") == f"{tmp_path}/both/vae/diffusion_flax_model.msgpack"
    (tmp_path / "both" / "vae" / "diffusion_pytorch_model.safetensors").touch()
    assert checkpoint.what("vae") == f"{tmp_path}/both/vae/diffusion_pytorch_model.safetensors"
    assert checkpoint.what("unet") == f"{tmp_path}/both/unet/diffusion_flax_model.msgpack"
    with pytest.raises(WeightsError, match=r"both/unet: no variant 'fp16'; there is unet/diffusion_flax_model"):
        FolderCheckpoint(tmp_path / "both", "fp16").tensors("unet")


# What Flax itself writes


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_dtype_is_read_as_stored(tmp_path, dtype):
    """As on the hub's bf16 branches."""
    array = np.arange(12).reshape(3, 4).astype(dtype)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.to_bytes({"proj": {"kernel": array, "bias": array[0]}}))
    tensors = open_flax(path).tensors
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} == {
        "proj.weight": ((4, 3), np.dtype(dtype)),
        "proj.bias": ((4,), np.dtype(dtype)),
    }
    assert tensors["proj.weight"].read().tobytes() == np.ascontiguousarray(array.T).tobytes()
    assert tensors["proj.bias"].read().tobytes() == array[0].tobytes()


def test_arrays_in_chunks_are_joined(tmp_path, monkeypatch):
    """Flax cuts an array above a gigabyte; here above 40 bytes."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    array = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.to_bytes({"a": {"embedding": array}, "b": {"kernel": array}}))
    assert path.read_bytes().count(b"__msgpack_chunked_array__") == 2
    tensors = open_flax(path).tensors
    np.testing.assert_array_equal(tensors["a.weight"].read(), array)
    np.testing.assert_array_equal(tensors["b.weight"].read(), array.T)


def test_every_length_is_read(tmp_path):
    """Each is spelled in another way: short and long names, maps and arrays, and arrays of 1, 2, 4, ... bytes."""
    tree = {"a" * n: {"scale": np.arange(n, dtype=np.float32)} for n in (1, 31, 32, 255, 256, 70000)}
    tree |= {f"k{i}": {"bias": np.zeros((0, i), np.float16)} for i in range(20)}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.to_bytes(tree))
    tensors = open_flax(path).tensors
    expected = {pytorch_key(".".join(name)): value for name, value in flatten_dict(tree).items()}
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[key].read(), value) for key, value in expected.items())
    path.write_bytes(b"\xdf\0\0\0\x01\xdb\0\0\0\x01a" + GOOD)
    np.testing.assert_array_equal(open_flax(path).tensors["a.bias"].read(), ONES)


@pytest.mark.parametrize(
    ("flax", "pytorch"),
    [
        ("conv_in.kernel", "conv_in.weight"),
        ("time_embedding.linear_1.bias", "time_embedding.linear_1.bias"),
        ("down_blocks_0.attentions_11.norm.scale", "down_blocks.0.attentions.11.norm.weight"),
        ("a.transformer_blocks_0.attn1.to_out_0.kernel", "a.transformer_blocks.0.attn1.to_out.0.weight"),
        ("a.ff.net_0.proj.kernel", "a.ff.net.0.proj.weight"),
        ("a.ff.net_2.bias", "a.ff.net.2.bias"),
        ("decoder.up_blocks_3.upsamplers_0.conv.kernel", "decoder.up_blocks.3.upsamplers.0.conv.weight"),
        ("text_model.encoder.layers.0.layer_norm1.scale", "text_model.encoder.layers.0.layer_norm1.weight"),
        ("my_net_0.kernel", "my_net_0.weight"),
    ],
)
def test_keys(flax, pytorch):
    assert pytorch_key(flax) == pytorch


# Other files


def packed(tree: Any) -> bytes:
    return serialization.to_bytes(tree)


def array(*values: Any) -> bytes:
    """A map of one bias whose array is ``values`` rather than what Flax puts there."""
    return msgpack.packb({"bias": msgpack.ExtType(1, msgpack.packb(values))})


def deep(levels: int) -> bytes:
    return b"\x81\xa1a" * levels + b"\x01"


GOOD = packed({"bias": ONES})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (GOOD[:-1], "1 bytes are missing"),
        (GOOD + b"\x01", "1 bytes too many"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"PK\x03\x04" + 40 * b"\0", "a pickle"),
        (b"\x80\x04\x95" + 40 * b"\0", "a pickle"),
        (msgpack.packb([1.5]), "a value of type 0xcb"),
        (msgpack.packb({"bias": None}), "a value of type 0xc0"),
        (msgpack.packb({"bias": 3}), "bias is not an array"),
        (msgpack.packb({"a": {"bias": "text"}}), "a.bias is not an array"),
        (msgpack.packb(3), "its value is not an array"),
        (msgpack.packb({"bias": msgpack.ExtType(2, b"12")}), "an extension of type 2"),
        (msgpack.packb({1: 2}), "the name 1 at byte"),
        (msgpack.packb({"a\nb": 2}), r"the name 'a\nb' at byte"),
        (b"\x82\xa1a\x01\xa1a\x01", "the name 'a' at byte"),
        (b"\xdf\xff\xff\xff\xff", "1 bytes are missing"),
        (b"\xdd\xff\xff\xff\xff", "a list of 4294967295"),
        (b"\xa3\xff\xff\xff", "byte 0 is no UTF-8"),
        (deep(1000), "nested more than 32 deep"),
        (b"\x98" * 40, "nested more than 32 deep"),
        (array([2], "float32", b"1234"), "is not whole"),
        (array([2], "object", b"12345678"), "is not whole"),
        (array([-1], "float32", b"1234"), "a value of type 0xff"),
        (array(["1"], "float32", b"1234"), "is not whole"),
        (array([1], "float32", "1234"), "is not whole"),
        (array([1], "float32", [1, 5]), "is not whole"),
        (array([True], "float32", b"1234"), "is not whole"),
        (array([1], "float32"), "is not whole"),
        (array([1 << 62] * 8, "float32", b""), "is not whole"),
        (msgpack.packb({"bias": msgpack.ExtType(1, msgpack.packb([[1], "float32", b"1234"]) + b"1")}), "is not whole"),
        (packed({"kernels": ONES}), "kernels is not a parameter that PyTorch has"),
        (packed({"a": {"kernel": ONES, "scale": ONES}}), "two parameters would be a.weight"),
        (msgpack.packb({"bias": {"__msgpack_chunked_array__": True}}), "an array in chunks is not complete"),
        (
            packed({"bias": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": ONES}}}),
            "an array in chunks is not complete",
        ),
    ],
)
def test_other_files_are_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"^{path}: not a whole file of a Flax model \(.*{re.escape(message)}"):
        open_flax(path)


def test_a_chunk_map_with_other_keys_is_refused(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    for chunks in ({"1": ONES}, {"0": 3}, 3, {}):
        path.write_bytes(packed({"bias": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": chunks}}))
        with pytest.raises(WeightsError, match="an array in chunks is not complete"):
            open_flax(path)


def test_the_number_of_values_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(packed({f"a{i}": {"bias": ONES} for i in range(100)}))
    assert len(open_flax(path).tensors) == 100
    monkeypatch.setattr(flax_folders, "_MOST", 500)
    with pytest.raises(WeightsError, match="more than 500 values"):
        open_flax(path)


def test_a_missing_file_and_a_file_that_shrinks_are_named(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    with pytest.raises(WeightsError, match=f"^{path}: no such file$"):
        open_flax(path)
    path.write_bytes(GOOD)
    tensor = open_flax(path).tensors["bias"]
    path.write_bytes(GOOD[:-4])
    with pytest.raises(WeightsError, match=f"^{path}: changed since it was opened"):
        tensor.read()


def test_missing_parameters_are_named(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "model" / "vae")
    path = tmp_path / "model" / "vae" / "diffusion_flax_model.msgpack"
    tree = serialization.msgpack_restore(path.read_bytes())
    del tree["encoder"]["mid_block"]["attentions_0"]["query"]["kernel"]
    path.write_bytes(packed(tree))
    with pytest.raises(WeightsError, match=rf"^{path}: 1 missing \(encoder\.mid_block\.attentions\.0\.to_q\.weight\)$"):
        load_vae(tmp_path / "model")
