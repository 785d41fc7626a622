"""Tar shards in webdataset's layout, read at random."""

from __future__ import annotations

import functools
import json
import math
import posixpath
import tarfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from afa_jax.data.decode import MAX_PIXELS, PICTURES, check_max_pixels, longest_file
from afa_jax.data.files import FileSystem, below_common, digest, expand, hidden, stamp, write_at_once
from afa_jax.data.sources import example
from afa_jax.errors import BadExample, InputError, some, why

Member = tuple[str, int, int, int]
"""The name, data offset, size and modification time of a member."""
NONE = (-1, 0)
LONGEST_HEADER = 1 << 20  # bytes before a member: its long names and pax records
LONGEST_TEXT = 1 << 20  # bytes of a caption's member
_NO_PICTURES = ("cls", "id", "npy", "npz", "pyd", "pickle", "safetensors", "url")
"""Endings of members that accompany a picture and are ignored."""


class TarSource:
    """Captioned pictures in tar files; members with one key are one example.

    A key is a member's name up to the first dot of its last part: ``a/0001.jpg`` with ``a/0001.txt``, or with
    ``a/0001.json`` that has the caption in a field; of both, the .txt counts. Other endings are passed over. Only the
    headers are read at the start; then an example is two ranges of bytes.

    Args:
        paths: files, globs (``shards/*.tar``) or brace lists (``gs://bucket/{000..099}.tar``); one or several.
        caption: the caption's field in .json files.
        index: keep what the headers said in ``<file>.index.json`` beside each tar, and read that from then on, as long
            as the tar's size and time of change (in a bucket its tag or checksum) stay. For buckets, where reading the
            headers takes long.
        max_pixels: the most pixels of a picture; larger pictures are bad examples and are not decoded.

    Raises:
        InputError: no such file; a tar that is truncated, compressed or none; no example in any of them.
    """

    def __init__(
        self, paths: str | Sequence[str], *, caption: str = "caption", index: bool = False, max_pixels: int = MAX_PIXELS
    ):
        self.max_pixels = check_max_pixels(max_pixels)
        self.fs, self.shards = expand(paths)
        self.field = caption
        self._names: list[str] = []
        left_out: list[str] = []
        rows: list[tuple[int, ...]] = []
        stamps: list[Any] = []
        for number, (path, tar) in enumerate(zip(self.shards, below_common(self.shards), strict=True)):
            members = _indexed(self.fs, path) if index else _members(self.fs, path)
            stamps.append([tar, members])
            examples, others = _examples(path, members)
            left_out += [f"{tar}/{name}" for name in others]
            for key, parts in examples.items():
                text = "txt" if "txt" in parts else "json"
                rows.append((number, *parts.get("picture", NONE), *parts.get(text, NONE), int(text == "json")))
                self._names.append(f"{tar}/{key}")
        captioned = f" ({len(left_out):,} captioned members are no pictures by their names: {some(left_out)})"
        if not rows:
            raise InputError(
                f"{self.shards[0]}: no .jpg, .png ... with a .txt or .json of the same name in it"
                + (captioned if left_out else "")
            )
        if left_out:
            warnings.warn(f"{self.shards[0]}: left out{captioned}", stacklevel=2)
        # Tuples of integers would take hundreds of bytes an example.
        self._rows = np.asarray(rows, np.int64)
        self._stamp = digest(stamps)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"TarSource({self.shards[0]!r}, {len(self.shards)} files, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, uint8 ``[h, w, 3]``, and ``caption``."""
        name = self.name(index)
        number, at, size, text_at, text_size, is_json = self._rows[index].tolist()
        if at < 0:
            raise BadExample(name, "no picture of that name")
        if text_at < 0:
            raise BadExample(name, "no caption")
        longest = longest_file(self.max_pixels)
        if text_size > LONGEST_TEXT or size > longest:
            raise BadExample(name, f"its members have {text_size:,} and {size:,} bytes, too many for data.max_pixels")
        read = functools.partial(self.fs.cat_file, self.shards[number])
        try:
            caption = read(start=text_at, end=text_at + text_size).decode("utf-8-sig")
            if is_json:
                caption = json.loads(caption).get(self.field)
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadExample(name, f"no readable caption ({why(error)})") from error
        return example(name, read(start=at, end=at + size), caption, self.max_pixels)

    def name(self, index: int) -> str:
        """Return the tar's name and the members' key."""
        return self._names[index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of all members' names, places, sizes and times of change."""
        limit = [] if self.max_pixels == MAX_PIXELS else [self.max_pixels]
        return digest([self.field, self._stamp, *limit])


def _examples(path: str, members: Sequence[Member]) -> tuple[dict[str, dict[str, tuple[int, int]]], list[str]]:
    """Return, by key, where ``picture``, ``txt`` and ``json`` lie; and the captioned members that are no pictures."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    others: dict[str, str] = {}
    for name, offset, size, _ in members:
        folder, base = posixpath.split(name)
        stem, _, ending = base.partition(".")
        key, ending = posixpath.join(folder, stem), ending.lower()
        part = "picture" if f".{ending}" in PICTURES else ending
        if not stem or hidden(name):
            continue
        if part in ("picture", "txt", "json"):
            parts = found.setdefault(key, {})
            if part in parts:
                raise InputError(f"{path}: {name} is there twice, or two pictures have that name")
            parts[part] = (offset, size)
        elif ending and ending not in _NO_PICTURES:
            others[key] = name
    left_out = [name for key, name in others.items() if key in found and "picture" not in found[key]]
    examples = {key: parts for key, parts in found.items() if "picture" in parts or "txt" in parts}
    return {key: parts for key, parts in examples.items() if "picture" in parts or key not in others}, left_out


class _Headers:
    """A tar file that limits how many bytes tarfile reads as headers."""

    def __init__(self, file: Any):
        self.file, self.read_since = file, 0

    def read(self, size: int) -> bytes:
        self.read_since += size
        if size < 0 or self.read_since > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of a negative size or of more than {LONGEST_HEADER:,} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def _members(fs: FileSystem, path: str) -> list[Member]:
    """Return the regular files of a tar; a hard link has the data of its target.

    Other members (symbolic links, devices, ...) hold no data and are passed over; nothing is extracted.
    """
    members: list[Member] = []
    places: dict[str, tuple[int, int]] = {}
    total = fs.size(path)
    try:
        with fs.open(path, "rb") as file:
            headers: Any = _Headers(file)
            with tarfile.open(fileobj=headers, mode="r:") as opened:
                tar: Any = opened
                while (each := tar.next()) is not None:
                    headers.read_since = 0
                    tar.members.clear()  # else tarfile keeps a thousand bytes for each
                    if each.size < 0 or (each.isfile() and each.offset_data + each.size > total):
                        raise tarfile.ReadError(f"{each.name!r} claims {each.size} bytes")
                    if each.issparse():
                        raise tarfile.ReadError(f"{each.name!r} is stored sparse; make the tar without --sparse")
                    time = int(each.mtime) if math.isfinite(each.mtime) and abs(each.mtime) < 2**62 else 0
                    if each.isfile():
                        places[each.name] = (each.offset_data, each.size)
                        members.append((each.name, each.offset_data, each.size, time))
                    elif each.islnk() and each.linkname in places:
                        members.append((each.name, *places[each.linkname], time))
                # tarfile takes the end of the file, and garbage, for the end of an archive, which is a block of zeros.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end after {len(members)} members")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: truncated, compressed or not a tar ({why(error)}); fetch it again, unpack .tar.gz"
        ) from error
    return members


def _indexed(fs: FileSystem, path: str) -> list[Member]:
    """Read the members from ``<path>.index.json``; write that file if it is missing, damaged or of another tar."""
    index, size = f"{path}.index.json", fs.size(path)
    state = dict(size=size, stamp=stamp(fs, path))
    try:
        stored = json.loads(fs.cat_file(index))
        if {name: stored[name] for name in state} == state:
            return [_member(entry, size) for entry in stored["members"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    members = _members(fs, path)
    try:
        write_at_once(fs, index, json.dumps(state | dict(members=members)).encode())
    except PermissionError as error:
        raise InputError(f"{index} cannot be written ({error.strerror}); set data.index=False") from error
    return members


def _member(entry: Any, size: int) -> Member:
    """Return a member from an index's entry; raise ValueError if a tar of that size cannot have it."""
    name, *numbers = entry
    if not isinstance(name, str) or [type(number) for number in numbers] != [int, int, int]:
        raise ValueError("not a name and three numbers")
    at, length, time = numbers
    if not (0 <= at <= at + length <= size and length >= 0 and abs(time) < 2**63):
        raise ValueError("a place that the tar does not have")
    return name, at, length, time
