"""The prediction type of a single file, by the marks that trainers leave in the file and beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from afa_jax.errors import InputError, some
from afa_jax.weights.formats.yaml_files import yaml_prediction
from afa_jax.weights.json_files import read_json
from afa_jax.weights.tensors import WeightsError

PREDICTIONS = dict(epsilon="epsilon", v="v_prediction", v_prediction="v_prediction", sample="sample")
_KOHYA = re.compile(r"sd_v[12]_v")  # kohya-ss's name of a base model of v-prediction
_SCHEDULER = Path("scheduler") / "scheduler_config.json"


def said_inside(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the prediction types that a file gives, by the place that gives them.

    Args:
        names: the names of the file's tensors.

    Raises:
        WeightsError: ModelSpec's field is no prediction type.
    """
    spec = metadata.get("modelspec.prediction_type", "")
    if spec and spec.lower() not in PREDICTIONS:
        raise WeightsError(
            f"{path}: its metadata modelspec.prediction_type is {spec[:40]!r}, not v or epsilon; pass "
            "prediction_type='epsilon' or 'v_prediction'"
        )
    said = {"its metadata modelspec.prediction_type": PREDICTIONS[spec.lower()]} if spec else {}
    for mark, found in (
        ("its metadata modelspec.architecture", "-768-v" in metadata.get("modelspec.architecture", "")),
        ("its metadata ss_base_model_version", _KOHYA.fullmatch(metadata.get("ss_base_model_version", ""))),
        ("its tensor v_pred", "v_pred" in names),
    ):
        said |= {mark: "v_prediction"} if found else {}
    return said


def said_beside(path: Path) -> dict[str, str]:
    """Return the prediction types in files beside a file: NAME.yaml, or the configs of its diffusers folder.

    Raises:
        WeightsError: one of them cannot be read.
    """
    beside = {f"{path.stem}.yaml beside it": yaml_prediction(path)}
    if (path.parent / "model_index.json").is_file() and (path.parent / _SCHEDULER).is_file():
        stored = read_json(path.parent / _SCHEDULER).get("prediction_type")
        beside[f"{_SCHEDULER.as_posix()} beside it"] = PREDICTIONS.get(stored) if isinstance(stored, str) else None
    return {mark: said for mark, said in beside.items() if said}


def agreed(path: Path, said: Mapping[str, str]) -> str | None:
    """Return the prediction type on which all places agree, None without any.

    Raises:
        WeightsError: they contradict each other; the error lists each place and its type.
    """
    if len(set(said.values())) > 1:
        marks = some(f"{mark} says {what}" for mark, what in said.items())
        raise WeightsError(f"{path}: {marks}; mend one, or pass prediction_type='epsilon' or 'v_prediction'")
    return next(iter(said.values()), None)


def check_prediction(prediction: str | None) -> None:
    """Raise InputError for an unknown prediction type; None, for no type given, is accepted."""
    if prediction not in (None, *PREDICTIONS.values()):
        raise InputError(f"prediction_type={prediction!r}; choose epsilon or v_prediction")
