"""The cost of a method: memory, and seconds a picture beside those of one expert in the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from afa_jax.errors import NotFinite
from afa_jax.evaluation.comparison.pictures import PictureFolder, record_of
from afa_jax.methods.method import Method
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate, program_memory
from afa_jax.target import platform

ROUNDS = 5  # each is followed by one of the reference


def cost_of(
    method: Method, options: SampleOptions, reference: tuple[Method, SampleOptions], folder: PictureFolder
) -> dict[str, Any]:
    """Return a picture's time relative to the reference's, the reference's seconds, and the program's memory in bytes.

    Batches of both alternate. ``time_ratio`` is the median over the pairs, ``time_ratio_low`` and ``_high`` the least
    and the greatest ratio. On a CPU, which other work shares, CPU time is compared. The result is kept beside the
    pictures and measured again on another device, with other options or with another reference. The bytes are the
    compiler's count of the program's arguments, temporaries and results.
    """

    def measure() -> dict[str, Any]:
        own, other = _timer(method, options), _timer(*reference)
        own(), other()  # compile
        pairs = np.asarray([(*own(), *other()) for _ in range(ROUNDS)])
        column = 1 if platform() == "cpu" else 0
        ratios = pairs[:, column] / pairs[:, column + 2] * (reference[1].batch / options.batch)
        return dict(
            reference_seconds=float(np.median(pairs[:, 2])) / reference[1].batch,
            time_ratio=float(np.median(ratios)),
            time_ratio_low=float(ratios.min()),
            time_ratio_high=float(ratios.max()),
            ratio_of="CPU time" if column else "time",
            memory_bytes=program_memory(method.denoiser, method.experts, options),
        )

    condition = dict(
        device=jax.devices()[0].device_kind,
        rounds=ROUNDS,
        options=dataclasses.asdict(options),
        reference=record_of(*reference),
        reference_options=dataclasses.asdict(reference[1]),
    )
    return folder.kept("cost", condition, measure)


def _timer(method: Method, options: SampleOptions) -> Callable[[], tuple[float, float]]:
    """Return a function that samples one batch and returns its seconds and its seconds of CPU time."""
    requests = [Request(prompt="", number=i) for i in range(options.batch)]

    def run() -> tuple[float, float]:
        started, cpu = time.perf_counter(), time.process_time()
        # A reference whose pictures are not finite takes as long; a method of which that is true is not measured.
        with contextlib.suppress(NotFinite):
            list(generate(requests, method.denoiser, method.experts, seed=0, options=options))
        return time.perf_counter() - started, time.process_time() - cpu

    return run
