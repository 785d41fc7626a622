"""The fields of ``ensemble.json`` with their types and bounds, checked because the file may come from anybody.

It is read without JAX.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.diffusion.schedule import NoiseSchedule, ScheduleError
from afa_jax.errors import InputError
from afa_jax.names import PAIR
from afa_jax.records import plain
from afa_jax.weights.json_files import read_json
from afa_jax.weights.tensors import WeightsError

WEIGHTS, RECORD = PAIR
FORMAT = 1
_LARGEST, _MOST_EXPERTS, _LONGEST_NAME = 2**24, 1024, 1000  # the most bytes of the file, experts, characters of a name
_SHA256 = re.compile("[0-9a-f]{64}")


def aggregators_hash(folder: Path) -> str:
    """Return the sha256 of a folder's aggregators."""
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``ensemble.json`` of a folder.

    Raises:
        WeightsError: the file is missing, or as read_pair_record.
    """
    if not (folder / RECORD).is_file():
        raise WeightsError(f"{folder}: no {RECORD} there; train aggregators into it first (afa_jax.train --workdir)")
    return read_pair_record(folder / RECORD)


def read_pair_record(path: Path) -> dict[str, Any]:
    """Read an ``ensemble.json`` and check the fields in use; others may be any JSON.

    Raises:
        WeightsError: it is missing, too large, no JSON, of a later format, or a field has another type or value.
    """
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise WeightsError(f"{path}: {path.stat().st_size:,} bytes; a record of a trained run has a few thousand")
    record = read_json(path)
    try:
        _check(record)
    except InputError as error:
        raise WeightsError(f"{path}: {error}; take the file that afa_jax.train or afa_jax.export wrote") from None
    return record


def check_experts(experts: Any, what: str = "experts") -> list[dict[str, str]]:
    """Return the names and hashes of experts as records list them.

    Raises:
        InputError: they are not a list of ``{"name": ..., "sha256": ...}``.
    """
    if not isinstance(experts, list) or len(experts) > _MOST_EXPERTS:
        raise InputError(f"{what} is not a list of at most {_MOST_EXPERTS} experts")
    for number, expert in enumerate(experts):
        own = expert if isinstance(expert, dict) else {}
        name, sha256 = own.get("name"), own.get("sha256")
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
            raise InputError(f"{what}[{number}].name is not a text of 1 to {_LONGEST_NAME} characters")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise InputError(f"{what}[{number}].sha256 is not 64 hexadecimal digits")
    return experts


def _check(record: Mapping[str, Any]) -> None:
    plain(record, "the record")  # bounded finite numbers, and bounded nesting
    version = record.get("format", FORMAT)
    if type(version) is not int or version < 1:
        raise InputError("format is not a whole number")
    if version > FORMAT:
        raise InputError(f"format {version} is of a later version of afa_jax than this, which knows {FORMAT}")
    _typed(record, "fusion", dict)
    _typed(record, "sabw", dict)
    check_experts(record.get("experts", []))
    sha256 = record.get("aggregators_sha256")
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise InputError("aggregators_sha256 is not 64 hexadecimal digits")
    _typed(record, "base", str, dict)
    if (schedule := _typed(record, "schedule", dict)) is not None:
        try:
            NoiseSchedule.from_json(schedule)
        except ScheduleError as error:
            raise InputError(f"schedule: {error}") from None
    training = _typed(record, "training", dict) or {}
    for field, kind in (("steps", int), ("batch", int), ("arguments", list), ("config", dict)):
        _typed(training, field, kind, where="training.")
    for number, argument in enumerate(training.get("arguments") or []):
        if not isinstance(argument, str):
            raise InputError(f"training.arguments[{number}] is not a text")


def _typed(record: Mapping[str, Any], field: str, *kinds: type, where: str = "") -> Any:
    """Return a field, or None if it is absent; raise InputError if it has another type."""
    value = record.get(field)
    if value is not None and type(value) not in kinds:
        names = " or ".join({dict: "an object", list: "a list", str: "a text", int: "a whole number"}[k] for k in kinds)
        raise InputError(f"{where}{field} is not {names}")
    return value
