"""Safetensors files are written at once or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from afa_jax.errors import InputError
from afa_jax.weights import tensors
from afa_jax.weights.state_dicts import load_stack, load_state_dict
from afa_jax.weights.tensors import Tensor, WeightsError, open_tensors, read_metadata, read_tensors, write_tensors

OLD = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("failing", ["_chunks", "os.fsync", "os.replace"])
def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "model.safetensors"
    write_tensors(path, OLD)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    def half(*args):
        yield b"half"
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(tensors, failing, half) if failing == "_chunks" else patch.setattr(os, failing[3:], fail)
        with pytest.raises(OSError, match="disk full"):
            write_tensors(path, {"b": OLD["a"] + 1})
    assert [*tmp_path.iterdir()] == [path]
    np.testing.assert_array_equal(read_tensors(path)["a"], OLD["a"])


def test_memory_layout_does_not_matter(tmp_path):
    """safetensors writes an array's memory: a transposed view must not come back as its base."""
    path = tmp_path / "new" / "model.safetensors"
    write_tensors(path, {"a": OLD["a"].T}, {"step": "7"})
    np.testing.assert_array_equal(read_tensors(path)["a"], OLD["a"].T)
    assert read_metadata(path) == {"step": "7"}


def test_the_library_reads_what_we_write(tmp_path):
    written: dict[str, np.ndarray] = {
        "half": np.array([[1, 2], [3, 4]], np.float16),
        "odd": np.array([1, 2, 3], np.uint8),
        "bf16": np.arange(3).astype(ml_dtypes.bfloat16),
        "scalar": np.array(5, np.int64),
        "none": np.zeros((0, 3), np.float32),
        "é": np.arange(4.0),
    }
    write_tensors(tmp_path / "a.safetensors", written, {"b": "ü", "a": ""})
    for read in (load_file, read_tensors):
        found = read(tmp_path / "a.safetensors")
        assert found.keys() == written.keys()
        for name, array in found.items():
            assert array.dtype == written[name].dtype and np.array_equal(array, written[name])
    write_tensors(tmp_path / "b.safetensors", dict(reversed(written.items())), {"a": "", "b": "ü"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl", ".CKPT"])
def test_pickles_are_refused_unread(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(WeightsError, match=rf"^{path}: pickled weights are refused"):
        read_tensors(path)


@pytest.mark.parametrize("content", [None, b"", b"\x10" + 20 * b"\0"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(WeightsError, match=rf"^{path}: "):
            read(path)


def write_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, dtype="F32", end=0):
    return dict(dtype=dtype, shape=shape, data_offsets=[0, end])


TOO_MANY = json.dumps({str(i): entry([0]) for i in range(2**16 + 1)}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry([0, 2**62])}, "not a complete safetensors file (a tensor of shape (0, 4611686018427387904))"),
        ({"a": entry([0, *[2**20] * 3])}, "not a complete safetensors file (a tensor of shape"),
        ({"a": entry([1] * 33, end=4)}, "not a complete safetensors file (a tensor of 33 dimensions)"),
        ({str(i): entry([0]) for i in range(2**16 + 1)}, "its header has more than 65,536 tensors"),
        # the same, counted without the letters that can be written in another way
        (TOO_MANY.replace(b"data_offsets", rb"d\u0061ta_offsets"), "its header has more than 65,536 tensors"),
        (
            b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(2**14 + 1)) + b"}}",
            "its header has",
        ),
        (
            b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":[%s1]}}' % (b"[]," * 2**20),
            "its header has more than 1,048,576",
        ),
        ({"n" * 513: entry([0])}, "the name of a tensor has 513 characters (nnn"),
        (b"{}" + b" " * 2**24, "its header has more than 16 MB besides its texts"),
        (b"{}" + b" " * 10**8, "its header has more than 100 MB"),
        (b'{"__metadata__":{%s"":""}}' % (b'"\\\\":"",' * 2**20), "its header has more than 1,048,576"),
        ({"a": entry([2], "F4", 1)}, "holds tensors of dtype F4, which cannot be read; fetch the model in float16"),
        ({"a": entry([4], "F8_E8M0", 4)}, "holds tensors of dtype F8_E8M0, which cannot be read"),
        ({"a": entry([1], "C64", 8)}, "holds tensors of dtype C64, which cannot be read"),
    ],
)
def test_headers_of_no_model_are_refused_before_they_take_memory(tmp_path, header, message):
    path = tmp_path / "model.safetensors"
    end = max(entry["data_offsets"][1] for entry in header.values()) if isinstance(header, dict) else 0
    write_header(path, header, bytes(end))
    with pytest.raises(WeightsError, match=f"^{path}: {re.escape(message)}"):
        open_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "a git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Please log in</html>", "a web page.*download"),
        (b'{"error":"The creator of this asset requires you to be logged in"}', "JSON.*download"),
        (b"PK\x03\x04" + bytes(80), r"a pickle.*torch.*model\.converted\.safetensors"),
        (b"GGUF" + bytes(80), "a GGUF file.*as safetensors"),
    ],
)
def test_what_is_something_else_under_this_name_is_said(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"^{path}: this is {message}"):
        open_tensors(path)


