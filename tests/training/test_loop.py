"""The loop: what is logged, called and saved when, and that a run that was stopped goes on as if it had not been."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import progress
from afa_jax.errors import InputError, Stopped
from afa_jax.training.checkpoints import NonFiniteError
from afa_jax.training.log import TIMINGS
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.workdir import locked, open_workdir, read_metrics
from afa_jax.trees import flatten
from tests.training.tiny_run import batches, start, train_step, validate


def train(workdir: Path, steps: int, **options: Any) -> dict[str, Any]:
    workdir.mkdir(exist_ok=True)
    defaults: dict[str, Any] = dict(
        step_function=train_step, state=start(), batches=batches, every=[Every(3, validate)], log_every=4, save_every=5
    )
    return run_loop(steps=steps, seed=3, workdir=workdir, quiet=True, **defaults | options)


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]


def assert_same(state: dict[str, Any], other: dict[str, Any]) -> None:
    for name, array in flatten(state).items():
        np.testing.assert_array_equal(array, flatten(other)[name], err_msg=name)


def kept(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The final state of ten undisturbed steps, and their lines."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(workdir, 10), lines(workdir)


def test_compiling_is_announced_and_no_steps_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    seconds = [2.0]

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        time.sleep(seconds.pop() if seconds else 0)
        return train_step(state, batch, key)

    (tmp_path / "loud").mkdir()
    loud: dict[str, Any] = dict(steps=2, seed=3, workdir=tmp_path / "loud")
    run_loop(step, start(), batches, **loud)
    assert capsys.readouterr().err.splitlines()[0] == "compiling the training step"
    assert read_metrics(tmp_path / "loud")[0]["seconds_per_step"] < 1
    seconds.append(0.2)
    train(tmp_path / "quiet", 2, step_function=step)
    assert capsys.readouterr().err == ""


def test_a_line_has_the_mean_loss_and_the_timings(tmp_path):
    losses, norms = [], list[jax.Array]()

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        state, metrics = train_step(state, batch, key)
        losses.append(metrics["loss"])
        norms.append(metrics["gradient_norm"])
        return state, metrics

    train(tmp_path, 10, step_function=step)
    training = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == [4, 8, 10]
    assert training[1]["loss"] == pytest.approx(np.mean([float(loss) for loss in losses[4:8]]), rel=1e-6)
    assert [line["gradient_norm"] for line in training] == [norms[3], norms[7], norms[9]]
    largest = [max(norms[:4]), max(norms[4:8]), max(norms[8:])]
    assert [line["gradient_norm_max"] for line in training] == largest and largest[0] > norms[3]
    for line in training:
        assert line["gradient_norm"] > 0 and line["seconds_per_step"] > 0 and 0 <= line["data_wait"] <= 1
        assert line["images_per_second"] == pytest.approx(4 / line["seconds_per_step"])
    validations = [line for line in read_metrics(tmp_path) if "validation_error" in line]
    assert [line["step"] for line in validations] == [3, 6, 9, 10]


def test_a_longer_run_continues_a_shorter_one_without_a_trace(tmp_path, whole):
    train(tmp_path / "parts", 5)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [3, 4, 5, 5]
    assert_same(train(tmp_path / "parts", 10, resume=True), whole[0])
    assert lines(tmp_path / "parts") == whole[1]
    assert_same(train(tmp_path / "parts", 10, resume=True), whole[0])
    assert lines(tmp_path / "parts") == whole[1]
    with pytest.raises(InputError, match="is at step 10 already; steps=5 would go back"):
        train(tmp_path / "parts", 5, resume=True)


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGTERM, 2), (signal.SIGTERM, 6), (signal.SIGTERM, 10), (signal.SIGINT, 7)]
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, number, at):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def kill() -> None:
        os.kill(os.getpid(), number)

    def stepping(state: Any, batch: Any, key: jax.Array) -> Any:
        if state["step"] == at - 1:
            kill()
        return train_step(state, batch, key)

    def waiting(first: int) -> Iterator[Any]:
        yield from itertools.islice(batches(first), at - 1 - first)
        kill()
        threading.Event().wait(60)

    stops: dict[int, dict[str, Any]] = {at: dict(step_function=stepping), at - 1: dict(batches=waiting)}
    for step, options in stops.items():
        workdir = tmp_path / str(step)
        with pytest.raises(Stopped, match=f"stopped by {number.name} at step {step}; ") as stop:
            train(workdir, 10, **options)
        assert stop.value.status == (0 if number is signal.SIGTERM else 130)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
        assert_same(train(workdir, 10, resume=True), whole[0])
        assert lines(workdir) == whole[1]


def test_a_signal_saves_before_the_source_is_closed(tmp_path):
    saved = []

    def closing(first: int) -> Iterator[Any]:
        try:
            yield from batches(first)
        finally:
            saved.append(kept(tmp_path))

    def stepping(state: Any, batch: Any, key: jax.Array) -> Any:
        if state["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, batch, key)

    with pytest.raises(Stopped, match="at step 2;"):
        train(tmp_path, 10, step_function=stepping, batches=closing, every=[])
    assert saved == [[2]]


def test_a_signal_does_not_wait_for_the_first_step_to_compile(tmp_path, whole):
    gone_on = threading.Event()

    def compiling(state: Any, batch: Any, key: jax.Array) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        assert gone_on.wait(60)
        return train_step(state, batch, key)

    train(tmp_path, 5)
    with pytest.raises(Stopped, match="at step 5;"):
        train(tmp_path, 10, step_function=compiling, resume=True)
    gone_on.set()
    assert_same(train(tmp_path, 10, resume=True), whole[0])
    assert lines(tmp_path) == whole[1]


def test_what_the_first_step_raises_is_raised(tmp_path):
    def broken(state: Any, batch: Any, key: jax.Array) -> Any:
        raise ZeroDivisionError("in the step")

    with pytest.raises(ZeroDivisionError, match="in the step"):
        train(tmp_path, 10, step_function=broken)


@pytest.mark.parametrize("at", [3, 10])
def test_a_signal_leaves_a_callback_that_is_called_again(tmp_path, whole, at):
    def slow(state: dict[str, Any], step: int) -> dict[str, Any]:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        return validate(state, step)

    for resume in (False, True):  # the second is stopped before it has trained a step
        with pytest.raises(Stopped, match=f"at step {at};"):
            train(tmp_path / "parts", 10, every=[Every(3, validate), Every(5, slow), Every(3, slow)], resume=resume)
    straight = tmp_path / "straight"
    train(straight, 10, every=[Every(3, validate), Every(5, validate), Every(3, validate)])
    state = train(
        tmp_path / "parts", 10, every=[Every(3, validate), Every(5, validate), Every(3, validate)], resume=True
    )
    assert_same(state, whole[0])
    assert lines(tmp_path / "parts") == lines(straight)


def test_python_looks_at_a_result_when_the_next_step_is_under_way(tmp_path):
    events = []

    class Loss:
        def __init__(self, step: int):
            self.step = step
            events.append(("given", step))

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            events.append(("looked at", self.step))
            return np.ones((), np.float32)

    def step(state: dict[str, Any], batch: Any, key: jax.Array) -> Any:
        return dict(state, step=state["step"] + 1), dict(loss=Loss(int(state["step"]) + 1))

    train(tmp_path, 4, step_function=step, every=[], save_every=100, log_every=1)
    for k in (1, 2, 3):
        assert events.index(("given", k + 1)) < events.index(("looked at", k))
    assert [event for event in events if event[0] == "given"] == [("given", k) for k in (1, 2, 3, 4)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_names_its_step_its_examples_and_the_last_checkpoint(tmp_path, whole):
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, 10, batches=lambda first: batches(first, nan_at=6))
    assert str(error.value) == (
        "loss is nan at step 7 (example 23, example 28, example 33, example 38); "
        "the last good checkpoint is of step 6, and nothing was saved since; resuming repeats it: "
        "mend or leave out these examples, lower the learning rate, or set train.optimizer.clip"
    )
    assert kept(tmp_path) == [5, 6]  # the latter the best so far
    named = tmp_path / "named"
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 1 \(a.png, b.png\); there is no checkpoint before"):
        train(named, 3, batches=lambda f: batches(f, nan_at=0), describe=lambda batch: ["a.png", "b.png"])
    assert kept(named) == []
    assert_same(train(tmp_path, 10, resume=True), whole[0])


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(tmp_path, whole, caplog):
    caplog.set_level("INFO")

    def broken(first: int) -> Iterator[Any]:
        yield from itertools.islice(batches(first), 3)
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path, 10, batches=broken, every=[], log_every=1)
    assert kept(tmp_path) == [] and [line["step"] for line in lines(tmp_path)] == [1, 2]
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        train(tmp_path, 10, resume=True, resume_step=3)
    assert_same(train(tmp_path, 10, resume=True, on_resume=lambda facts: pytest.fail("nothing is resumed")), whole[0])
    assert f"{tmp_path} has no checkpoint yet; starting at step 0" in caplog.text
    assert lines(tmp_path) == whole[1]


def test_only_one_process_trains_in_a_workdir(tmp_path):
    with locked(tmp_path):
        for start in (lambda: open_workdir(tmp_path, resume=False, overwrite=False), lambda: train(tmp_path, 2)):
            with pytest.raises(InputError, match=f"another process trains in {tmp_path}"):
                start()
        (tmp_path / "config.json").touch()
        with pytest.raises(InputError, match=f"another process trains in {tmp_path}"):
            open_workdir(tmp_path, resume=False, overwrite=True)
    train(tmp_path, 2)
    with pytest.raises(InputError, match="is not empty"):
        open_workdir(tmp_path, resume=False, overwrite=False)
    open_workdir(tmp_path, resume=False, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".overwritten"}


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    def step(state: dict[str, Any], batch: Any, key: jax.Array) -> Any:
        new, metrics = train_step(state, batch, key)
        spoilt = jnp.where(new["step"] == 4, jnp.nan, new["params"]["w"])
        return new | dict(params=new["params"] | dict(w=spoilt)), metrics

    with pytest.raises(NonFiniteError, match=r"params.w is not finite at step 4 .* last good checkpoint is of step 2"):
        train(tmp_path, 10, step_function=step, every=[], save_every=2)
    assert kept(tmp_path) == [2]


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path):
    scores = {3: 0.5, 6: 0.1, 9: 0.3, 12: 0.2}
    train(tmp_path, 12, every=[Every(3, lambda state, step: dict(score=scores[step]))], save_every=4)
    assert kept(tmp_path) == [6, 8, 12]
    assert (tmp_path / "checkpoints" / "scores.json").read_text().split() == ["{", '"6":', "0.1,", '"12":', "0.2", "}"]


def test_going_on_from_an_earlier_step_removes_the_later_checkpoints_and_saves_again(tmp_path, caplog):
    caplog.set_level("INFO")
    whole = train(tmp_path, 8, keep=4, save_every=2, every=[])
    before = lines(tmp_path)
    assert kept(tmp_path) == [2, 4, 6, 8]
    assert_same(train(tmp_path, 8, keep=4, save_every=2, every=[], resume_step=4), whole)
    assert "going on from step 4; removed the checkpoints of steps 6, 8" in caplog.text
    assert kept(tmp_path) == [2, 4, 6, 8] and lines(tmp_path) == before
    with pytest.raises(InputError, match=r"--resume_step 5: .* no such checkpoint; there are 2, 4, 6, 8"):
        train(tmp_path, 8, resume_step=5)

    def refuse(facts: Any) -> None:
        raise InputError("another run's")

    with pytest.raises(InputError, match="another run's"):
        train(tmp_path, 8, resume_step=4, on_resume=refuse)
    assert kept(tmp_path) == [2, 4, 6, 8] and lines(tmp_path) == before


def test_going_back_to_the_last_step_of_a_shorter_run_removes_the_later_lines(tmp_path):
    train(tmp_path, 8, keep=4, save_every=2, every=[], log_every=2)
    train(tmp_path, 4, keep=4, save_every=2, every=[], log_every=2, resume_step=4)
    assert kept(tmp_path) == [2, 4] and [line["step"] for line in lines(tmp_path)] == [2, 4]
