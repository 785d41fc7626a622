"""Several real processes: they find each other, agree, train, save and stop together, and end together."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.training.checkpoints import Checkpoints
from afa_jax.training.log import TIMINGS
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.workdir import read_metrics
from tests.processes import toy
from tests.processes.conftest import Launch, Process

TOY = "tests/processes/toy.py"


def ended(processes: list[Process], status: int = 0) -> list[str]:
    """What they wrote to stderr, when all have ended with this status."""
    statuses = [process.end() for process in processes]
    said = [process.said() for process in processes]
    assert statuses == [status] * len(processes), said
    return said


def alone(workdir: Path, steps: int = 6, resume: bool = False) -> dict[str, Any]:
    """The run of this process, on its eight devices."""
    step, state = toy.make(2)
    workdir.mkdir(exist_ok=True)
    return run_loop(
        step, state, toy.batches, steps=steps, seed=3, workdir=workdir, resume=resume, facts=dict(data="toy"),
        every=[Every(5, toy.validate)], save_every=3, quiet=True,
    )  # fmt: skip


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]


def assert_close(run: tuple[dict[str, Any], list[dict[str, Any]]], other: Any) -> None:
    """Two final states and their lines; sums over another number of devices round differently."""
    for name, array in run[0].items():
        np.testing.assert_allclose(
            np.float32(array), np.float32(other[0][name]), rtol=1e-5 if array.dtype != jnp.bfloat16 else 1e-2
        )
    assert [line.keys() for line in run[1]] == [line.keys() for line in other[1]]
    for line, line_of_other in zip(run[1], other[1], strict=True):
        np.testing.assert_allclose(list(line.values()), list(line_of_other.values()), rtol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The final state of one process alone, and its lines."""
    workdir = tmp_path_factory.mktemp("whole")
    return alone(workdir), lines(workdir)


def test_a_value_an_error_and_arrays_reach_every_process(launch: Launch, tmp_path: Path) -> None:
    processes = launch(TOY, 4, f"--workdir={tmp_path}", "--agree")
    ended(processes)
    for index, process in enumerate(processes):
        # What is an error of the product's own is what it was where it happened, and told by name elsewhere.
        untold = "TypeError" if index == 0 else "RuntimeError: process 0: TypeError"
        own = "ZeroDivisionError: by zero" if index == 3 else "RuntimeError: process 3: ZeroDivisionError: by zero"
        found = json.loads(process.output[-1])
        assert found == dict(
            process=index,
            processes=4,
            errors=[
                "InputError: process 0 cannot read its file",
                "InputError: process 2 cannot read its file",
                "NonFiniteError: loss is nan",
                "OSError: [Errno 28] full: '/a'",
                own,
                f"{untold}: object cannot be told to another process",
                "InputError: experts: process 1 has others than process 0; give all hosts the same files",
            ],
            first=dict(me=0, long="x" * 5000),
            exact="(None, nan, -0.0, b'\\xff', [0])",
            nested=[0],
            own=f"read by {index}",
            gathered=["y" * 600 * i for i in range(4)],
            largest=[0, 9, 3],
            negative_zeros=True,
            received=[[3, 5], "bfloat16", 7, [70000]],
        )


def test_a_checkpoint_of_four_processes_is_restored_by_two_and_by_one_on_another_mesh(
    launch: Launch, tmp_path: Path, whole: Any
) -> None:
    workdir = tmp_path / "run"
    ended(launch(TOY, 4, f"--workdir={workdir}", "--pause=0.3", how="slurm"))
    final = json.loads((workdir / "final.json").read_text())
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"5", "6", "scores.json"}
    read = lines(workdir)
    ended(launch(TOY, 2, f"--workdir={workdir}", "--resume", "--columns=2", how="ompi", devices=2))
    assert json.loads((workdir / "final.json").read_text()) == final
    _, like = toy.make(8)
    with Checkpoints(workdir) as checkpoints:
        step, state, _ = checkpoints.restore(like)
    assert step == 6 and state["big"].sharding == like["big"].sharding
    assert toy.sums(state) == final
    assert_close((state, read), whole)
    assert lines(workdir) == read
    rates = [line for line in read_metrics(workdir) if "images_per_second" in line]
    for line in rates:
        assert line["images_per_second"] == pytest.approx(toy.BATCH / line["seconds_per_step"])


