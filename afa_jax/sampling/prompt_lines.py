"""Files of prompts to sample, one a line, read without JAX.

The number of a line decides its pictures, so equal lines each count and an empty line is an error. In a comparison's
prompts, which afa_jax/evaluation/comparison/prompts.py reads, equal prompts count once and empty lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from afa_jax.errors import InputError, why
from afa_jax.weights.tokenizer.prompts import check_prompt, shortened, warn_of_syntax

FIELDS = ("prompt", "negative_prompt")
"""The fields of a line in a .jsonl file."""


class Line(NamedTuple):
    """A line of a file of prompts."""

    prompt: str
    negative_prompt: str


def read_lines(path: Path, negative_prompt: str = "", *, quiet: bool = False) -> tuple[list[Line], str]:
    """Read a text file with one prompt per line, or .jsonl with prompt and negative_prompt; return lines and sha256.

    Args:
        path: the file, in UTF-8.
        negative_prompt: the negative prompt of lines that have none.
        quiet: give no warnings, because a second reading of the file will give them.

    Raises:
        InputError: the file does not exist, or a line is empty or cannot be read; the error has its number.
    """
    if path.suffix == ".json":
        raise InputError(f"--prompts {path}: write an object a line into a .jsonl file, or a prompt a line into a .txt")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--prompts {path}: {error.strerror}; name a file with a prompt a line") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{number}: not UTF-8; save the file as that") from error
    if not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"--prompts {path}: it is empty; write a prompt a line")
    read = _read_json if path.suffix == ".jsonl" else _read_text
    found = [read(line, f"{path}:{number}", negative_prompt) for number, line in enumerate(lines, 1)]
    if not quiet:
        if path.suffix == ".jsonl":
            _warn_of_unused(path, lines)
        warn_of_syntax(text for line in found for text in dict.fromkeys(line))
    return found, hashlib.sha256(data).hexdigest()


def _read_text(line: str, where: str, negative_prompt: str) -> Line:
    if not line.strip():
        raise InputError(f"{where}: the line is empty; write a prompt there, or remove it")
    prompt, negative = check_prompt(line, where), check_prompt(negative_prompt, f"{where}: negative_prompt")
    return Line(prompt.strip(), negative)


def _read_json(line: str, where: str, negative_prompt: str) -> Line:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{where}: not JSON ({why(error)}); write {{"prompt": "..."}}') from error
    row = row if isinstance(row, dict) else {}
    prompt, negative = row.get("prompt"), row.get("negative_prompt")
    negative = negative_prompt if negative is None else negative
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise InputError(f'{where}: write {{"prompt": "...", "negative_prompt": "..."}}, the second if you like')
    return _read_text(prompt, where, negative)


def _warn_of_unused(path: Path, lines: Sequence[str]) -> None:
    """Warn once of fields that have no effect."""
    rows = [json.loads(line) for line in lines]
    if unused := list(dict.fromkeys(field for row in rows for field in row if field not in FIELDS)):
        count, named = sum(any(field in row for field in unused) for row in rows), shortened(", ".join(unused))
        known = ", ".join(FIELDS)
        warnings.warn(f"{path}: {named}: not used, in {count} of {len(rows)} lines; a line has {known}", stacklevel=2)
