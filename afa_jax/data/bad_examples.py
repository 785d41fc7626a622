"""The examples that a run leaves out, each recorded once in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afa_jax.data.loader import Batch
from afa_jax.errors import some
from afa_jax.files import replace_text
from afa_jax.json_files import read_lines
from afa_jax.mesh.processes import gather, is_process_0

NAMED = 20  # names in the summary; the file has all of them


class BadExamples:
    """``bad_examples.jsonl``: a ``{"name", "reason"}`` a line, no name twice, also over resumed runs.

    The file is made with the first bad example. Among processes that train together only process 0 writes it, and it
    learns of the others' examples at the end of the first epoch.

    Args:
        path: the file, such as workdir/bad_examples.jsonl; existing lines are read.
        length: the number of examples of the data set, including the bad ones.
        epoch: the number of examples of an epoch, if it is smaller, as the cache leaves the bad ones out.
        batch: the number of examples of a step, over all processes.
    """

    def __init__(self, path: Path, length: int, batch: int, epoch: int | None = None):
        self.path, self.length = path, length
        self.writes = is_process_0()
        self.last_step = -(-(epoch or length) // batch) - 1  # the last step of the first epoch
        entries = read_lines(path, _is_entry, keep=True) if self.writes else []
        self.reasons: dict[str, str] = {entry["name"]: entry["reason"] for entry in entries}

    def take(self, step: int, batch: Batch) -> str | None:
        """Take ``bad`` out of a step's batch; return a summary with the last step of the first epoch."""
        self.add(batch.pop("bad", ()))
        if step != self.last_step:
            return None
        for reasons in gather(self.reasons):
            self.add(reasons.items())
        return self.summary() if self.reasons else None

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Count the examples that were not counted yet."""
        new = {name: reason for name, reason in bad if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        if not self.writes:
            return
        # The whole file at once: the lines are few, and a run that is killed leaves no half of a line.
        lines = (json.dumps(dict(name=name, reason=reason)) + "\n" for name, reason in self.reasons.items())
        replace_text(self.path, "".join(lines))

    def summary(self) -> str:
        """Return one line with the number of examples that are left out, and their names."""
        names = list(self.reasons)
        more = f", see {self.path}" if len(names) > NAMED else ""
        return f"{len(names)} of {self.length} examples left out: {some(names, NAMED)}{more}"


def _is_entry(line: dict[str, Any]) -> bool:
    return isinstance(line.get("name"), str) and isinstance(line.get("reason"), str)
