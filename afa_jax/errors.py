"""Errors that a user can cause and correct, and the exception of a run that was asked to stop."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

COMPILING = "compiling"  # the name of the thread that a stopped run leaves behind
LONGEST = 2000  # the most characters of a line


def cut(text: str, longest: int = LONGEST) -> str:
    """Return a text without its middle if it has more than ``longest`` characters."""
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def printable(text: object, longest: int = LONGEST) -> str:
    """Return a text that came from a file as it may be printed: on one line, without characters that act on a terminal.

    Names, captions and metadata can hold anything: escape sequences, line breaks that forge a line, controls that turn
    the direction of writing or have no width, halves of surrogate pairs that cannot be encoded. A line break becomes a
    space, any other such character its escape as Python writes it; a long text goes without its middle.
    """
    text = cut(str(text), longest)
    shown = "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)
    return cut(shown, longest)  # escapes are up to ten times as long


def some(names: Iterable[str], most: int = 5) -> str:
    """Return ``a, b, c`` for a message; of a long list only the first ones and the number of the others."""
    every = list(names)
    rest = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(printable(name, 200) for name in every[:most]) + rest


def why(error: BaseException) -> str:
    """Return a library's error about a file's text or numbers in plain words."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no {error.encoding.upper()}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = " ".join(str(error).split())
    if "integer string conversion" in text:
        return "it has a number of thousands of digits"
    if text.startswith(("invalid literal for int()", "could not convert string to float")):
        return "it has something else where a number belongs"
    if isinstance(error, AttributeError) or re.search(r" object is not | object has no | indices must be ", text):
        return "it is of another form"
    return text


class InputError(ValueError):
    """The user's input cannot be used: the message is one line that names it and says what to do.

    The commands print it without a traceback and exit with status 2. What a message quotes from a file, such as a
    tensor's name, can hold anything: arguments are shortened (``cut``) and shown by ``printable``.
    """

    def __init__(self, *args: object):
        super().__init__(*(cut(argument) if isinstance(argument, str) else argument for argument in args))

    def __str__(self) -> str:
        return printable(super().__str__())


class NotFinite(InputError):
    """A network computes NaN or infinity: with these weights and this dtype it can make no picture."""


class BadExample(InputError):
    """An example without a readable picture or without a caption."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both in args: these are sent to the other processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.reason}; mend it, or leave such examples out with data.bad=skip")


class Stopped(Exception):
    """A signal ended the run after it had saved; the commands exit with status 0, after SIGINT with 130."""

    def __init__(self, by: signal.Signals, step: int | None):
        when = "before training; start it again" if step is None else f"at step {step}; continue with --resume"
        super().__init__(f"stopped by {by.name} {when}")
        self.by, self.step = by, step
        self.status = 130 if by is signal.SIGINT else 0

    def __reduce__(self) -> tuple[type[Stopped], tuple[signal.Signals, int | None]]:
        return Stopped, (self.by, self.step)
