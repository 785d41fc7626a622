"""The JSON files beside weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.errors import why
from afa_jax.files import replace_text
from afa_jax.weights.formats.foreign_files import foreign
from afa_jax.weights.tensors import WeightsError

_LONGEST, _MOST_BRACKETS = 2**24, 2**20  # an index of shards has 0.2 MB


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        WeightsError: the file is missing or does not hold a JSON object.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; is {path.parent.parent} a diffusers folder?") from None
    except OSError as error:
        raise WeightsError(f"{path}: not readable ({error.strerror})") from error
    if len(text) > _LONGEST or text.count(b"[") + text.count(b"{") > _MOST_BRACKETS:
        raise WeightsError(f"{path}: more than {_LONGEST >> 20} MB of JSON, which no model has; fetch it again")
    try:
        data = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({foreign(path, text[:64]) or why(error)})") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(data, indent=2) + "\n")
