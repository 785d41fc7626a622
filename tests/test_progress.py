"""What a command says of how far it is, where nobody watches a terminal."""

import io
import sys
from typing import Any

import pytest

from afa_jax.progress import progress


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
