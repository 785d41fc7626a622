"""The errors that a user can cause and mend."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names it and says what to do.

    The commands print it without a traceback and exit with status 2.
    """
