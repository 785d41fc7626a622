"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from afa_jax.errors import InputError


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all; processes that write the same one do not meet."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raise InputError for an output that is there already, unless it may be replaced; before any work is done."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or --overwrite")


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` when all of it is on the disk; it vanishes if filling it fails.

    Args:
        overwrite: replace a folder that is there; it stays until the new one is complete.

    Raises:
        InputError: it exists and may not be replaced.
    """
    check_new(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = partial.with_suffix(".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: they outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
