"""The cost of a method: memory, and seconds a picture beside those of one expert in the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
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
    method: Method,
    options: SampleOptions,
    reference: tuple[Method, SampleOptions],
    folder: PictureFolder,
    prompts: Sequence[str],
) -> dict[str, Any]:
    """Return a picture's time relative to the reference's, the reference's seconds, and the program's memory in bytes.

    Batches of both alternate. ``time_ratio`` is the median over the pairs, ``time_ratio_low`` and ``_high`` the least
    and the greatest ratio. On a CPU, which other work shares, CPU time is compared. The result is kept beside the
    pictures and measured again on another device, with other options or with another reference. The bytes are the
    compiler's count of the program's arguments, temporaries and results. ``work``, if the work of the method depends on
    the picture, holds the means of ``Picture.work``.

    Args:
        prompts: what a method draws whose work depends on the picture; each round takes the next ones. Other methods
            draw the empty prompt.
    """
    work: list[Mapping[str, float]] = []
    drawn = list(prompts) if hasattr(method.denoiser, "work") else [""]

    def measure() -> dict[str, Any]:
        own, other = _timer(method, options, drawn, work), _timer(*reference, [""], [])
        own(), other()  # compile
        work.clear()
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
        ) | (dict(work={name: float(np.mean([one[name] for one in work])) for name in work[0]}) if work else {})

    condition = dict(
        device=jax.devices()[0].device_kind,
        rounds=ROUNDS,
        options=dataclasses.asdict(options),
        reference=record_of(*reference),
        reference_options=dataclasses.asdict(reference[1]),
        **({} if drawn == [""] else dict(prompts=hashlib.sha256("\n".join(drawn).encode()).hexdigest())),
    )
    return folder.kept("cost", condition, measure)


def _timer(
    method: Method, options: SampleOptions, prompts: Sequence[str], work: list[Mapping[str, float]]
) -> Callable[[], tuple[float, float]]:
    """Return a function that samples a batch of the next prompts, and returns its seconds and its seconds of CPU time.

    It adds each picture's ``work`` to the list.
    """
    following = itertools.cycle(prompts)

    def run() -> tuple[float, float]:
        requests = [Request(prompt=next(following), number=i) for i in range(options.batch)]
        started, cpu = time.perf_counter(), time.process_time()
        # A reference whose pictures are not finite takes as long; a method of which that is true is not measured.
        with contextlib.suppress(NotFinite):
            made = list(generate(requests, method.denoiser, method.experts, seed=0, options=options))
            work.extend(picture.work for picture in made if picture.work)
        return time.perf_counter() - started, time.process_time() - cpu

    return run