def test_headers_as_long_as_they_may_be_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, b"{}" + b" " * (2**24 - 2))
    assert open_tensors(path).tensors == {}
    tags = 'fox, "red"' * (17 << 17)  # as trainers keep them, all in one text
    write_header(path, {"__metadata__": {"ss_tag_frequency": tags}})
    assert open_tensors(path).metadata == {"ss_tag_frequency": tags}


@pytest.mark.parametrize("array", [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float16), np.zeros(6, np.float32)])
def test_a_tensor_must_be_what_it_says(tmp_path, array):
    tensor = Tensor((2, 3), np.dtype(np.float32), lambda: array)
    with pytest.raises(AssertionError, match=r"a is .*, not float32 \(2, 3\) as it said"):
        write_tensors(tmp_path / "model.safetensors", {"a": tensor})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", [None, 1, {"a": "b"}])
def test_metadata_is_text(tmp_path, value):
    metadata: Any = {"title": "Fox", "prediction_type": value}
    with pytest.raises(TypeError, match=r"metadata 'prediction_type' is .*, not text"):
        write_tensors(tmp_path / "new" / "model.safetensors", OLD, metadata)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_stays_unless_it_may_be_overwritten(tmp_path, monkeypatch, links):
    path = tmp_path / "model.safetensors"

    def meanwhile():
        path.write_bytes(b"precious")
        return OLD["a"]

    def no_links(*names):
        raise PermissionError("this file system has no links")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    slow = {"a": Tensor((2, 3), np.dtype(np.float32), meanwhile)}
    with pytest.raises(InputError, match=f"^{path} exists; choose another name, or --overwrite"):
        write_tensors(path, slow, overwrite=False)
    assert path.read_bytes() == b"precious" and [*tmp_path.iterdir()] == [path]
    write_tensors(path, slow)
    np.testing.assert_array_equal(read_tensors(path)["a"], OLD["a"])
    path.unlink()
    write_tensors(path, OLD, overwrite=False)
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_run_left_is_removed(tmp_path):
    path, hour = tmp_path / "model.safetensors", time.time() - 3600
    dead, other = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
    assert dead.wait() == other.wait() == 0
    left = {
        f".model.safetensors.{dead.pid}.partial": hour,
        f".model.safetensors.{other.pid}.partial": time.time(),  # another machine's, which is writing it
        f".model.safetensors.{os.getppid()}.partial": hour,  # alive
        f".other.safetensors.{dead.pid}.partial": hour,
        f".model.safetensors.x.{dead.pid}.partial": hour,
    }
    for name, when in left.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (when, when))
    write_tensors(path, OLD)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *[*left][1:]}


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_too_large_for_the_parameters_are_refused(stacked):
    def load(array, dtype):
        if stacked:
            return load_stack(shapes, [("one", {"a": OLD["a"]}), ("two", {"a": array})], str, param_dtype=dtype)
        return load_state_dict(shapes, {"a": array}, str, what="two", param_dtype=dtype)

    shapes = {"a": jax.ShapeDtypeStruct((2, 3), np.float32)}

    large = np.full((2, 3), 1e5, np.float32)
    with pytest.raises(WeightsError, match=r"^two: a holds values too large for float16; choose bfloat16 or float32"):
        load(large, np.float16)
    assert load(large, ml_dtypes.bfloat16)["a"].dtype == ml_dtypes.bfloat16
    with pytest.raises(WeightsError, match=r"^two: a holds NaN or infinity"):
        load(large * np.float32(np.inf), np.float16)


def test_what_does_not_read_back_takes_no_place(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": np.zeros(4, np.float32)}, reread=True)
    good = path.read_bytes()
    fsync = os.fsync

    def broken(descriptor):
        fsync(descriptor)
        for partial in tmp_path.glob(".*.partial"):
            data = bytearray(partial.read_bytes())
            data[-1] ^= 1
            partial.write_bytes(data)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="does not read back whole") as error:
        write_tensors(path, {"a": np.ones(4, np.float32)}, reread=True)
    assert error.value.filename == str(path) and path.read_bytes() == good and [*tmp_path.iterdir()] == [path]
