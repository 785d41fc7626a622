"""Files on disk or in a bucket: paths, fsspec URLs (``gs://bucket/folder``), globs and brace lists."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from afa_jax.errors import InputError, printable
from afa_jax.files import replace_bytes

FileSystem = Any
"""An fsspec.AbstractFileSystem; it can be pickled, and so can a source that holds one."""
STAMPS = ("mtime", "etag", "ETag", "md5Hash", "content_md5", "checksum", "sha")
"""The keys under which fsspec's file systems give a file's modification time, or a hash of its content."""
MOST_FILES = 100_000  # the most files that paths may name


def filesystem(path: str) -> tuple[FileSystem, str]:
    """Return the file system of a path or URL, and the path within it.

    Raises:
        InputError: no such protocol, or its driver is not installed; the error names the package.
    """
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        module = known_implementations[path.partition("://")[0]]["class"].partition(".")[0]
        missing = error.__cause__.name if module == "fsspec" and isinstance(error.__cause__, ImportError) else module
        raise InputError(f"{path}: {error}; pip install {missing}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}; choose a folder or an fsspec URL such as gs://bucket/folder") from error
    return fs, inner


def expand(paths: str | Sequence[str]) -> tuple[FileSystem, list[str]]:
    """Find the files of paths, globs (``part-*.tar``) and brace lists (``part-{000..019}.tar``), in their order.

    Raises:
        InputError: a name without a file, a glob that matches none, or paths on several file systems.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    if not patterns:
        raise InputError("data.paths is empty; name files, a glob or a brace list")
    fs, files = None, []
    for pattern in [name for each in patterns for name in braces(each)]:
        this, inner = filesystem(pattern)
        if fs is not None and this != fs:
            raise InputError(f"{pattern}: on another file system than {patterns[0]}")
        fs = this
        found = [inner] if fs.isfile(inner) else sorted(fs.glob(inner)) if re.search(r"[*?\[]", inner) else []
        if not found:
            raise InputError(f"{pattern}: no such file")
        files += found
        if len(files) > MOST_FILES:
            raise _too_many(pattern)
    return fs, files


def braces(pattern: str) -> list[str]:
    """Return the names that ``x{00..11}`` and ``x{a,b}`` stand for; several pairs of braces are combined.

    Raises:
        InputError: more than MOST_FILES.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if len(parts) == 1:
        return [pattern]
    choices = [_choices(part) for part in parts[1::2]]
    if math.prod(map(len, choices)) > MOST_FILES or pattern.count("{") > 100:
        raise _too_many(pattern)
    names: list[str] = []
    for chosen in itertools.product(*choices):
        parts[1::2] = chosen
        name = "".join(parts)
        names += braces(name) if "{" in name else [name]  # braces within braces
        if len(names) > MOST_FILES:
            raise _too_many(pattern)
    return names


def _choices(text: str) -> Sequence[str]:
    """Return the texts that ``00..11`` or ``a,b`` stands for."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    first, last = numbers.groups()
    if max(len(first), len(last)) > 18 or int(last) - int(first) >= MOST_FILES:
        raise _too_many(f"{{{text}}}")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _too_many(pattern: str) -> InputError:
    return InputError(
        f"{printable(pattern, 200)}: stands for more than {MOST_FILES:,} files; name fewer, by a glob such as "
        "part-*.tar or by larger files"
    )


def below(folder: str, path: str) -> str:
    """Return the name below a folder of a file in it."""
    prefix = folder.rstrip("/") + "/"
    return path.removeprefix(prefix) if path.startswith(prefix) else posixpath.relpath(path, folder)


def hidden(name: str) -> bool:
    """Return whether a file is not the user's but one that macOS, Windows or a notebook put there."""
    *folders, base = name.split("/")
    return base.lower() in ("thumbs.db", "desktop.ini") or any(
        (part.startswith(".") and part not in (".", "..")) or part in ("__MACOSX", "@eaDir")
        for part in (*folders, base)
    )


def below_common(paths: Sequence[str]) -> list[str]:
    """Return the paths relative to the folder that all of them are in: short names, and no two alike."""
    common = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [posixpath.relpath(path, common) for path in paths]


def find(fs: FileSystem, folder: str) -> dict[str, int]:
    """Find all files below a folder, with sizes; on disk also below symbolic links, which fsspec skips."""
    if isinstance(fs, LocalFileSystem):
        return dict(_walk(folder, frozenset()))
    return {path: info["size"] for path, info in fs.find(folder, detail=True).items()}


def _walk(folder: str, above: frozenset[str]) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in above or not os.access(folder, os.R_OK | os.X_OK):  # a link to a folder that it is in; lost+found
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, above | {real})
            elif entry.is_file():  # no pipe, no device
                yield entry.path, entry.stat().st_size


def stamp(fs: FileSystem, path: str) -> str:
    """Return a value that changes when a file is rewritten: its modification time, or in a bucket its checksum."""
    info = fs.info(path)
    return next((str(info[name]) for name in STAMPS if info.get(name)), "") or str(fs.ukey(path))


def digest(rows: Iterable[Any]) -> str:
    """Return the sha256 of JSON values, in hexadecimal."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps(row).encode() + b"\n")
    return hashed.hexdigest()


def write_at_once(fs: FileSystem, path: str, data: bytes) -> None:
    """Write a file as a whole or not at all, also where other processes write the same."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # as buckets do anyway
        return
    replace_bytes(Path(path), data)
