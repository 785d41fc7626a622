"""The loop that every trainer runs: log, save, stop, show how long it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from afa_jax.errors import InputError
from afa_jax.training.checkpoints import Checkpoints
from afa_jax.training.workdir import Metrics

Step = Callable[[dict[str, Any], Any, jax.Array], tuple[dict[str, Any], dict[str, jax.Array]]]
"""``(state, batch, key) -> (state, metrics)``, jitted."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def run_loop(
    step_function: Step,
    state: dict[str, Any],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    seed: int,
    workdir: Path,
    resume: bool,
    facts: Mapping[str, Any] | None = None,
    on_resume: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    log_every: int = 1,
    save_every: int = 1000,
    keep: int = 2,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train from the state given, or from the last checkpoint, to ``steps``; returns the final state.

    The key of a step is ``fold_in(key(seed), step)`` and its batch is ``batch_at(step)``: a resumed run continues bit
    for bit.

    Args:
        state: named pytrees, all of them saved.
        batch_at: the batch of a step, a pure function.
        facts: JSON values stored in each checkpoint, such as the hashes of frozen weights.
        on_resume: called with the checkpoint's facts; raises InputError if they do not fit this run.
        log_every: steps between lines of metrics.jsonl; a line has the mean of the loss since the last one.

    Raises:
        NonFiniteLossError: with the step.
        InputError: nothing to resume from, or a checkpoint of another run.
    """
    checkpoints = Checkpoints(workdir, keep)
    first = 0
    if resume:
        first, state, stored = checkpoints.restore(state)
        if first > steps:
            raise InputError(f"{workdir} is at step {first} already; steps={steps} would go back")
        on_resume(stored)
    metrics, key = Metrics(workdir, first), jax.random.key(seed)
    losses: list[float] = []
    started, waited = time.perf_counter(), 0.0
    progress = tqdm(range(first, steps), initial=first, total=steps, disable=quiet, dynamic_ncols=True, unit="step")
    try:
        for step in progress:
            asked = time.perf_counter()
            batch = batch_at(step)
            waited += time.perf_counter() - asked
            state, values = step_function(state, batch, jax.random.fold_in(key, step))
            losses.append(float(values["loss"]))
            if not math.isfinite(losses[-1]):
                raise NonFiniteLossError(f"the loss is {losses[-1]} at step {step}; the last checkpoint is before it")
            if (step + 1) % log_every == 0 or step + 1 == steps:
                now, mean = time.perf_counter(), sum(losses) / len(losses)
                seconds = (now - started) / len(losses)
                metrics.write(
                    step + 1,
                    dict(values) | dict(loss=mean, seconds_per_step=seconds, data_wait=waited / (now - started)),
                )
                progress.set_postfix(loss=f"{mean:.4f}")
                losses, started, waited = [], now, 0.0
            if (step + 1) % save_every == 0 or step + 1 == steps:
                checkpoints.save(step + 1, state, facts or {})
    finally:
        checkpoints.close()
        metrics.close()
    return state
