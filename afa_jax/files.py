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
            sync_folder(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)


def sync_folder(path: Path) -> None:
    """Make the new names in a folder outlive a power cut, too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
