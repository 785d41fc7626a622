"""The errors that a user can cause and mend, and the end of a run that was asked to stop."""

from __future__ import annotations

import signal

COMPILING = "compiling"  # the name of a thread that a run which was stopped leaves behind
_LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names it and says what to do.

    The commands print it without a traceback and exit with status 2. What a message quotes from a file, such as a
    tensor's name, can hold anything: it is shown as printable characters on one line, a long one without its middle.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)


class Stopped(Exception):
    """A signal ended the run, which saved before it went; the commands exit with status 0, after SIGINT with 130."""

    def __init__(self, by: signal.Signals, step: int | None):
        when = "before training; start it again" if step is None else f"at step {step}; continue with --resume"
        super().__init__(f"stopped by {by.name} {when}")
        self.by, self.step = by, step
        self.status = 130 if by is signal.SIGINT else 0

    def __reduce__(self) -> tuple[type[Stopped], tuple[signal.Signals, int | None]]:
        return Stopped, (self.by, self.step)
