"""The progress of a command: a bar on a terminal, and a line every ten seconds in a file."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

SECONDS = 10.0
"""Seconds before the first line and between two lines; a shorter task prints nothing."""
PATIENCE = 3.0
"""Seconds of waiting after which a line says what is being waited for."""
# A lock for threads: tqdm's default also locks processes by a semaphore, which a killed process leaves behind.
tqdm.set_lock(threading.RLock())
_LINE = "{desc} {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} to go{postfix}"


def progress(items: Iterable[Any] | None = None, *, quiet: bool = False, **options: Any) -> Any:
    """Return tqdm's bar over some items, or to be updated.

    Args:
        quiet: say nothing, as processes other than the first do.
        options: tqdm's, such as total, initial, unit, desc and leave.
    """
    if quiet:
        return tqdm(items, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(items, dynamic_ncols=True, **options)
    often: dict[str, Any] = dict(mininterval=SECONDS, maxinterval=SECONDS, miniters=1, delay=SECONDS)
    return _Lines(items, bar_format=_LINE, **often, **options)


def leave_out(bar: Any, seconds: float) -> None:
    """Leave seconds out of a bar's time, because they do not tell how long the rest will take."""
    if not bar.disable:
        bar.start_t += seconds
        bar.last_print_t += seconds


@contextlib.contextmanager
def announced(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Print one line that names the work within this context if it takes longer than PATIENCE."""
    # On a terminal tqdm.write clears its bar, prints and draws the bar again; in a file no line can be cleared.
    write = functools.partial(tqdm.write, file=sys.stderr) if sys.stderr.isatty() else _line
    timer = threading.Timer(PATIENCE, write, (what,))
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Lines(tqdm):
    """A tqdm that prints each state on its own line, without carriage returns that overwrite the last."""

    monitor_interval = 0  # no monitoring thread: without an update there is nothing new to print
    last_print_t: float

    shown = -1  # the count in the last line

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if line := (str(self) if msg is None else msg).strip():
            print(line, file=self.fp, flush=True)
            self.shown = self.n

    def set_postfix(self, *values: Any, **named: Any) -> None:
        """Keep these values for the next line, and print none for them."""
        super().set_postfix(*values, **named | dict(refresh=False))

    def close(self) -> None:
        if not self.disable and self.last_print_t >= self.start_t + self.delay:
            if self.shown != self.n:
                self.display()
            self.last_print_t = self.start_t  # marks the bar as never shown, so there is nothing to clear
        super().close()
