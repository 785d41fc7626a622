"""The folder of a run: its lock, its config and its metrics. Of several processes only process 0 accesses it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.files import naming, replace_text, sweep, sync, writing
from afa_jax.json_files import append, is_number, read_lines
from afa_jax.mesh.processes import on_process_0, runs_on_process_0
from afa_jax.records import record_text
from afa_jax.training import run_folders
from afa_jax.training.run_folders import CONFIG, LOCK, MODEL, OF_A_RUN, OVERWRITTEN, holds_run, is_removed
from afa_jax.weights.formats.folders import check_target, save_folder

check_workdir = runs_on_process_0(run_folders.check_workdir)


def resume_if_any(options: argparse.Namespace) -> None:
    """Turn ``--resume_if_any`` into ``--resume``, nothing or ``--overwrite``, whichever the workdir needs."""
    if options.resume_if_any:
        options.resume, options.overwrite = found_run(options.workdir)


def found_run(workdir: Path) -> tuple[bool, bool]:
    """Return whether to resume and whether to overwrite, according to the workdir."""
    resume, overwrite = on_process_0(lambda: [holds_run(workdir), is_removed(workdir)])
    return resume, overwrite


@runs_on_process_0
def check_model(workdir: Path, *, resume: bool) -> None:
    """Raise InputError if a resumed run has a ``model`` that could not be replaced at its end."""
    if resume:
        check_target(workdir / MODEL, overwrite=True)


def save_model(workdir: Path, **parts: Any) -> Path:
    """Write the trained model by save_folder, over an earlier one of the same run; return the folder."""
    save_folder(workdir / MODEL, **parts, overwrite=True)
    return workdir / MODEL


@runs_on_process_0
def open_workdir(workdir: Path, *, resume: bool, overwrite: bool, cache: str = "") -> None:
    """Create or open a run's folder; it is resumed or overwritten only on request.

    Overwriting removes the files of a run and leaves others. If it is killed at any moment, it leaves a complete
    run, none, or one that ``--overwrite`` and ``--resume_if_any`` finish removing.

    Args:
        cache: the folder of the data cache, which may be in the run's folder.

    Raises:
        InputError: the folder is not empty and neither was requested, both were, there is nothing to resume, or another
            process trains in the folder that is to be replaced.
    """
    check_workdir(workdir, resume=resume, overwrite=overwrite, cache=cache)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir):
            if overwrite:
                _remove_run(workdir)
            sweep(workdir)


def _remove_run(workdir: Path) -> None:
    config, removed = workdir / CONFIG, workdir / OVERWRITTEN
    if config.is_file():
        config.replace(removed)
        sync(workdir)
    for path in [*workdir.iterdir()]:
        if path.name.removesuffix(".damaged") in OF_A_RUN:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock a run's folder against other processes; the system releases the lock when this process ends in any way.

    Raises:
        InputError: another process holds the lock.
    """
    with open(workdir / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process trains in {workdir}; wait for its end, or choose another") from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def check_positive(config: ConfigDict, *fields: str) -> None:
    """Raise InputError if a number of steps, a batch or an interval is below one."""
    for field in fields:
        if config[field] < 1:
            raise InputError(f"{field}={config[field]}; choose 1 or more")


@runs_on_process_0
def write_config(workdir: Path, config: ConfigDict) -> None:
    """Write the config into the run's folder in the form of records.py."""
    begin_run(workdir, record_text(config))


def begin_run(workdir: Path, text: str) -> None:
    """Write config.json: from then on the folder holds a run."""
    replace_text(workdir / CONFIG, text)
    (workdir / OVERWRITTEN).unlink(missing_ok=True)


@runs_on_process_0
def keep_config(workdir: Path, config: ConfigDict) -> None:
    """Write the config of a new run; a resumed run keeps its own until the new one is found to fit."""
    if not any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        write_config(workdir, config)


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with its ``step``. A line is in the file when ``write`` returns.

    On resuming at ``step``, lines of later steps (from the lost part of the run) and an unfinished last line are
    removed, so that every step is there once.

    Args:
        most: keep no more lines than this; an uninterrupted run would not have written the others.
    """

    def __init__(self, workdir: Path, step: int = 0, most: int | None = None):
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir, keep=True) if line["step"] <= step][:most]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = len(kept)
        self._file = FileIO(path, "a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            InputError: as append.
        """
        append(self._file, (json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()}) + "\n").encode())
        self.lines += 1

    def sync(self) -> None:
        """Wait until all lines are on the disk, so that no checkpoint is ahead of them."""
        with naming(Path(self._file.name)):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(workdir: Path, *, keep: bool = False) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl: numbers by name and ``step``; [] without the file; as ``files.read_lines``."""

    def good(line: dict[str, Any]) -> bool:
        return isinstance(line.get("step"), int) and all(map(is_number, line.values()))

    return read_lines(workdir / "metrics.jsonl", good, keep=keep)


def _plain(value: Any) -> Any:
    return float(value) if hasattr(value, "dtype") else value
