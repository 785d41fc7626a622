"""Files that are whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from afa_jax.errors import InputError


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all; processes that write the same one do not meet."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file at once or not at all; processes that write the same one do not meet."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raise InputError for an output that is there already, unless it may be replaced; before any work is done."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or --overwrite")


def replace_folder(folder: Path, new: Path) -> None:
    """Put a complete folder where another one may be, which stays until then."""
    old = aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def aside(folder: Path) -> Path:
    """Where a folder is kept while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def sync_folder(path: Path) -> None:
    """Make the new names in a folder outlive a power cut, too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
