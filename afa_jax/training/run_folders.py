"""Checks of a run's folder that need no JAX: whether it holds a run, can be resumed or may be replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.files import aside, check_folder, is_partial
from afa_jax.json_files import read_object

MODEL = "model"  # the folder of the trained model, if the run trains a whole model
CONFIG, LOCK = "config.json", ".lock"
OVERWRITTEN = ".overwritten"
"""The old config's name from the removal of its run until the next run writes its config; in between the folder may
hold no run."""
OF_A_RUN = (
    "checkpoints", "metrics.jsonl", "validation.jsonl", "bad_examples.jsonl", "samples", "tensorboard", "wandb",
    "wandb.json", "aggregators.safetensors", "ensemble.json", "best", MODEL, "trials.log", "trials.log.lock",
    "best.json", aside(Path(MODEL)).name, "index.html", "comparison.png",
    "model.safetensors", "distilled.json", "distilled.safetensors",
)  # fmt: skip
"""Files and folders that trainers, the search and the demo write beside the config."""


def holds_run(workdir: Path) -> bool:
    """Return whether a folder holds a run, not something else with a config.json, such as a model."""
    if not (workdir / CONFIG).is_file():
        return False
    if any((workdir / name).exists() for name in (LOCK, "checkpoints", "metrics.jsonl", "trials.log")):
        return True  # also where the config was damaged
    try:
        return not {"train", "optimizer", "search"}.isdisjoint(read_object(workdir / CONFIG, ""))
    except InputError:
        return False


def is_removed(workdir: Path) -> bool:
    """Return whether an --overwrite has begun and no new run has written its config since."""
    return (workdir / OVERWRITTEN).is_file() and not (workdir / CONFIG).exists()


def check_workdir(workdir: Path, *, resume: bool, overwrite: bool, cache: str = "") -> None:
    """Raise the errors of open_workdir (training/workdir.py) without changing anything."""
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    check_folder(workdir)
    cached = _entry_of(workdir, cache)
    if resume:
        if not holds_run(workdir):
            raise InputError(f"--resume: {workdir} holds no run; start it without, or with --resume_if_any")
        return
    if not workdir.is_dir() or all(_begun(path) or path.name == cached for path in workdir.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{workdir} is not empty: continue it with --resume, or replace it with --overwrite")
    if not holds_run(workdir) and not is_removed(workdir):
        raise InputError(f"--overwrite: {workdir} does not look like a run (no {CONFIG} of one); remove it yourself")


def _entry_of(workdir: Path, cache: str) -> str | None:
    """Return the entry of a workdir that holds the cache, which is created before the run writes anything there.

    Raises:
        InputError: the cache's folder would be the workdir itself, or a folder that a run writes.
    """
    try:
        parts = Path(os.path.realpath(cache)).relative_to(os.path.realpath(workdir)).parts if cache else None
    except ValueError:
        return None
    if parts is None:
        return None
    if not parts or parts[0] in (*OF_A_RUN, CONFIG, LOCK, OVERWRITTEN):
        raise InputError(f"cache.path={cache}: a run writes there itself; choose another folder, such as one beside it")
    return parts[0]


def _begun(path: Path) -> bool:
    """Return whether an entry of a workdir is from a start that was killed before it had written its config."""
    if path.name == CONFIG:
        return _torn(path)
    return path.name in (LOCK, OVERWRITTEN) or (is_partial(path) and path.name.startswith(f".{CONFIG}."))


def _torn(config: Path) -> bool:
    """Return whether a config is empty or cut off, as a full disk or a power cut leaves it."""
    try:
        text = config.read_bytes().strip(b"\0 \n")
    except OSError:
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return not text or text.startswith(b"{")
    return False
