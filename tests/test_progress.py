"""What a command says of how far it is, where nobody watches a terminal."""

import io
import sys
import time
from typing import Any

import pytest

from afa_jax import progress as module
from afa_jax.progress import announced, leave_out, progress


def test_a_file_gets_a_line_every_ten_seconds_and_short_work_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)

    def bar(*arguments: Any, **options: Any) -> Any:
        made = progress(*arguments, **options)
        made._time = lambda: clock[0]
        made.start_t = made.last_print_t = 0.0
        return made

    for _ in bar(range(9), total=9, unit="image"):
        clock[0] += 1
    assert written.getvalue() == ""
    clock[0] = 0.0
    with bar(total=44, initial=4, unit="step", desc="training") as steps:
        for _ in range(40):
            clock[0] += 1
            steps.set_postfix(loss="0.5")
            steps.update()
    lines = written.getvalue().splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"training {n} of 44 steps" for n in (14, 24, 34, 44)]
    assert lines[0] == "training 14 of 44 steps, 00:10 so far, 00:30 to go, loss=0.5"
    assert "\r" not in written.getvalue()
    assert list(progress(range(3), quiet=True)) == [0, 1, 2]


def test_what_is_left_out_is_no_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress(total=44, unit="step") as steps:
        steps._time = lambda: clock[0]
        steps.start_t = steps.last_print_t = 0.0
        clock[0] += 240
        leave_out(steps, 240)
        for _ in range(11):
            clock[0] += 1
            steps.update()
    assert written.getvalue().splitlines()[0] == "10 of 44 steps, 00:10 so far, 00:34 to go"
    leave_out(progress(range(3), quiet=True), 1)


def test_what_takes_long_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    for quiet, seconds, said in ((False, 0.2, "compiling\n"), (True, 0.2, ""), (False, 0.0, "")):
        with announced("compiling", quiet=quiet):
            time.sleep(seconds)
        assert capsys.readouterr().err == said
