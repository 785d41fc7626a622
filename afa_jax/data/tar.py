"""Tar shards in webdataset's layout, read at random."""

from __future__ import annotations

import functools
import json
import posixpath
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from afa_jax.data.files import FileSystem, below_common, digest, expand, stamp, write_at_once
from afa_jax.data.sources import PICTURES, BadExample, example
from afa_jax.errors import InputError

Member = tuple[str, int, int, int]
"""Name, offset of the data, size, time of change."""
NONE = (-1, 0)


class TarSource:
    """Captioned pictures in tar files; members with one key are one example.

    A key is a member's name up to the first dot of its last part: ``a/0001.jpg`` with ``a/0001.txt``, or with
    ``a/0001.json`` that has the caption in a field; of both, the .txt counts. Other endings are passed over. Only the
    headers are read at the start; then an example is two ranges of bytes.

    Args:
        paths: files, globs (``shards/*.tar``) or brace lists (``gs://bucket/{000..099}.tar``); one or several.
        caption: field of the .json files.
        index: keep what the headers said in ``<file>.index.json`` beside each tar, and read that from then on, as long
            as the tar's size and time of change (in a bucket its tag or checksum) stay. For buckets, where reading the
            headers takes long.

    Raises:
        InputError: no such file; a tar that is truncated, compressed or none; no example in any of them.
    """

    def __init__(self, paths: str | Sequence[str], *, caption: str = "caption", index: bool = False):
        self.fs, self.shards = expand(paths)
        self.field = caption
        self._names: list[str] = []
        rows: list[tuple[int, ...]] = []
        stamps: list[Any] = []
        for number, (path, tar) in enumerate(zip(self.shards, below_common(self.shards), strict=True)):
            members = _indexed(self.fs, path) if index else _members(self.fs, path)
            stamps.append([tar, members])
            for key, parts in _examples(path, members).items():
                text = "txt" if "txt" in parts else "json"
                rows.append((number, *parts.get("picture", NONE), *parts.get(text, NONE), int(text == "json")))
                self._names.append(f"{tar}/{key}")
        if not rows:
            raise InputError(f"{self.shards[0]}: no .jpg, .png ... with a .txt or .json of the same name in it")
        # Tuples of integers would take hundreds of bytes an example.
        self._rows = np.asarray(rows, np.int64)
        self._stamp = digest(stamps)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"TarSource({self.shards[0]!r}, {len(self.shards)} files, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 ``[h, w, 3]`` and ``caption``."""
        name = self.name(index)
        number, at, size, text_at, text_size, is_json = self._rows[index].tolist()
        if at < 0:
            raise BadExample(name, "no picture of that name")
        if text_at < 0:
            raise BadExample(name, "no caption")
        read = functools.partial(self.fs.cat_file, self.shards[number])
        try:
            caption = read(start=text_at, end=text_at + text_size).decode("utf-8-sig")
            if is_json:
                caption = json.loads(caption).get(self.field)
        except (ValueError, AttributeError) as error:
            raise BadExample(name, f"no readable caption ({error})") from error
        return example(name, read(start=at, end=at + size), caption)

    def name(self, index: int) -> str:
        """The tar's name and the members' key."""
        return self._names[index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all members' names, places, sizes and times of change."""
        return digest([self.field, self._stamp])


def _examples(path: str, members: Sequence[Member]) -> dict[str, dict[str, tuple[int, int]]]:
    """By key: where ``picture``, ``txt`` and ``json`` lie."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size, _ in members:
        folder, base = posixpath.split(name)
        stem, _, ending = base.partition(".")
        part = "picture" if f".{ending.lower()}" in PICTURES else ending.lower()
        if stem and part in ("picture", "txt", "json"):
            parts = found.setdefault(posixpath.join(folder, stem), {})
            if part in parts:
                raise InputError(f"{path}: {name} is there twice, or two pictures have that name")
            parts[part] = (offset, size)
    return {key: parts for key, parts in found.items() if "picture" in parts or "txt" in parts}


def _members(fs: FileSystem, path: str) -> list[Member]:
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(each.name, each.offset_data, each.size, int(each.mtime)) for each in tar if each.isfile()]
            # tarfile takes the end of the file, and garbage too, for the end of the archive; that is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end after {len(members)} members")
    except tarfile.TarError as error:
        raise InputError(
            f"{path}: truncated, compressed or not a tar ({error}); fetch it again, unpack .tar.gz"
        ) from error
    return members


def _indexed(fs: FileSystem, path: str) -> list[Member]:
    """The members as ``<path>.index.json`` has them; it is written where it is missing or of another tar."""
    index, state = f"{path}.index.json", dict(size=fs.size(path), stamp=stamp(fs, path))
    try:
        stored = json.loads(fs.cat_file(index))
        if {name: stored[name] for name in state} == state:
            return [(name, at, length, time) for name, at, length, time in stored["members"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    members = _members(fs, path)
    write_at_once(fs, index, json.dumps(state | dict(members=members)).encode())
    return members
