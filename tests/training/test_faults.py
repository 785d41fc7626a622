"""What a run survives: kill -9 at any moment, a full disk, NaN, a damaged checkpoint, SIGTERM. Real processes."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa_jax.training.log import TIMINGS
from afa_jax.training.workdir import read_metrics
from tests.forked import PROCESSES
from tests.training import tiny_run

STEPS = 30


class Training:
    """A training process, from when it trains."""

    def __init__(self, workdir: Path, *arguments: str):
        handle, name = tempfile.mkstemp()  # not beside the workdir, whose disk may be full
        os.close(handle)
        self.said = Path(name)
        arguments = ("--workdir", str(workdir), f"--steps={STEPS}", *arguments)
        self.process = PROCESSES.Process(target=tiny_run.of_its_own, args=(arguments, self.said))
        self.process.start()
        while self.running() and not self.said.read_text().startswith("training"):
            time.sleep(0.005)

    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self, status: int = 0) -> str:
        """What it said beside that it trains, when it has ended with this status."""
        self.process.join(60)
        said = self.said.read_text().removeprefix("training\n")
        self.said.unlink()
        assert self.process.exitcode == status, said
        return said

    def kill(self) -> bool:
        """Whether there was something to kill."""
        if not self.running():
            return False
        self.process.kill()
        self.process.join()
        self.said.unlink()
        return True


def result(workdir: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The hashes of the final arrays, and metrics.jsonl but for the timings."""
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]
    return json.loads((workdir / "final.json").read_text()), lines


def saved(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What a run ends with, by its megabytes."""
    results = {}
    for megabytes in (0, 8):
        workdir = tmp_path_factory.mktemp("undisturbed") / "run"
        Training(workdir, f"--megabytes={megabytes}").finish()
        results[megabytes] = result(workdir)
    return results


def test_killed_at_twenty_random_moments(tmp_path, undisturbed):
    """Runs that are killed until they have reached their end, one after another until there were twenty kills."""
    random, kills, runs = np.random.default_rng(0), 0, 0
    while kills < 20 or runs == 0:
        workdir = tmp_path / str(runs)
        process = Training(workdir, "--megabytes=8", *how_to_go_on(workdir))
        time.sleep(random.uniform(0, 1))
        if kills < 20 and process.kill():
            kills += 1
        else:
            process.finish()
            assert result(workdir) == undisturbed[8]
            runs += 1


def how_to_go_on(workdir: Path) -> list[str]:
    return ["--resume"] if workdir.exists() else []


def test_killed_while_saving(tmp_path, undisturbed):
    def saving() -> bool:
        return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    workdir, hits = tmp_path / "run", 0
    for _ in range(4):
        process = Training(workdir, "--megabytes=8", *how_to_go_on(workdir))
        before = saved(workdir)
        while not saving() or not saved(workdir):
            assert process.running()
        assert process.kill()
        hits += saving()
        assert max(saved(workdir)) >= max(before, default=0)
    assert hits
    Training(workdir, "--megabytes=8", "--resume").finish()
    assert result(workdir) == undisturbed[8]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"28", "30", "scores.json"}
    assert not any(workdir.glob("checkpoints/*.*-*")) and not any(workdir.glob("checkpoints/*.deleted"))


def test_sigterm_saves_and_exits_with_success(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    process = Training(workdir, "--pause=0.1", "--save_every=1000")
    while not any(workdir.glob("checkpoints/*/facts")):  # the best so far, after the validation of step 5
        time.sleep(0.01)
    asked = time.monotonic()
    process.send(signal.SIGTERM)
    errors = process.finish()
    assert time.monotonic() - asked < 30
    step = max(saved(workdir))
    assert 5 <= step < STEPS and errors == f"stopped by SIGTERM at step {step}; continue with --resume\n"
    process = Training(workdir, "--resume", "--pause=0.1")
    while read_metrics(workdir)[-1]["step"] <= step:
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert "stopped by SIGINT at step" in process.finish(130)
    Training(workdir, "--resume").finish()
    assert result(workdir) == undisturbed[0]


def test_nan_in_a_batch(tmp_path):
    errors = Training(tmp_path / "run", "--nan_at=10").finish(2)
    assert errors == (
        "error: loss is nan at step 11 (example 6, example 11, example 16, example 21); "
        "the last good checkpoint is of step 10, and nothing was saved since; resuming repeats it: "
        "mend or leave out these examples, lower the learning rate, or set train.optimizer.clip\n"
    )
    assert max(saved(tmp_path / "run")) == 10


def test_a_damaged_checkpoint_is_named_and_another_resumed(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    Training(workdir, "--megabytes=8").finish()
    (workdir / "final.json").unlink()
    files = (path for path in (workdir / "checkpoints" / "30").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    errors = Training(workdir, "--megabytes=8", "--resume").finish(2)
    assert errors.startswith(f"error: {workdir}/checkpoints/30 is damaged (") and errors.count("\n") == 1
    assert errors.endswith("; --resume_step 28 continues from another\n")
    Training(workdir, "--megabytes=8", "--resume_step=28").finish()
    assert result(workdir) == undisturbed[8]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 28 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk, undisturbed):
    workdir = small_disk / "run"
    errors = Training(workdir, "--megabytes=8").finish(2)
    last = max(saved(workdir))
    assert errors == (
        f"error: {workdir}/checkpoints: step {last + 2} was not saved, the one of step {last} is intact "
        "(no space left on the disk; make room, then continue with --resume)\n"
    )
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    Training(workdir, "--megabytes=8", "--resume").finish()
    assert result(workdir) == undisturbed[8]


def test_files_that_may_not_grow(tmp_path, undisturbed):
    """As a full disk, for those who may not mount one: every write beyond a size fails."""
    workdir = tmp_path / "run"
    errors = Training(workdir, "--megabytes=8", "--largest_file=4000000").finish(2)
    assert errors.startswith(f"error: {workdir}/checkpoints: step 2 was not saved, there is none before it (")
    assert errors.count("\n") == 1 and saved(workdir) == []
