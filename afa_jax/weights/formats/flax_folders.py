"""Weights that diffusers' and transformers' former Flax classes wrote: ``diffusion_flax_model.msgpack``.

Such a file is one msgpack value: nested maps from names to arrays. An array is extension type 1 around ``[shape, dtype,
bytes]`` (flax.serialization), or, above a gigabyte, a map of several of these. Nothing else is read: no code in a file
is run, and arrays stay in the file until they are needed. Flax's ``down_blocks_0/resnets_1/conv1/kernel`` becomes
``down_blocks.0.resnets.1.conv1.weight`` in PyTorch's layout. The file holds weights only: the network runs as PyTorch's
does, not with the tanh GELU of diffusers' Flax classes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from afa_jax.errors import why
from afa_jax.weights.formats.foreign_files import foreign
from afa_jax.weights.keys import pytorch_name, shape_in_pytorch, to_pytorch
from afa_jax.weights.tensors import Tensor, TensorFile, WeightsError, mapped

_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}
_LISTS = "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out"
# Bounds of a file's nesting, arrays and dimensions: a U-Net has 10 levels and 700 arrays of at most 4 dimensions.
_DEEPEST, _LONGEST, _MOST = 32, 8, 1 << 18
_UNCHANGED = ("logit_scale", "class_embedding")  # parameters of a whole CLIP that a text encoder lacks
_CHUNKED = "__msgpack_chunked_array__"


def open_flax(path: Path) -> TensorFile:
    """Open a Flax model's file: its tensors under PyTorch's keys and in PyTorch's layout.

    Raises:
        WeightsError: the file is missing, truncated, or not the parameters of a Flax model.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = _Reader(path, data).whole()
        tensors = {}
        for name, tensor in _leaves(tree):
            key = pytorch_key(name)
            if key in tensors:
                raise ValueError(f"two parameters would be {key}")
            shape = shape_in_pytorch(name, tensor.shape)
            tensors[key] = tensor.apply(functools.partial(to_pytorch, name), shape)
        return TensorFile(path, tensors, {})
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # mmap's own for an empty file
        start = b""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(64)
        what = foreign(path, start) or why(error)
        raise WeightsError(f"{path}: not a whole file of a Flax model ({what}); fetch it again") from error


def pytorch_key(path: str) -> str:
    """Rename ``down_blocks_0.attentions_1.proj_in.kernel`` to ``down_blocks.0.attentions.1.proj_in.weight``."""
    if path.rpartition(".")[2] in _UNCHANGED:
        return path
    try:
        return re.sub(rf"(?<![^.])({_LISTS})_(\d+)(?=\.)", r"\1.\2", pytorch_name(path))
    except KeyError:
        raise ValueError(f"{path} is not a parameter that PyTorch has") from None


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Mapping) and _CHUNKED in tree:
        tree = _joined(tree)
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{path}.{name}" if path else name)
    else:
        raise ValueError(f"{path or 'its value'} is not an array")


def _joined(parts: Mapping[str, Any]) -> Tensor:
    """Join the parts of an array above a gigabyte, which Flax writes as a map, to one tensor."""
    shape, chunks = (tuple(_in_order(parts.get(name))) for name in ("shape", "chunks"))
    if not all(type(n) is int for n in shape) or not all(isinstance(c, Tensor) for c in chunks):
        raise ValueError("an array in chunks is not complete")
    if len({c.dtype for c in chunks}) != 1 or sum(math.prod(c.shape) for c in chunks) != math.prod(shape):
        raise ValueError("an array in chunks is not complete")
    return Tensor(shape, chunks[0].dtype, lambda: np.concatenate([c.read().reshape(-1) for c in chunks]).reshape(shape))


def _in_order(entries: Any) -> list[Any]:
    """Return the list that Flax writes as ``{"0": ..., "1": ...}``."""
    count = len(entries) if isinstance(entries, dict) else 0
    return [entries.get(str(i)) for i in range(count)]


class _Reader:
    """A cursor in a msgpack file that knows the types Flax uses and stops at any other."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def whole(self) -> Any:
        tree = self.value()
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes too many")
        return tree

    def skip(self, count: int) -> int:
        """Skip ``count`` bytes and return where they begin."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"{self.at - len(self.data)} bytes are missing")
        return begin

    def number(self, size: int) -> int:
        begin = self.skip(size)
        return int.from_bytes(self.data[begin : begin + size], "big")

    def value(self, depth: int = 0) -> Any:
        """Read the next value: a dict, a list, a str, an int, a Tensor, or bytes as the range where they lie."""
        self.values += 1
        if depth > _DEEPEST or self.values > _MOST:
            raise ValueError(f"nested more than {_DEEPEST} deep, or more than {_MOST} values")
        kind = self.number(1)
        if kind < 0x80:
            return kind
        if kind < 0x90 or kind in (0xDE, 0xDF):
            return self.map(kind & 15 if kind < 0x90 else self.number(2 if kind == 0xDE else 4), depth)
        if kind < 0xA0 or kind in (0xDC, 0xDD):
            count = kind & 15 if kind < 0xA0 else self.number(2 if kind == 0xDC else 4)
            if count > _LONGEST:
                raise ValueError(f"a list of {count}")
            return [self.value(depth + 1) for _ in range(count)]
        if kind < 0xC0 or kind in (0xD9, 0xDA, 0xDB):
            size = kind & 31 if kind < 0xC0 else self.number(1 << kind - 0xD9)
            begin = self.skip(size)
            return self.data[begin : begin + size].decode()
        if kind in (0xC2, 0xC3):
            return kind == 0xC3
        if kind in (0xC4, 0xC5, 0xC6):
            size = self.number(1 << kind - 0xC4)
            begin = self.skip(size)
            return range(begin, begin + size)
        if kind in (0xC7, 0xC8, 0xC9):
            return self.array(self.number(1 << kind - 0xC7), depth)
        if kind in (0xCC, 0xCD, 0xCE, 0xCF):
            return self.number(1 << kind - 0xCC)
        if kind in (0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
            return self.array(1 << kind - 0xD4, depth)
        raise ValueError(f"a value of type 0x{kind:02x} at byte {self.at - 1}")

    def map(self, count: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(count):
            name = self.value(depth + 1)
            if not isinstance(name, str) or not name.isprintable() or name in result:
                raise ValueError(f"the name {name!r} at byte {self.at}")
            result[name] = self.value(depth + 1)
        return result

    def array(self, size: int, depth: int) -> Tensor:
        """Read the array in an extension of ``size`` bytes."""
        code = self.number(1)
        end = self.at + size
        if code != 1:
            raise ValueError(f"an extension of type {code}")
        match self.value(depth + 1):
            case [[*shape], str(name), range() as place] if name in _DTYPES and self.at == end:
                dtype = _DTYPES[name]
                if all(type(n) is int for n in shape) and math.prod(shape) * dtype.itemsize == len(place):
                    return mapped(self.path, place.start, tuple(shape), dtype)
        raise ValueError(f"an array that ends at byte {end} is not whole")
