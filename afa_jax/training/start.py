"""Checks of a trainer of one model before it begins."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.records import recorded
from afa_jax.training.optimizer import check_objective, check_optimizer
from afa_jax.training.workdir import check_model, check_positive, check_workdir


def check_start(config: ConfigDict, workdir: Path, *, resume: bool, overwrite: bool, untrained: str = "") -> None:
    """Check a config and a workdir before any model is read.

    Args:
        untrained: the use of a run of 0 steps, in words; empty if 0 steps are not allowed.

    Raises:
        InputError: the config or the workdir cannot be used.
    """
    check_workdir(workdir, resume=resume, overwrite=overwrite)
    check_model(workdir, resume=resume)
    check_positive(config, "batch", "log_every", "save_every")
    if config.steps < (least := 0 if untrained else 1):
        raise InputError(f"steps={config.steps}; choose {least}{f' ({untrained})' if untrained else ''} or more")
    check_optimizer(config.optimizer)
    check_objective(config)
    recorded(config)  # raises if the config cannot be written as JSON


def data_of(config: ConfigDict) -> ConfigDict:
    """Return ``data`` of a config; its default kind is emoji scenes."""
    return ConfigDict(dict(kind="emoji") | config.data.to_dict())
