"""The training loop of every trainer: log, validate, save, stop and resume, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from afa_jax.errors import InputError, Stopped
from afa_jax.json_files import is_number
from afa_jax.mesh.processes import (
    alone,
    check_same,
    gather,
    is_multiprocess,
    log_once,
    max_over_processes,
    on_process_0,
    raise_on_all,
)
from afa_jax.progress import announced
from afa_jax.training.checkpoints import Checkpoints, NonFiniteError, SaveError
from afa_jax.training.log import Log
from afa_jax.training.stopping import Interrupted, StopSignals
from afa_jax.training.workdir import locked

T = TypeVar("T")
State = dict[str, Any]
"""A dictionary of pytrees of arrays."""
Step = Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]
"""A jitted function ``(state, batch, key) -> (state, metrics)``. Scalar metrics are logged; one of them is ``loss``."""
BEHIND = 1
"""Steps dispatched ahead of the one whose result Python reads, so that the accelerator never waits for Python."""
STEP = "the step"  # its name in messages about compiling
FAILED = 255
"""The value by which process 0 tells the others that it failed; it is sent in place of a signal's number."""


@dataclass(frozen=True)
class Every:
    """A callback after every ``steps`` steps and after the last one, such as validation.

    ``function(state, step)`` returns numbers and pictures (uint8 ``[h, w, 3]``) to log. A ``score`` among them decides
    which checkpoint is the best; lower is better. A signal may interrupt the function at any point; it is then called
    again, with the same arguments, when the run is resumed.
    """

    steps: int
    function: Callable[[State, int], Mapping[str, Any]]


def describe_batch(batch: Any) -> list[str]:
    """Return the names of a batch's examples by their ``index`` in the source; empty if the batch has none."""
    return [f"example {int(i)}" for i in batch["index"]] if isinstance(batch, Mapping) and "index" in batch else []


