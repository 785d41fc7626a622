"""SIGTERM and SIGINT as requests to stop: the run finishes its step, saves and ends.

Python runs a signal's handler in the main thread, between two of its instructions. A signal that arrives during a call
into compiled code, such as waiting for a step, is handled when that call returns. So a run stops within one step and
one save. Compiling may take minutes, so it runs in a thread of its own (``StopSignals.compiling``), which is abandoned
on a signal.

Several processes stop after the same step. A signal to one of them is a request (``come``), which the loop sends to the
others along with its step. ``asked`` is the signal that all of them have received; no process leaves a wait before
that.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

from afa_jax.errors import COMPILING, Stopped
from afa_jax.mesh.processes import is_multiprocess

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal ended a wait, or a callback that may end at any point."""


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
    """A context in which SIGTERM and the first SIGINT set ``come``, and in a single-process run ``asked`` too.

    Its exit restores the earlier handlers.

    A second SIGINT is Python's own KeyboardInterrupt, without saving. Outside the main thread, where Python allows no
    handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.come: signal.Signals | None = None
        self.asked: signal.Signals | None = None
        self._is_multiprocess = is_multiprocess()
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
        """Make a signal raise Interrupted within this context; raise it at the start if one has come before."""
        self._at_once = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def compiling(self, function: Callable[[], T]) -> T:
        """Return the function's value or raise its error; a signal raises Interrupted at once, without waiting for it.

        ``Stopped`` then ends the process without waiting either (afa_jax.cli.commands.run). A run of several processes
        waits for it.
        """
        if self._is_multiprocess:
            with self.at_once():
                return function()
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name=COMPILING, daemon=True).start()
        with self.at_once():
            return done.result()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.come is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.come = signal.Signals(number)
        if self._is_multiprocess:
            return
        self.asked = self.come
        if self._at_once:
            self._at_once = False
            raise Interrupted


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Make SIGTERM raise Stopped within this context, before training has begun; the command then succeeds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number), None)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
