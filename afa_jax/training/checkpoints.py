"""Checkpoints through orbax: flat dictionaries of arrays, written in the background, checked and resumed exactly.

``workdir/checkpoints`` holds a folder for each kept step and ``scores.json``. Orbax writes a checkpoint under a
temporary name and renames it when it is complete. So a process that is killed while saving leaves no half checkpoint,
only a temporary folder, which the next run removes. Orbax does not notice changed bytes, so restoring checks two sums
(crc32). That of every file, in ``sums.json``, finds damage on the disk before orbax reads it. That of every array finds
damage on the way there and back.

Of several processes only process 0 reads and writes. It gathers the arrays on its host before it saves them, and
broadcasts what it restores; each process then places the arrays on its devices as the run's mesh says. So the folder
need not be shared, and neither the number of processes nor the mesh is part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afa_jax.errors import InputError
from afa_jax.files import replace_text, sweep, sync
from afa_jax.mesh.processes import (
    alone,
    broadcast_arrays,
    gather_arrays,
    is_multiprocess,
    is_process_0,
    on_process_0,
    place,
    runs_on_process_0,
)
from afa_jax.trees import flatten, unflatten

_DELETED = ".deleted"  # suffix of a checkpoint that is being removed
_UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's, of one that is being written


class NonFiniteError(InputError):
    """The loss or the state of a run became NaN or infinite."""


class SaveError(InputError):
    """A checkpoint could not be written; the ones before it are intact."""


class Checkpoints:
    """The checkpoints of one run, in ``workdir/checkpoints``.

    The last ``keep`` checkpoints stay, and the best one besides them. All processes must call every method.

    Args:
        keep: the number of latest checkpoints that stay.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self.folder, self.keep = workdir / "checkpoints", keep
        self._scores: dict[int, float] = {}
        self._saving: int | None = None
        self._checkpointer: Any = None
        self._open()

    @runs_on_process_0
    def _open(self) -> None:
        import orbax.checkpoint as ocp

        if self.keep < 1:
            raise InputError(f"keep={self.keep}; choose 1 or more")
        # Orbax also raises the errors that it logs, and we print them in one line.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        _hush_closed_loops()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove(f"*{_DELETED}")
        self._remove(f"*{_UNFINISHED}*")
        sweep(self.folder)
        self._scores = _read_scores(self.folder / "scores.json")
        # Orbax must not wait for the other processes.
        mine = ocp.options.MultiprocessingOptions(active_processes={0} if is_multiprocess() else None)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=mine)),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            multiprocessing_options=mine,
        )

    @runs_on_process_0
    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    @runs_on_process_0
    def has(self, step: int) -> bool:
        """Return whether a step's checkpoint is saved or being saved."""
        return step == self._saving or step in self.steps()

    @runs_on_process_0
    def best(self) -> int | None:
        """Return the step of the checkpoint with the lowest score, the earliest of equals; None if none has a score."""
        return min((step for step in self.steps() if step in self._scores), key=self._rank, default=None)

    @runs_on_process_0
    def improves(self, score: float) -> bool:
        """Return whether a score is finite and lower than that of every checkpoint."""
        best = self.best()
        return math.isfinite(score) and (best is None or score < self._scores[best])

    @runs_on_process_0
    def rate(self, step: int, score: float) -> None:
        """Set the score of a checkpoint, or of one about to be saved: lower is better, and NaN means no score."""
        if math.isfinite(score):
            self._scores = {s: self._scores[s] for s in self.steps() if s in self._scores} | {step: score}
            replace_text(self.folder / "scores.json", json.dumps(self._scores, indent=2) + "\n")

    def save(self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any], score: float | None = None) -> None:
        """Save named pytrees and JSON facts; return as soon as the arrays are copied.

        Args:
            score: lower is better; the checkpoint with the lowest one is kept.

        Raises:
            NonFiniteError: an array holds NaN or infinity; nothing is saved.
            SaveError: this save could not begin, or the one before it failed.
            ValueError: a checkpoint of this step exists.
        """
        flat = {name: flatten(tree) for name, tree in trees.items()}
        self._save(step, gather_arrays(flat) if is_multiprocess() else flat, facts, score)

    @runs_on_process_0
    def _save(self, step: int, flat: Mapping[str, Any], facts: Mapping[str, Any], score: float | None) -> None:
        import orbax.checkpoint as ocp

        self.wait()
        if step in self.steps():
            raise ValueError(f"{self.folder / str(step)} exists")
        record = dict(facts=dict(facts), arrays=_describe(flat, check_finite=True))
        self._saving = step
        with self._explained():
            if score is not None:
                self.rate(step, score)
            self._checkpointer.save(
                self.folder.absolute() / str(step),
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(flat),
                    facts=ocp.args.JsonSave(record),
                ),
            )

    def check(self) -> None:
        """Raise the background save's error; if the save is complete, remove old checkpoints.

        The other processes neither wait for the save nor learn of its error.

        Raises:
            SaveError: a save failed; the error names the step, the reason and the last saved step.
        """
        if self._saving is not None and is_process_0():
            with alone():
                self._check()

    def _check(self) -> None:
        with self._explained():
            self._checkpointer.check_for_errors()
        if (self.folder / str(self._saving)).is_dir():
            with self._explained():
                sync(self.folder)  # the new name is on the disk before old ones are removed
            self._saving = None
            kept = {*self.steps()[-self.keep :], self.best()}
            self._delete([step for step in self.steps() if step not in kept])

    @runs_on_process_0
    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            SaveError: as check.
        """
        if self._saving is not None:
            with self._explained():
                self._checkpointer.wait_until_finished()
            self.check()

    def restore(self, trees: Mapping[str, Any], step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Return a checkpoint: its step, pytrees like ``trees`` on the same devices, and its facts.

        Args:
            step: the checkpoint's step; that of the last one by default.

        Raises:
            InputError: there is none, it is damaged, or it has other arrays than ``trees``.
        """
        wanted = {name: flatten(tree) for name, tree in trees.items()}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted)
        if not is_multiprocess():
            step, facts, arrays = self._restore(shapes, step)
        else:
            read = dict[str, Any]()

            def on_host() -> tuple[int, dict[str, Any]]:
                like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
                found, facts, read["arrays"] = self._restore(like, step)
                return found, facts

            step, facts = on_process_0(on_host)
            arrays = broadcast_arrays(read.get("arrays"), shapes)
            arrays = jax.tree.map(lambda array, leaf: place(array, leaf.sharding), arrays, shapes)
        return step, {name: unflatten(tree, arrays[name]) for name, tree in trees.items()}, facts

    def _restore(self, wanted: dict[str, Any], step: int | None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Return a checkpoint's step, facts and arrays; each array is placed like its counterpart in ``wanted``."""
        import orbax.checkpoint as ocp

        steps = self.steps()
        if not steps:
            raise InputError(f"{self.folder} holds no checkpoint to resume from; start again with --overwrite")
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise InputError(f"--resume_step {step}: {self.folder} has no such checkpoint; there are {self.listing()}")
        path = self.folder.absolute() / str(step)
        with self._damage_named(step):
            for name, crc in json.loads((path / "sums.json").read_text()).items():
                if _sum_of_file(path / name) != crc:
                    raise ValueError(f"{name} has changed")
            record = self._checkpointer.restore(path, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
            facts, stored = dict(record["facts"]), dict(record["arrays"])
            difference = _difference(stored, _describe(wanted))
        if difference:
            raise InputError(f"{self.folder / str(step)} cannot be restored into this config: {difference}")
        with self._damage_named(step):
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
            arrays = self._checkpointer.restore(path, args=args)["arrays"]
            if changed := _difference(stored, _describe(arrays, sums=True)):
                raise ValueError(changed)
        return step, facts, arrays

    @runs_on_process_0
    def delete_after(self, step: int) -> list[int]:
        """Remove the checkpoints after ``step``, from which a run continues; return their steps."""
        later = [s for s in self.steps() if s > step]
        self._delete(later)
        return later

    @runs_on_process_0
    def listing(self) -> str:
        """Return the steps as text for a message: ``10, 20 (best), 30``."""
        best = self.best()
        return ", ".join(f"{step} (best)" if step == best else str(step) for step in self.steps())

    @runs_on_process_0
    def close(self) -> None:
        """Wait until the last save is on disk, then close.

        Raises:
            SaveError: as check.
        """
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
            return
        # What ended the run is what the user is to read, not what the last save met with besides. It may have ended
        # this process only.
        with alone(), contextlib.suppress(SaveError):
            self.close()

    def _seal(self) -> None:
        """Write the files' checksums and flush them to disk; orbax calls this before it names a finished checkpoint."""
        (folder,) = self.folder.glob(f"{self._saving}{_UNFINISHED}*")
        # Only the files of the arrays and the facts: orbax still writes its own notes beside their folders.
        files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
        sums = {str(path.relative_to(folder)): _sum_of_file(path) for path in files}
        replace_text(folder / "sums.json", json.dumps(sums, indent=2) + "\n")
        # Orbax does not flush its files, so the system may write the new name first: a power cut must not lose both.
        for path in (*folder.rglob("*"), folder):
            sync(path)

    def _rank(self, step: int) -> tuple[float, int]:
        return self._scores[step], step

    def _delete(self, steps: list[int]) -> None:
        # Renamed first: what is killed here must not leave a folder that looks like a checkpoint. From the last one on:
        # nor may it leave the newest of a run that goes on from an earlier step, which would be resumed from it.
        for step in sorted(steps, reverse=True):
            (self.folder / str(step)).rename(self.folder / f"{step}{_DELETED}")
        self._remove(f"*{_DELETED}")

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)  # the next run removes any rest

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            self._remove(f"{step}{_UNFINISHED}*")
            intact = f"the one of step {self.steps()[-1]} is intact" if self.steps() else "there is none before it"
            reason = "no space left on the disk; make room" if _disk_full(error) else f"{_first_line(error)}; mend that"
            raise SaveError(
                f"{self.folder}: step {step} was not saved, {intact} ({reason}, then continue with --resume)"
            ) from error

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the checkpoint may be good
            others = sorted((s for s in self.steps() if s != step), key=lambda s: (s > step, abs(s - step)))
            offer = f"--resume_step {others[0]} continues from another" if others else "--overwrite starts again"
            raise InputError(f"{self.folder / str(step)} is damaged ({_first_line(error)}); {offer}") from error


def _describe(
    trees: Mapping[str, Mapping[str, Any]], *, sums: bool = False, check_finite: bool = False
) -> dict[str, list[Any]]:
    """Return the shape and dtype of every array, and its crc32 if ``sums`` or ``check_finite``."""
    described: dict[str, list[Any]] = {}
    for name, tree in trees.items():
        host = jax.device_get(dict(tree)) if sums or check_finite else tree
        for key, leaf in host.items():
            described[f"{name}.{key}"] = [list(leaf.shape), str(leaf.dtype)]
            if sums or check_finite:
                array = np.ascontiguousarray(leaf).reshape(-1)
                described[f"{name}.{key}"].append(zlib.crc32(array.view(np.uint8).data))
                if check_finite and not np.issubdtype(array.dtype, np.integer) and not np.isfinite(array).all():
                    raise NonFiniteError(f"{name}.{key} is not finite")
    return described


def _difference(stored: Mapping[str, list[Any]], other: Mapping[str, list[Any]]) -> str:
    """Return the first difference between two descriptions in words, "" for none; crc32s count if both have them."""
    for name in sorted(stored.keys() | other.keys()):
        if name not in other:
            return f"it has {name}, which the config lacks"
        if name not in stored:
            return f"it lacks {name}"
        (shape, dtype, *crc), (other_shape, other_dtype, *other_crc) = stored[name], other[name]
        if (shape, dtype) != (other_shape, other_dtype):
            return f"{name} is {dtype} {shape} there and {other_dtype} {other_shape} here"
        if crc and other_crc and crc != other_crc:
            return f"the bytes of {name} have changed"
    return ""


def _sum_of_file(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            crc = zlib.crc32(chunk, crc)
    return crc


def _read_scores(path: Path) -> dict[int, float]:
    try:
        scores = {int(step): float(score) for step, score in json.loads(path.read_text()).items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError("a score that is not finite")
        return scores
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not readable; remove it, and the best checkpoint is not known any more") from error


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


@functools.cache  # once in a process
def _hush_closed_loops() -> None:
    """Silence the "Event loop is closed" errors that tensorstore's threads print after a failed write.

    When several writes fail, orbax handles the first and closes its event loop; the others then find it closed. Any
    other uncatchable error is reported as before.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = report_others


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
