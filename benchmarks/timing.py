"""How the benchmarks measure: programs take turns in one run, and what is told is a ratio of CPU times.

Seconds say little on a machine that does other work as well: it slows whatever happens to run beside it. Of programs
that take turns, each round is met by the same weather; the median over the rounds forgets the worst of it. CPU time
leaves out the waiting. On a GPU or TPU the host's CPU time says nothing, and it is the time of the clock that counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Task = Callable[[], tuple[float, float]]
"""Runs once; returns what it took: (seconds of CPU time, seconds of the clock)."""


class Program:
    """A compiled function of trees of arrays, called with those that it was compiled for.

    Arrays cross into it as a flat list: to take a tree of modules apart costs Python milliseconds at every call, which
    nothing pays that runs for long (a sampler crosses once for all of its steps, training keeps flat dictionaries).

    Attributes:
        seconds: of CPU time that tracing, lowering and compiling took.
        temporary: bytes beside arguments and results, as the compiler counts them.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        import jax

        self.leaves, structure = jax.tree.flatten(arguments)
        started = time.process_time()
        flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*structure.unflatten(leaves))))
        self.compiled = flat.lower(*self.leaves).compile()
        self.seconds = time.process_time() - started
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        """The leaves of the result."""
        import jax

        return jax.block_until_ready(self.compiled(*self.leaves))

    def task(self) -> tuple[float, float]:
        """Run once."""
        started, cpu = time.perf_counter(), time.process_time()
        self()
        return time.process_time() - cpu, time.perf_counter() - started


def take_turns(tasks: Mapping[str, Task], rounds: int) -> dict[str, np.ndarray]:
    """``[rounds, 2]`` for each task: seconds of CPU and of the clock, after one round that is not counted."""
    for task in tasks.values():
        task()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            times[name].append(task())
    return {name: np.asarray(rows) for name, rows in times.items()}


def seconds(times: np.ndarray) -> float:
    """The median: of CPU time on a CPU, else of the clock's."""
    return float(np.median(_column(times)))


def ratio(times: np.ndarray, base: np.ndarray) -> float:
    """The median over the rounds of one task's time over another's in the same round."""
    return float(np.median(_column(times) / _column(base)))


def _column(times: np.ndarray) -> np.ndarray:
    import jax

    return times[:, 0 if jax.default_backend() == "cpu" else 1]
