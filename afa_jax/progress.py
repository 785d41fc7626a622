"""How far a command is: a bar where the output is a terminal, and in a file a line every ten seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines, and before the first one: what is done sooner says nothing."""
# For threads: tqdm's own is one for processes, too, a semaphore that a process may leave behind.
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


class _Lines(tqdm):
    """As tqdm, with a line of its own for each state, and none of the carriage returns that draw one over the last."""

    monitor_interval = 0  # no thread: what is not updated has no news
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
            self.last_print_t = self.start_t  # as if it had shown nothing: there is nothing to clear
        super().close()
