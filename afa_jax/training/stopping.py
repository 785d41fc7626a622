"""SIGTERM and SIGINT as a request: the run ends its step, saves and goes.

Python runs a signal's handler in the main thread, between two of its instructions: one that arrives within a call into
compiled code, such as waiting for a step or compiling the first one, is seen when that call returns. So a run stops
within one step and one save; only compiling takes longer.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """Leaves a wait or a callback that may be left at any point."""


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
    """Within it SIGTERM and the first SIGINT set ``asked``; the handlers from before come back after it.

    A second SIGINT is Python's own KeyboardInterrupt, without saving. Outside the main thread, where Python allows no
    handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises Interrupted; it does so at the start as well, if one has come before."""
        self._at_once = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        if self._at_once:
            self._at_once = False
            raise Interrupted
