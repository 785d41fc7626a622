"""The log of a search's trials: optuna's journal. Records are written whole; a resume removes a torn one."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.files import FOUND, replace_bytes
from afa_jax.json_files import append, keep_damaged, read_object
from afa_jax.training.run_folders import CONFIG

_DAMAGE = (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, OverflowError)
"""Exceptions that optuna raises on records that are valid JSON but make no sense."""


def optuna() -> Any:
    """Import optuna and let it log warnings only.

    Raises:
        InputError: optuna or cmaes is not installed.
    """
    try:
        import cmaes  # noqa: F401, optuna's CMA-ES needs it
        import optuna as library
    except ImportError as error:
        raise InputError(
            f"the search needs {error.name}, which is not installed: pip install -r requirements-search.txt"
        ) from None
    library.logging.set_verbosity(library.logging.WARNING)
    return library


def check_result(out: Path, workdir: Path, *, again: bool) -> None:
    """Check the path of a search's result before any work is done.

    Args:
        again: whether the workdir's search is continued or replaced; then its own result may be replaced too.

    Raises:
        InputError: something else exists there, or the path cannot be written.
    """
    FOUND.check(out)
    if os.path.lexists(out):
        from afa_jax.records import recorded  # numpy is imported only when needed

        advice = "choose another --out, or remove it"
        made = again and recorded(read_object(out, advice).get("settings"))
        if not made or made != read_object(workdir / CONFIG, "restore it, or choose another --workdir").get("search"):
            raise InputError(f"{out} exists and is not of the search in {workdir}; {advice}")


def open_study(log: Path, direction: str, first: Mapping[str, float]) -> Any:
    """Open the study in a log, or begin a new one; only one process may do so at a time.

    A log that ends within a record, as a full disk or a power cut leaves it, is cut to the complete records: the lost
    trial is evaluated again.

    Args:
        direction: "maximize" or "minimize".
        first: the parameters of a search's first trial.

    Raises:
        InputError: the log cannot be read, or holds something else or the trials of another search.
    """
    library = optuna()
    log.with_name(log.name + ".lock").unlink(missing_ok=True)  # optuna's lock of a process that was killed
    advice = "restore the file, or start again with --overwrite"
    try:
        mend(log)
        storage = library.storages.JournalStorage(_journal(log))
        if storage.get_all_studies():
            study = library.load_study(storage=storage, study_name="merge")
        else:
            study = library.create_study(storage=storage, study_name="merge", direction=direction)
        finished = study.get_trials(states=(library.trial.TrialState.COMPLETE,))
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}; {advice}") from error
    except _DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{log}: not a log of trials ({type(error).__name__}: {error}); {advice}") from error
    if finished and not any(trial.params == first for trial in finished):
        raise InputError(f"{log}: holds the trials of another search; {advice}")
    return study


def mend(log: Path) -> None:
    """Cut a log to its complete records and warn; if more than an unfinished last line goes, keep a copy of the log."""
    data = log.read_bytes() if log.exists() else b""
    lines, whole = data.splitlines(keepends=True), 0
    while whole < len(lines) and _is_record(lines[whole]):
        whole += 1
    if whole == len(lines):
        return
    only_unfinished = whole == len(lines) - 1 and not data.endswith(b"\n")
    if not whole and not only_unfinished:
        raise ValueError("its first line is no record")
    copy = "" if only_unfinished else f"; the log as it was is {keep_damaged(log)}"
    replace_bytes(log, b"".join(lines[:whole]))
    warnings.warn(
        f"{log}: line {whole + 1} is no whole record; the search goes on from the {whole} before it{copy}",
        stacklevel=2,
    )


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("op_code"), int) and line.endswith(b"\n")


def _journal(log: Path) -> Any:
    """Return optuna's backend with another append: all or nothing, and without a lock that a kill would leave."""

    class Journal(optuna().storages.journal.JournalFileBackend):  # type: ignore[misc]  # imported here only
        def append_logs(self, logs: Sequence[Mapping[str, Any]]) -> None:
            with FileIO(log, "a") as file:
                append(file, "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in logs).encode())

    return Journal(str(log))
