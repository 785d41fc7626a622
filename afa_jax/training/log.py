"""The log of a run: metrics.jsonl, further writers, and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from afa_jax.mesh.processes import is_process_0
from afa_jax.progress import leave_out, progress
from afa_jax.training.workdir import Metrics
from afa_jax.training.writers import make_writers

TIMINGS = ("images_per_second", "seconds_per_step", "data_wait")
"""The fields of a line that differ from run to run; all others are reproduced bit for bit."""


class Log:
    """The numbers of a run that begins, or continues, after step ``first``; only process 0 writes them.

    The line of a training interval has the mean of its losses, the other numbers of its last step, the largest
    ``gradient_norm`` as ``gradient_norm_max``, ``images_per_second`` and ``seconds_per_step`` (callbacks and their
    saving left out), and ``data_wait``, the share of the time that was spent waiting for batches.

    Args:
        past: the log's ``past()`` from the checkpoint that the run continues from.
        writers: names of the writers besides metrics.jsonl.
    """

    def __init__(
        self,
        workdir: Path,
        first: int,
        steps: int,
        past: Mapping[str, Any] | None = None,
        writers: Sequence[str] = (),
        quiet: bool = False,
    ):
        past = past or dict(losses=[], last={}, lines=None)
        self.losses: list[float] = list(past["losses"])
        self._last: dict[str, float] = dict(past["last"])
        writes = is_process_0()
        self._writers = make_writers(writers if writes else (), workdir, first)
        self._metrics = Metrics(workdir, first, past["lines"]) if writes else None
        self._progress = progress(initial=first, total=steps, quiet=quiet or not writes, unit="step")
        self._started, self._waited, self._steps, self._images = time.perf_counter(), 0.0, 0, 0

    def past(self) -> dict[str, Any]:
        """Return the interval's numbers so far and the count of lines, as JSON, for a resumed run to continue from."""
        if self._metrics is not None:
            self._metrics.sync()
        lines = None if self._metrics is None else self._metrics.lines
        return dict(losses=list(self.losses), last=dict(self._last), lines=lines)

    def add(self, numbers: Mapping[str, float], images: int, waited: float) -> None:
        """Add a step to the interval: its numbers, its batch size and the seconds that it waited for the batch."""
        self.losses.append(numbers["loss"])
        largest = self._last.get("gradient_norm_max", 0.0)
        self._last = dict(numbers)
        if "gradient_norm" in numbers:
            self._last["gradient_norm_max"] = max(largest, numbers["gradient_norm"])
        self._steps, self._images, self._waited = self._steps + 1, self._images + images, self._waited + waited
        self._progress.update()

    def flush(self, step: int) -> None:
        """Write the line of the interval that ends with ``step``."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        mean = sum(self.losses) / len(self.losses)
        # The interval's first batch was waited for before it began: the loop looks at a loss one step late.
        waited = min(self._waited / seconds, 1.0)
        timings = (self._images / seconds, seconds / max(self._steps, 1), waited)
        self.write(step, self._last | dict(loss=mean) | dict(zip(TIMINGS, timings, strict=True)))
        self._progress.set_postfix(loss=f"{mean:.4f}")
        self.losses, self._last = [], {}
        self._started, self._waited, self._steps, self._images = time.perf_counter(), 0.0, 0, 0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of other values; pictures (uint8 ``[h, w, 3]``) go to the writers only."""
        pictures = {name: np.asarray(value) for name, value in values.items() if np.ndim(value) == 3}
        numbers = {name: float(value) for name, value in values.items() if np.ndim(value) == 0}
        if numbers and self._metrics is not None:
            self._metrics.write(step, numbers)
        for writer in self._writers:
            writer.write(step, numbers, pictures)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def compiled(self, seconds: float) -> None:
        """Leave out the time that compiling the step took, also from the progress bar's rate."""
        self.pause(seconds)
        leave_out(self._progress, seconds)

    @property
    def quiet(self) -> bool:
        """Return whether this process shows no progress."""
        return bool(self._progress.disable)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
        for writer in self._writers:
            writer.close()
