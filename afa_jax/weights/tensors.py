"""Safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from afa_jax.errors import InputError, printable, some, why
from afa_jax.files import check_new, naming, partial_output, remove_leftovers, sync
from afa_jax.weights.formats.foreign_files import PICKLES, foreign, pickle_advice

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EIGHT_BITS = {np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# Bounds for files from strangers. A model has some 1100 tensors, and a header of 100 kB besides its metadata.
# The metadata's texts (a trainer's tags, a picture's workflow) are only copied, so the library's own bound is enough
# for them. The rest of the header takes time and memory for each of its parts.
_LONGEST_HEADER, _LONGEST_REST = 10**8, 2**24
_MOST_TENSORS, _MOST_DIMENSIONS, _MOST_NUMBERS = 2**16, 32, 2**40
_MOST_METADATA, _LONGEST_NAME, _MOST_PARTS = 2**14, 2**9, 2**20
M = TypeVar("M")


class WeightsError(InputError):
    """A weights file that cannot be used: the message names the file, the keys and what to do."""


def is_floating(dtype: Any) -> bool:
    """Return whether a dtype is floating-point, including bfloat16 and 8-bit floats, which numpy does not know."""
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype == _BFLOAT16 or dtype in _EIGHT_BITS


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of known shape and dtype whose numbers are read anew at each use.

    ``np.asarray(tensor)`` reads it. Anything derived from it (a cast, another layout, a sum) is a Tensor as well, so a
    checkpoint of any size goes from file to file, or from file to device, one tensor at a time.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    @classmethod
    def of(cls, array: Any) -> Tensor:
        """Make a tensor from an array of numpy or jax that is in memory anyway."""
        return cls(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))

    def astype(self, dtype: DTypeLike) -> Tensor:
        """Return the tensor rounded to ``dtype``; an integer or Boolean one unchanged."""
        wanted = np.dtype(dtype)
        if wanted == self.dtype or not is_floating(self.dtype):
            return self
        return Tensor(self.shape, wanted, lambda: self.read().astype(wanted))

    def apply(self, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None) -> Tensor:
        """Return the tensor after a function that keeps its dtype and gives it ``shape``, by default its own."""
        return Tensor(self.shape if shape is None else shape, self.dtype, lambda: function(self.read()))


Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open safetensors file: its tensors, each mapped into memory when it is read, and its metadata."""

    path: Path
    tensors: Tensors
    metadata: Mapping[str, str]


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        WeightsError: the file is missing, a pickle, truncated, or not safetensors.
    """
    if path.suffix.lower() in PICKLES:
        raise WeightsError(f"{path}: pickled weights are refused, loading them can run any code. {pickle_advice(path)}")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with _named(path):
        with open(path, "rb") as file:
            start = file.read(64)
            if what := foreign(path, start):
                raise WeightsError(f"{path}: this is {what}")
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            size = os.fstat(file.fileno()).st_size  # reading takes the memory that it is asked for
            text = file.read(min(length, size, _LONGEST_HEADER + 1))
        _check_length(path, text)
        # The library checks the header's length and text, gaps and overlaps of tensors, and the file's end.
        with safe_open(path, "np"):
            pass
        header: dict[str, Any] = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        for count, most, what in (
            (len(header), _MOST_TENSORS, "tensors"),
            (len(metadata), _MOST_METADATA, "entries of metadata"),
        ):
            if count > most:
                raise _immoderate(path, f"{most:,} {what}")
        if long := next((name for name in header if len(name) > _LONGEST_NAME), None):
            raise WeightsError(
                f"{path}: the name of a tensor has {len(long)} characters ({long[:40]}...), which no model has; "
                "fetch it again"
            )
        return TensorFile(path, {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}, metadata)


def _check_length(path: Path, text: bytes) -> None:
    """Raise WeightsError for a header that would take long to read; by counts, before it takes memory."""
    if len(text) > _LONGEST_HEADER:
        raise _immoderate(path, f"{_LONGEST_HEADER // 10**6} MB")
    # Unlike letters of a name, brackets and the quotes around a text cannot be written in another way.
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > _MOST_PARTS or text.count(b'"') - text.count(b'\\"') > 2 * _MOST_PARTS:
        raise _immoderate(path, f"{_MOST_PARTS:,} brackets or texts")
    outside = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    if sum(map(len, outside)) > _LONGEST_REST:
        raise _immoderate(path, f"{_LONGEST_REST >> 20} MB besides its texts")


def _immoderate(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{path}: its header has more than {what}, which no model has; fetch it again, or take its metadata out with "
        "the safetensors library (load_file, save_file)"
    )


def _tensor(path: Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise WeightsError(
            f"{path}: holds tensors of dtype {entry['dtype']}, which cannot be read; fetch the model in float16, "
            "bfloat16 or float32"
        )
    if len(entry["shape"]) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(entry['shape'])} dimensions")
    dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("a tensor's shape and bytes differ")
    return mapped(path, start + begin, shape, dtype)


def mapped(path: Path, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """Return a tensor whose bytes lie in a file from ``begin`` on; they are mapped into memory at each read.

    Raises:
        ValueError: the shape is too large, counting a dimension of 0 as 1.
    """
    if math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:
        raise ValueError(f"a tensor of shape {shape}")
    # Not a function defined here: the tests' type checker takes a millisecond for each definition.
    return Tensor(shape, dtype, functools.partial(_read, path, begin, shape, dtype))


def _read(path: Path, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        # A new map at each read, so that pages that were read do not stay in the process.
        data = np.memmap(path, np.uint8, "r", offset=begin, shape=(size,))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: changed since it was opened ({error}); run again") from error
    return np.asarray(data).view(dtype).reshape(shape)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file, as stored, into memory.

    Raises:
        WeightsError: the file is missing, a pickle, truncated, or not safetensors.
    """
    return {name: np.array(tensor.read()) for name, tensor in open_tensors(path).tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file's header.

    Raises:
        WeightsError: as read_tensors.
    """
    return dict(open_tensors(path).metadata)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits, as sites for models show it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = True,
    reread: bool = False,
) -> None:
    """Write a safetensors file at once or not at all: to a temporary name beside it, synced, then renamed.

    Args:
        tensors: arrays, or Tensors, which are read one at a time. The same tensors give the same bytes.
        overwrite: replace a file that exists, or that appears meanwhile.
        reread: before the file gets its name, read back and compare every byte, not only the header.

    Raises:
        InputError: the file exists and may not be overwritten.
        OSError: of the system, with the name ``path``; what was written does not read back.
        TypeError: metadata that is not text.
    """
    texts: Mapping[Any, Any] = metadata or {}
    for name, value in texts.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata {name!r} is {value!r}, not text")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with partial_output(path) as partial:
        with open(partial, "wb") as file:
            crc = 0
            for chunk in _chunks(tensors, metadata or {}):
                with naming(path):
                    file.write(chunk)
                crc = zlib.crc32(chunk, crc)
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
        _check_written(partial, path, tensors, crc if reread else None)
        os.replace(partial, path) if overwrite else _rename_new(partial, path)
    sync(path.parent)


def _check_written(partial: Path, path: Path, tensors: Mapping[str, Any], crc: int | None) -> None:
    """Check a written file before it replaces another one.

    Args:
        crc: the expected crc32 of the whole file; None reads the header only.

    Raises:
        OSError: the file does not hold these tensors, though the disk reported no error.
    """
    try:
        with safe_open(partial, "np") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (own.get_dtype(), tuple(own.get_shape())) for name, own in slices.items()}
    except SafetensorError:
        found = {}
    wanted = {name: (_NAMES[np.dtype(own.dtype)], tuple(own.shape)) for name, own in tensors.items()}
    if found != wanted or (crc is not None and _crc32(partial) != crc):
        raise OSError(errno.EIO, "what was written there does not read back whole", str(path))


def _crc32(path: Path) -> int:
    """Return the checksum of a file, read from the disk and not from the system's cache where that can be chosen."""
    crc = 0
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _rename_new(partial: Path, path: Path) -> None:
    """Rename a file to a name that must be free; on file systems without links, check that first."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise InputError(f"{path} exists; choose another name, or --overwrite") from None
    except OSError:
        check_new(path, overwrite=False)
        os.replace(partial, path)


def _chunks(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a safetensors file: a header padded to 8 bytes, and the tensors, the widest dtypes first."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    names, begin = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name)), 0
    for name in names:
        shape, dtype = tensors[name].shape, np.dtype(tensors[name].dtype)
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=_NAMES[dtype], shape=list(shape), data_offsets=[begin, end])
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        array, said = np.asarray(tensors[name]), (tuple(tensors[name].shape), np.dtype(tensors[name].dtype))
        if (array.shape, array.dtype) != said:
            raise AssertionError(f"{name} is {array.dtype} {array.shape}, not {said[1]} {said[0]} as it said")
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_names(missing: Collection[str], surplus: Collection[str], what: str, advice: str = "") -> None:
    """Raise WeightsError if there are any, with what to do (``advice``) at its end."""
    if missing or surplus:
        parts = listed("missing", sorted(missing)), listed("surplus", sorted(surplus))
        raise WeightsError(f"{what}: " + "; ".join(filter(None, (*parts, advice))))


def cast(array: np.ndarray, dtype: DTypeLike, name: str, what: str) -> np.ndarray:
    """Return a copy in another dtype; NaN and infinity stay.

    Raises:
        WeightsError: finite values become infinite; the error gives the tensor's name and the file's (``what``).
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    narrower = not np.can_cast(array.dtype, result.dtype)
    if narrower and not np.isfinite(result).all() and np.isfinite(array).all():
        raise WeightsError(
            f"{what}: {printable(name)} holds values too large for {np.dtype(dtype)}; choose bfloat16 or float32"
        )
    return result


def result_dtype(dtypes: Iterable[DTypeLike]) -> np.dtype:
    """Return the dtype for values computed from weights: the weights' own if it is the same in all, else float32.

    For 8 bits it is float16: two digits may do for stored weights, but not for their sums.
    """
    found = {np.dtype(dtype) for dtype in dtypes}
    found = {np.dtype(np.float16) if dtype in _EIGHT_BITS else dtype for dtype in found}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def check_finite(array: np.ndarray, name: str, what: str) -> None:
    """Raise WeightsError for a tensor with NaN or infinity; the error gives its name and the file's (``what``)."""
    if not np.isfinite(array).all():
        raise WeightsError(f"{what}: {printable(name)} holds NaN or infinity; fetch or convert this file again")


def checked(tensor: Tensor, name: str, what: str) -> Tensor:
    """Return a tensor that goes through check_finite when it is read."""
    return tensor.apply(functools.partial(_finite, name=name, what=what))


def _finite(array: np.ndarray, name: str, what: str) -> np.ndarray:
    check_finite(array, name, what)
    return array


def listed(what: str, names: Collection[str], most: int = 5) -> str:
    """Return ``3 missing (a, b, c)``, shortened to the first ``most`` names and how many more; empty for none."""
    return f"{len(names)} {what} ({some(names, most)})" if names else ""


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        what = why(error)
        raise WeightsError(f"{path}: not a complete safetensors file ({what}); fetch or write it again") from error
