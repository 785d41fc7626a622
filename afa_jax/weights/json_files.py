"""The JSON files beside weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.files import replace_text
from afa_jax.weights.tensors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: the file is missing or does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; is {path.parent.parent} a diffusers folder?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(data, indent=2) + "\n")
