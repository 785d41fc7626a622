"""A run of ``afa_jax.distil`` as it is read: the model and the record beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.weights.json_files import read_json

FORMAT = "afa_jax.distilled 1"
RECORD = "distilled.json"
SINGLE, MODEL = "model.safetensors", "model"
"""The distilled model as a single file and as a diffusers folder."""


def read_distilled(folder: Path) -> dict[str, Any]:
    """Return the record of a distilled run.

    Raises:
        InputError: it cannot be read, or is of another format.
    """
    record = dict(read_json(folder / RECORD))
    if record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD}: its format is {str(record.get('format'))!r:.40}, not {FORMAT!r}")
    return record
