"""Files that are whole or absent."""

from __future__ import annotations

import os
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