def run_loop(
    step_function: Step,
    state: State,
    batches: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    seed: int,
    workdir: Path,
    resume: bool = False,
    resume_step: int | None = None,
    facts: Mapping[str, Any] | None = None,
    on_resume: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    describe: Callable[[Any], list[str]] = describe_batch,
    every: Sequence[Every] = (),
    writers: Sequence[str] = (),
    shares: int = 1,
    log_every: int = 1,
    save_every: int = 1000,
    keep: int = 2,
    quiet: bool = False,
) -> State:
    """Train from the given state, or from a checkpoint, to ``steps``; return the final state.

    The key of step k (the first is 0) is ``fold_in(key(seed), k)`` and its batch is the first of ``batches(k)``: a
    resumed run continues bit for bit, and so does its metrics.jsonl except for the timings. Everywhere else a step is
    counted when it is done: a checkpoint, a line or a message of step 1 describes the state after the first step.

    On SIGTERM or SIGINT the loop finishes the step (or interrupts a wait for data, or a callback), saves and raises
    Stopped.

    A run that was killed before its first checkpoint is resumed from the state given, at step 0.

    Several processes run one loop (mesh/processes.py). A signal to any of them stops all after the same step, and an
    error that all can learn of ends all with the same error. Only process 0 has a workdir.

    Args:
        state: named pytrees, all of them saved.
        batches: a function that returns an iterator of batches from a step on, which may be closed early. A batch is an
            array, or a pytree of arrays, whose first axis is the batch's.
        resume_step: the checkpoint to continue from instead of the last one; later ones are removed.
        facts: JSON values stored in each checkpoint, such as the hashes of frozen weights; the same in all processes.
        on_resume: called with the facts of the checkpoint, if there is one; raises InputError if they do not fit this
            run.
        describe: the names of a batch's examples, for the message of a loss that is not finite.
        every: callbacks. A checkpoint is saved after one whose score is the best so far, too.
        writers: see afa_jax.training.writers.
        shares: the number of such batches that make up a step's batch, which the processes read separately.
        log_every: steps between lines of metrics.jsonl; a line has the mean of the loss since the last one.
        keep: the number of latest checkpoints that stay, besides the best one.

    Raises:
        NonFiniteError: a number is not finite; the error names the step, its examples and the last good checkpoint.
            Nothing after that was saved.
        SaveError: a checkpoint could not be written.
        InputError: the checkpoint ``resume_step`` is missing, damaged or of another run; another process trains in the
            workdir; or the processes have different facts.
        Stopped: a signal stopped the run, which was saved.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        on_process_0(lambda: stack.enter_context(locked(workdir)))
        check_same(facts, "experts or data")
        checkpoints = stack.enter_context(Checkpoints(workdir, keep))
        first, past, state = 0, dict[str, Any](log=None, called=True), jax.tree.map(_committed, state)
        if resume and resume_step is None and not checkpoints.steps():
            log_once(f"{workdir} has no checkpoint yet; starting at step 0")
        elif resume or resume_step is not None:
            first, state, stored = checkpoints.restore(state, resume_step)
            past = _past(stored.pop("loop", None), f"{checkpoints.folder / str(first)}")
            if first > steps:
                raise InputError(f"{workdir} is at step {first} already; steps={steps} would go back")
            raise_on_all(functools.partial(on_resume, stored))
            if removed := checkpoints.delete_after(first):
                log_once(f"going on from step {first}; removed the checkpoints of steps {', '.join(map(str, removed))}")
        done = first == steps and past["called"]
        # The past leaves out the last lines of a run to this step, which stay if there is nothing left to do.
        past_lines = None if done else past["log"]
        log = stack.enter_context(raise_on_all(lambda: Log(workdir, first, steps, past_lines, writers, quiet)))
        if done:
            return state
        run = _Run(checkpoints, log, stop, steps, log_every, save_every, every, dict(facts or {}), describe, shares)
        return run.train(step_function, state, batches, jax.random.key(seed), first, called=past["called"])


def _past(stored: Any, checkpoint: str) -> dict[str, Any]:
    """Return a checkpoint's facts on the loop: ``called`` (whether its callbacks were called) and ``log`` (Log.past).

    Raises:
        InputError: it was not written by this loop.
    """
    match stored:
        case {"called": bool(), "log": {"losses": list(losses), "last": dict(last), "lines": int() | None}} if all(
            map(is_number, [*losses, *last.values()])
        ):
            return dict(stored)
    raise InputError(f"{checkpoint} does not say where the loop was; --resume_step continues from another")


def _committed(leaf: jax.Array) -> jax.Array:
    """Return the array committed to its devices, as restored arrays are: a resumed run then reuses the same program."""
    return leaf if leaf.committed else jax.device_put(leaf, leaf.sharding)


@dataclass
class _Run:
    """A run between its first step and its last one. Its state is known to be finite once its steps are settled."""

    checkpoints: Checkpoints
    log: Log
    stop: StopSignals
    steps: int
    log_every: int
    save_every: int
    every: Sequence[Every]
    facts: dict[str, Any]
    describe: Callable[[Any], list[str]]
    shares: int
    running: deque[tuple[int, Any, float, dict[str, jax.Array], Any]] = field(default_factory=deque)
    batch: Any = None  # the batch of the last settled step
    compiled: set[Any] = field(default_factory=set)
    failure: Exception | None = None  # an error of process 0 that the others do not know yet

    def train(
        self,
        step_function: Step,
        state: State,
        batches: Callable[[int], Iterator[Any]],
        key: jax.Array,
        step: int,
        called: bool,
    ) -> State:
        first = step
        if not called:
            called = self.milestone(state, step)
        source = batches(step)
        try:
            while step < self.steps:
                try:
                    batch, waited = self.next_of(source)
                    once = functools.partial(step_function, state, batch, jax.random.fold_in(key, step))
                    state, values = self.first_step(once) if STEP not in self.compiled else once()
                except Interrupted:
                    break
                step += 1
                told = max_over_processes(FAILED if self.failure else int(self.stop.come or 0))
                self.running.append((step, batch, waited, values, told))
                self.settle(BEHIND)
                self.on_process_0_alone(self.checkpoints.check)
                if step == self.steps or any(step % n == 0 for n in (self.save_every, *(e.steps for e in self.every))):
                    self.settle(0)
                    called = self.milestone(state, step)
            if step < self.steps or not called:
                assert self.stop.asked
                self.settle(0)
                self.tell()
                if step > first and not self.checkpoints.has(step):
                    self.save(state, step, dict(log=self.log.past(), called=called))
                self.checkpoints.wait()
                raise Stopped(self.stop.asked, step)
        finally:  # after saving: the sender of the signal may not wait until the source is closed
            if hasattr(source, "close"):
                source.close()
        return state

    def call(self, name: Any, function: Callable[[], T]) -> T:
        """Call a function whose first call compiles; raise Interrupted if a signal comes meanwhile."""
        if name in self.compiled:
            return function()
        result = self.stop.compiling(function)
        self.compiled.add(name)
        return result

    def first_step(self, function: Callable[[], T]) -> T:
        """Call the step for the first time; announce that it compiles, and leave that time out of the timings."""
        started = time.perf_counter()
        with announced("compiling the training step", quiet=self.log.quiet):
            result = self.call(STEP, function)
        self.log.compiled(time.perf_counter() - started)
        return result

    def next_of(self, source: Iterator[Any]) -> tuple[Any, float]:
        """Return the next batch and the seconds it took; raise Interrupted once a signal has come."""
        asked = time.perf_counter()
        with self.stop.at_once():
            batch = next(source)
        return batch, time.perf_counter() - asked

    def settle(self, behind: int) -> None:
        """Fetch, check and log the numbers of the dispatched steps, all but the last ``behind`` of them."""
        while len(self.running) > behind:
            step, self.batch, waited, values, told = self.running.popleft()
            numbers = {name: float(value) for name, value in jax.device_get(values).items() if np.ndim(value) == 0}
            for name in ("loss", *(name for name in numbers if name.endswith("_norm"))):
                if not math.isfinite(numbers[name]):
                    raise self.not_finite(f"{name} is {numbers[name]}", step)
            self.log.add(numbers, images=self.shares * len(jax.tree.leaves(self.batch)[0]), waited=waited)
            if step % self.log_every == 0:
                self.on_process_0_alone(self.log.flush, step)
            if is_multiprocess():
                self.hear(int(told))

    def on_process_0_alone(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function that acts on process 0 only; the other processes learn of its error with a later step."""
        if not is_multiprocess():
            function(*args)
        elif self.failure is None:
            try:
                with alone():
                    function(*args)
            except Exception as error:
                self.failure = error

    def tell(self) -> None:
        """Raise process 0's error in all processes."""

        def fail() -> None:
            if self.failure is not None:
                raise self.failure

        on_process_0(fail)

    def hear(self, told: int) -> None:
        """Act on the processes' common message of a step: an error or a signal to stop."""
        if told == FAILED:
            self.tell()
        elif told:
            self.stop.asked = signal.Signals(told)

    def milestone(self, state: State, step: int) -> bool:
        """Run callbacks and save at a settled step; return whether the callbacks ran, which a signal prevents."""
        started = time.perf_counter()
        due = [e for e in self.every if step % e.steps == 0]
        extra = [e for e in self.every if e not in due] if step == self.steps else []
        results, called = list[Mapping[str, Any]](), True
        try:
            for callback in due + extra:
                with self.stop.at_once():
                    results.append(self.call(id(callback), functools.partial(callback.function, state, step)))
        except Interrupted:
            results, called = [], False
        score = next((float(values["score"]) for values in results if "score" in values), None)
        results = [{name: value for name, value in values.items() if name != "score"} for values in results]
        for values in results[: len(due)]:
            self.on_process_0_alone(self.log.write, step, values)
        past = dict(log=raise_on_all(self.log.past), called=called)
        # A longer run would not have the following lines, so they are not in the past that it resumes from.
        for values in results[len(due) :]:
            self.on_process_0_alone(self.log.write, step, values)
        if step == self.steps and called and self.log.losses:
            self.on_process_0_alone(self.log.flush, step)
        self.tell()
        if self.checkpoints.has(step):  # resumed from here to call back
            if score is not None:
                self.checkpoints.rate(step, score)
        elif (
            step % self.save_every == 0
            or step == self.steps
            or not called
            or (score is not None and self.checkpoints.improves(score))
        ):
            self.save(state, step, past, score)
        self.log.pause(time.perf_counter() - started)
        return called

    def save(self, state: State, step: int, past: dict[str, Any], score: float | None = None) -> None:
        try:
            self.checkpoints.save(step, state, self.facts | dict(loop=past), score)
        except NonFiniteError as error:
            raise self.not_finite(str(error), step) from error

    def not_finite(self, what: str, step: int) -> NonFiniteError:
        """Return the error that names the step and examples of a non-finite number, and the last good checkpoint."""
        with contextlib.suppress(SaveError):
            self.checkpoints.wait()
        steps, named = self.checkpoints.steps(), [] if self.batch is None else self.describe(self.batch)
        examples = dict.fromkeys(name for names in gather(named) for name in names)
        of = f" ({', '.join(examples)})" if examples else ""
        last = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint before it"
        return NonFiniteError(
            f"{what} at step {step}{of}; {last}, and nothing was saved since; resuming repeats it: "
            "mend or leave out these examples, lower the learning rate, or set train.optimizer.clip"
        )
