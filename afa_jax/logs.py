"""The package's log: lines at level INFO of Python's ``logging``, which the commands print."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LOGGER = logging.getLogger("afa_jax")


class _Printer(logging.Handler):
    """A handler that prints each line to standard output. Unlike logging's own it raises errors, as of a full disk."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


@contextlib.contextmanager
def printed(wanted: bool = True) -> Iterator[None]:
    """Print the package's lines within this context, as commands do; each once, also in a context within another."""
    if not wanted or any(isinstance(handler, _Printer) for handler in LOGGER.handlers):
        yield
        return
    printer, level, propagate = _Printer(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(printer)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # nor may a handler of the root print it again
    try:
        yield
    finally:
        LOGGER.removeHandler(printer)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
