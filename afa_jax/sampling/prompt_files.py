"""Files of prompts to sample, a line each; those of a comparison are read by afa_jax/evaluation/comparison/prompts.py.

There prompts that are alike count once and empty lines not at all. Here the number of a line decides its pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.mesh.processes import first
from afa_jax.sampling.generate import Request
from afa_jax.weights.tokenizer.prompts import check_prompt, shortened, warn_of_syntax
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

FIELDS = ("prompt", "negative_prompt")
"""Of a line of a .jsonl file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a file, a line each.

    Attributes:
        requests: of one picture of each line, with number 0.
        sha256: of the file.
    """

    path: Path
    requests: Sequence[Request]
    sha256: str


def read_prompts(path: Path, negative_prompt: str = "") -> Prompts:
    """The prompts of a text file, one a line, or of a .jsonl file with ``prompt`` and perhaps ``negative_prompt``.

    Args:
        path: of the file, in UTF-8.
        negative_prompt: of the lines that have none.

    Raises:
        InputError: no such file; a line that is empty or cannot be read, by its number.
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
    requests = [read(line, f"{path}:{number}", negative_prompt) for number, line in enumerate(lines, 1)]
    if path.suffix == ".jsonl":
        _warn_of_unused(path, lines)
    warn_of_syntax(text for request in requests for text in dict.fromkeys((request.prompt, request.negative_prompt)))
    return Prompts(path=path, requests=requests, sha256=hashlib.sha256(data).hexdigest())


def _read_text(line: str, where: str, negative_prompt: str) -> Request:
    if not line.strip():
        raise InputError(f"{where}: the line is empty; write a prompt there, or remove it")
    prompt, negative = check_prompt(line, where), check_prompt(negative_prompt, f"{where}: negative_prompt")
    return Request(prompt=prompt.strip(), negative_prompt=negative)


def _read_json(line: str, where: str, negative_prompt: str) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{where}: not JSON ({error}); write {{"prompt": "..."}}') from error
    row = row if isinstance(row, dict) else {}
    prompt, negative = row.get("prompt"), row.get("negative_prompt")
    negative = negative_prompt if negative is None else negative
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise InputError(f'{where}: write {{"prompt": "...", "negative_prompt": "..."}}, the second if you like')
    return _read_text(prompt, where, negative)


def _warn_of_unused(path: Path, lines: Sequence[str]) -> None:
    """Warn, once, of fields that no picture comes of."""
    rows = [json.loads(line) for line in lines]
    if unused := list(dict.fromkeys(field for row in rows for field in row if field not in FIELDS)):
        count, named = sum(any(field in row for field in unused) for row in rows), shortened(", ".join(unused))
        known = ", ".join(FIELDS)
        warnings.warn(f"{path}: {named}: not used, in {count} of {len(rows)} lines; a line has {known}", stacklevel=2)


def check_words(prompts: Prompts, tokenizer: Tokenizer) -> None:
    """See that a tokenizer knows the words of every line; warn, once, of prompts that are cut.

    Raises:
        InputError: the first line that it refuses, by its number.
    """
    seen, cut = set[str](), list[str]()
    for number, request in enumerate(prompts.requests, 1):
        for text in {request.prompt, request.negative_prompt} - seen:
            seen.add(text)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    tokenizer([text])
                except InputError as error:
                    raise InputError(f"{prompts.path}:{number}: {error}") from error
            cut += [f"{prompts.path}:{number}: {warning.message}" for warning in caught]
    if cut and first():
        more = f"; {len(cut) - 1} more are too long" if len(cut) > 1 else ""
        warnings.warn(cut[0] + more, UserWarning, stacklevel=2)