@pytest.mark.parametrize("process", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    launch: Launch, tmp_path: Path, whole: Any, process: int
) -> None:
    workdir = tmp_path / "run"
    processes = launch(TOY, 2, f"--workdir={workdir}", "--pause=0.2", "--steps=1000", how="variables")
    processes[process].wait_for("batch 1")
    processes[process].send(signal.SIGTERM)
    said = ended(processes)
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert said == [f"stopped by SIGTERM at step {step}; continue with --resume"] * 2
    assert 2 <= step < 7
    assert_close((alone(workdir, resume=True), lines(workdir)), whole)


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    launch: Launch, tmp_path: Path, whole: Any, process: int
) -> None:
    workdir = tmp_path / "run"
    arguments = [f"--workdir={workdir}", "--resume_if_any", "--pause=0.1"]
    processes = launch(TOY, 2, *arguments, "--steps=1000")
    processes[1].wait_for("batch 4")
    processes[process].kill()
    killed = time.monotonic()
    assert processes[1 - process].end() not in (0, 2)
    print(time.monotonic() - killed, processes[1 - process].errors)
    ended(launch(TOY, 2, *arguments, how="slurm"))
    assert_close((alone(workdir, resume=True), lines(workdir)), whole)


def test_a_process_that_is_not_heard_of_ends_the_others(launch: Launch, tmp_path: Path) -> None:
    processes = launch(TOY, 2, f"--workdir={tmp_path / 'run'}", "--pause=0.1", "--steps=1000", heartbeat=12)
    processes[0].wait_for("batch 4")
    processes[1].send(signal.SIGSTOP)  # it keeps its connections
    assert processes[0].end(60) not in (0, 2)


def test_what_stops_one_process_is_said_by_all(launch: Launch, tmp_path: Path) -> None:
    """A loss that is not finite by a row of the last process; then a disk that is full for process 0."""
    nan = launch(TOY, 2, f"--workdir={tmp_path / 'nan'}", "--nan_at=3")
    full = launch(TOY, 2, f"--workdir={tmp_path / 'full'}", "--largest_file=1000")
    examples = ", ".join(f"example {index}" for index in range(24, 32))
    for said in ended(nan, 2):
        assert said.startswith(f"error: loss is nan at step 4 ({examples}); the last good checkpoint is of step 3, ")
    first, second = ended(full, 2)
    # Whichever of the files that grow is full first.
    at = f"error: {tmp_path / 'full'}"
    assert first == second and first.startswith((f"{at}/checkpoints: step 3 was not saved", f"{at}/metrics.jsonl: "))


def test_a_workdir_that_is_refused_is_refused_in_all_processes(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for said in ended(launch(TOY, 2, f"--workdir={tmp_path}"), 2):
        assert said == f"error: {tmp_path} is not empty: continue it with --resume, or replace it with --overwrite"


def test_processes_that_do_not_come_are_missed_in_a_line(launch: Launch, tmp_path: Path) -> None:
    """Process 0 waits for process 1, and that of another start for a process 0 that is not there."""
    lonely = [launch(TOY, 2, f"--workdir={tmp_path}", only=only, patience=3)[0] for only in (0, 1)]
    for said, missing in zip(ended(lonely, 2), ("not all others came", "process 0 does not answer"), strict=True):
        assert re.fullmatch(f"error: --coordinator 127.0.0.1:[0-9]+: {missing}.* after 3 seconds; start .*", said)
