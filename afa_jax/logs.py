"""What the package says of its work: lines at INFO for Python's ``logging``, which commands print."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LOGGER = logging.getLogger("afa_jax")


class _Printer(logging.Handler):
    """Print each line to standard output; unlike logging's own handlers raise what goes wrong, such as a full disk."""

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
