"""The errors that a user can cause and mend, and the end of a run that was asked to stop."""

import signal

COMPILING = "compiling"  # the name of a thread that a run which was stopped leaves behind


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names it and says what to do.

    The commands print it without a traceback and exit with status 2.
    """


class Stopped(Exception):
    """A signal ended the run, which saved before it went; the commands exit with status 0, after SIGINT with 130."""

    def __init__(self, by: signal.Signals, step: int | None):
        when = "before training; start it again" if step is None else f"at step {step}; continue with --resume"
        super().__init__(f"stopped by {by.name} {when}")
        self.status = 130 if by is signal.SIGINT else 0
