"""Checkpoints made from others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from afa_jax.errors import InputError
from afa_jax.weights.checkpoint import MemoryCheckpoint, rounded
from afa_jax.weights.tensors import Tensor, WeightsError

ARRAYS: dict[str, np.ndarray] = {
    "a": np.array([1.0001, -3], np.float32),
    "b": np.array([2, 7], np.float16),
    "ids": np.array([2**31 + 1], np.int64),
}


def checkpoint(**arrays):
    tensors = {name: Tensor.of(array) for name, array in (ARRAYS | arrays).items()}
    return MemoryCheckpoint({"unet": ({"field": 1}, tensors)}, metadata={"kept": "yes"})


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, np.float32])
def test_weights_are_rounded_when_read(dtype):
    whole = rounded(checkpoint(), dtype)
    found = whole.tensors("unet")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict(a=dtype, b=dtype, ids=np.int64)
    for name, array in ARRAYS.items():
        expected = array if name == "ids" else array.astype(dtype)
        assert np.asarray(found[name]).dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), expected)
    assert (whole.config("unet"), whole.metadata) == ({"field": 1}, {"kept": "yes"})


def test_the_hash_changes_when_a_dtype_does():
    one, half = checkpoint(), checkpoint(a=ARRAYS["b"])
    hashes = [rounded(one, dtype).sha256("unet") for dtype in ("float16", "bfloat16", "float32")]
    assert len({one.sha256("unet"), *hashes}) == 4
    assert rounded(half, "float16").sha256("unet") == half.sha256("unet")
    assert rounded(half, "float32").sha256("unet") != half.sha256("unet")


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="dtype int8: weights are float16, bfloat16 or float32"):
        rounded(checkpoint(), np.int8)
    large = checkpoint(a=np.array([1e6], np.float32))
    with pytest.raises(
        WeightsError, match=r"\(unet\): a holds values too large for float16; choose bfloat16 or float32"
    ):
        np.asarray(rounded(large, np.float16).tensors("unet")["a"])
    np.asarray(rounded(large, "bfloat16").tensors("unet")["a"])
    broken = checkpoint(a=np.array([np.nan], np.float32))
    assert np.isnan(np.asarray(rounded(broken, np.float16).tensors("unet")["a"])).all()  # said where it is loaded
