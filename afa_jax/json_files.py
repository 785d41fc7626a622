"""A run's JSON files. A damaged object is an error that names the file; damaged lines are left out."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError, why
from afa_jax.files import replace_bytes

_LONGEST_JSON = 2**28  # the most bytes of one object; ours have some thousands


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object that this project wrote.

    Raises:
        InputError: the file cannot be read, or holds something else; it ends with the advice.
    """
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"longer than {_LONGEST_JSON >> 20} MB")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else why(error)
        raise InputError(f"{path}: not to be read as JSON ({reason}); {advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object; {advice}")
    return found


def read_lines(path: Path, good: Callable[[dict[str, Any]], bool], *, keep: bool = False) -> list[dict[str, Any]]:
    """Read the JSON objects of a file of this project, one per line; return none if the file does not exist.

    An unfinished last line, which a killed process leaves, is left out. So are other lines that are no objects of this
    kind, with a warning.

    Args:
        good: whether an object has the fields that such a line has.
        keep: whether to keep a copy of the file if lines are left out, because the caller will rewrite it without them.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; mend that, or remove it") from error
    found = [(number, _line(line, good)) for number, line in enumerate((*lines, rest), 1)]
    if bad := [number for number, value in found[:-1] if value is None and lines[number - 1].strip()]:
        copy = f"; the file as it was is {keep_damaged(path)}" if keep else ""
        more = f" and {len(bad) - 1} more lines are" if bad[1:] else " is"
        warnings.warn(f"{path}: line {bad[0]}{more} damaged and left out{copy}", stacklevel=2)
    return [value for _, value in found if value is not None]


def _line(line: bytes, good: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
        return value if isinstance(value, dict) and good(value) else None
    except (ValueError, RecursionError):
        return None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    with contextlib.suppress(OverflowError):
        return isinstance(value, int | float) and not isinstance(value, bool) and float(value) is not None
    return False


def keep_damaged(path: Path) -> Path:
    """Copy a file that is about to be rewritten; return the copy's name, ``<name>.damaged``."""
    copy = path.with_name(f"{path.name}.damaged")
    replace_bytes(copy, path.read_bytes())
    return copy


def append(file: FileIO, data: bytes) -> None:
    """Append to an unbuffered file, all or nothing.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    reason, before = "No space left on device", os.fstat(file.fileno()).st_size
    try:
        if file.write(data) == len(data):
            return
    except OSError as error:
        reason = str(error.strerror)
    with contextlib.suppress(OSError):
        file.truncate(before)
    raise InputError(f"{file.name}: {reason}; mend that, then continue with --resume")
