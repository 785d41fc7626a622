"""Damage files, read them in a process of their own, and look at how that ends, how long it takes, and its memory."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import os
import random
import resource
import shutil
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.forked import PROCESSES
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, _check_line

SECONDS, MEMORY = 10.0, 300 * 2**20  # what a small file may take: memory besides twice its size
ADDRESSES = 12 * 2**30  # of a reading process: what asks for more gets a MemoryError, and is found


@dataclasses.dataclass(frozen=True)
class Finding:
    """What should not have happened: target and number make the file again."""

    target: str
    number: int
    file: str
    kind: str
    detail: str


@dataclasses.dataclass
class Figures:
    """What was read: ``refused`` were InputErrors."""

    files: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0
    findings: list[Finding] = dataclasses.field(default_factory=list)
    messages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def fuzz(
    folder: Path, numbers: Iterable[int], *, seconds: float, targets: Sequence[str] = (), keep: Path | None = None
) -> Figures:
    """Damage and read a file for each number, the targets in turn, until there are no more or the time is over.

    Args:
        keep: where the damaged file of each finding is copied.
    """
    names = list(targets or TARGETS)
    figures, end = Figures(), time.monotonic() + seconds
    jobs: Iterator[tuple[str, int]] = ((names[number % len(names)], number // len(names)) for number in numbers)
    seeds = {name: folder / "seeds" / name for name in names}
    maker = PROCESSES.Process(target=_make_seeds, args=(seeds,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("a valid input could not be read; see above")
    job = next(jobs, None)
    while job is not None and time.monotonic() < end:
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=_work, args=(there, folder / "work", seeds), daemon=True)
        process.start()
        there.close()
        while job is not None and time.monotonic() < end:
            target, number = job
            here.send(job)
            try:
                answer = here.recv() if here.poll(3 * SECONDS) else None
            except EOFError:
                answer = None
            figures.files += 1
            if answer is None:  # it hangs, or the process is gone
                process.join(0.5)
                code = process.exitcode
                detail = "still reading" if code is None else f"the process ended with {code}"
                figures.findings.append(Finding(target, number, "", "hang" if code is None else "crash", detail))
                _keep(keep, folder / "work", figures.findings[-1])
                job = next(jobs, None)
                break
            kind, file, detail, took, memory = answer
            figures.slowest, figures.largest = max(figures.slowest, took), max(figures.largest, memory)
            if kind == "refused":
                figures.refused += 1
                figures.messages[detail] += 1
            elif kind != "read":
                figures.findings.append(Finding(target, number, file, kind, detail))
                _keep(keep, folder / "work", figures.findings[-1])
            job = next(jobs, None)
        process.kill()
        process.join()
        here.close()
    return figures


def _make_seeds(seeds: dict[str, Path]) -> None:
    """A valid input for each target, which is read whole once: damage is to be the only fault."""
    for name, path in seeds.items():
        path.mkdir(parents=True)
        TARGETS[name].make(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].read(path)


def _work(pipe: Connection, folder: Path, seeds: dict[str, Path]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    sink = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    os.dup2(sink.fileno(), 1)
    os.dup2(sink.fileno(), 2)
    with contextlib.suppress(EOFError):
        while True:
            target, number = pipe.recv()
            pipe.send(_one(folder, seeds[target], target, number))


def _one(folder: Path, seed: Path, target: str, number: int) -> tuple[str, str, str, float, int]:
    """(read, refused or what went wrong; the file; in words; seconds; bytes)."""
    draw = random.Random(f"{target}/{number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder)
    files = sorted({path for pattern in TARGETS[target].files for path in folder.glob(pattern) if path.is_file()})
    file = draw.choice(files)
    data = mutated(file.read_bytes(), file.name, draw)
    file.write_bytes(data)
    name = file.relative_to(folder).as_posix()
    before = _peak_from_now()
    start, kind, detail = time.monotonic(), "read", ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            TARGETS[target].read(folder)
    except Exception as error:  # whatever it is, is the result
        kind, detail = _classified(error)
    except BaseException as error:  # such as a Rust library's panic, which is no Exception
        kind, detail = "exception", repr(error)[:300]
    took, memory = time.monotonic() - start, max(0, _peak() - before)
    if kind in ("read", "refused") and took > SECONDS:
        kind, detail = "slow", f"{took:.1f} s"
    if kind in ("read", "refused") and memory > 2 * len(data) + MEMORY:
        kind, detail = "memory", f"{memory / 2**20:.0f} MiB for {len(data)} bytes"
    return kind, name, detail, took, memory


def _classified(error: Exception) -> tuple[str, str]:
    from afa_jax.errors import InputError

    if isinstance(error, InputError):
        try:
            _check_line(error)
        except AssertionError as wrong:
            return "message", str(wrong)
        return "refused", type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "afa_jax" in f.filename), last)
    where = f"{Path(ours.filename).name}:{ours.lineno}"
    return "exception", f"{where}: {type(error).__name__}: {str(error)[:200]!r}"


def _peak_from_now() -> int:
    """Begin to measure the peak anew; the bytes that the process has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _keep(keep: Path | None, folder: Path, finding: Finding) -> None:
    if keep is not None:
        name = f"{finding.kind}-{finding.target}-{finding.number}".replace(" ", "_").replace("'", "")
        shutil.rmtree(keep / name, ignore_errors=True)
        shutil.copytree(folder, keep / name)
