"""Safetensors files are written at once or not at all."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from afa_jax.weights import tensors
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors

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


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
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
