"""Shared parts of the commands: configs, overrides, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ml_collections import ConfigDict

from afa_jax.cli.arguments import argument, place
from afa_jax.config.files import check_kind, load_config
from afa_jax.config.schema import check
from afa_jax.errors import COMPILING, InputError, Stopped, printable
from afa_jax.experts.specs import parse_argument
from afa_jax.logs import printed
from afa_jax.program_cache import calm_compiler, keep_programs

_PLACES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO,
)  # fmt: skip
"""Errors that the file system raises for the path itself, when a file is read or written."""


def run(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command as ``python -m`` does.

    Returns:
        The exit status: what the command returns, 0 for None; 0 too for a run that saved and stopped at SIGTERM; 2
        after one line on stderr for an InputError (something to mend: an argument, a file, a full disk, too little
        memory, a loss that is not finite); 130 for SIGINT. Of several processes each ends when the others have come as
        far, and with 1 when one of them has left it.
    """
    for name in ("stdout", "stderr"):  # closed by the parent process: no other file may get these descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a stream whose file became a pipe has no position
                stream.reconfigure(errors="backslashreplace")
    if "jax" not in sys.modules:
        keep_programs()
        calm_compiler()
    show = warnings.showwarning
    warnings.showwarning = _one_line_warning
    failure: BaseException | None = None
    try:
        try:
            with printed():
                status = command(sys.argv[1:] if arguments is None else arguments) or 0
        except SystemExit:  # argparse's, after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a full disk is noticed here, not where Python ends
    except BaseException as error:
        explained, failure = _explain(error), error
        if explained is None:
            raise
        status = explained
        _let_go_of_output()
    finally:
        warnings.showwarning = show
    if "afa_jax.mesh.processes" in sys.modules:  # else the command has no other processes, and perhaps no jax
        from afa_jax.mesh.processes import finish

        status = finish(status, failure)
    return _without_compiling(status) if isinstance(failure, Stopped | KeyboardInterrupt) else status


def _explain(error: BaseException) -> int | None:
    """Print an error in one line and return the exit status; return None if it is to be raised again."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left on the disk; make room there"
        elif error.errno == errno.EFBIG:
            reason = "no file may be that large there; raise the limit (ulimit -f), or choose another place"
        elif error.errno == errno.EPIPE and error.filename is None:
            reason = "whoever read it has gone; send it to a file"
        elif error.filename is not None and error.errno in _PLACES:
            reason = f"{error.strerror}; choose another place, or mend that"
        else:
            return _unexpected(error)
        print(f"error: {printable(error.filename or _nameless(error))}: {reason}", file=sys.stderr)
        return 2
    if _of_memory(error):
        reason = (str(error).strip().splitlines() or ["nothing is said of how much"])[0]
        print(
            f"error: the memory is too short ({printable(reason, 200)}); choose a smaller size of pictures (--size, "
            "data.size) or batch (--config.sample.batch, --config.train.batch); afa_jax.aot says what a config needs",
            file=sys.stderr,
        )
        return 2
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return None if isinstance(error, SystemExit) else _unexpected(error)


def _of_memory(error: BaseException) -> bool:
    """Return whether memory of the host or an accelerator ran out; by names, as JAX and torch may not be imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    raised = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return raised and any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"))


def _nameless(error: OSError) -> str:
    """Return the target of a write whose error has no file name, such as standard output."""
    return "standard output" if error.errno == errno.EPIPE else "standard output or a temporary file"


def _let_go_of_output() -> None:
    """Keep Python from failing again at its end, when it flushes standard output."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: BaseException) -> int | None:
    """Print an unexpected error and return 1 in one of several processes; return None in a single one.

    If the error were raised, the process would wait for the others at its exit.
    """
    from afa_jax.mesh.processes import is_multiprocess, is_process_lost

    if not is_multiprocess():
        return None
    if is_process_lost(error):
        reason = str(error).strip().splitlines()[0]
        print(
            f"error: another process has ended, or cannot be reached ({reason}); see what it said, mend that, and "
            "start all of them again with --resume",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    return 1


def _without_compiling(status: int) -> int:
    """Return the exit status of a stopped run, or exit at once while a thread compiles, which cannot be stopped."""
    if any(thread.name == COMPILING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # everything is saved already
    return status


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {printable(message)}", file=file or sys.stderr)


class _Description(argparse.HelpFormatter):
    """A formatter that fills the paragraphs of a module's docstring and keeps the lines of its indented examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.replace("``", "").strip().split("\n\n")
        return "\n\n".join(
            block if block.startswith(" ") else super(_Description, self)._fill_text(block, width, indent)
            for block in blocks
        )


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are an InputError, one line like every other.

    An empty name of a file or folder is refused, as from an unset variable of a shell (``--workdir "$RUN"``).
    """

    def __init__(self, **options: Any):
        super().__init__(**dict(formatter_class=_Description) | options)
        self.register("type", Path, place)
        self.register("type", None, argument)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse's own ignores errors of writing

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str], of: str = "an ensemble"
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse a command's arguments and load the config that ``--config`` names.

    Adds ``--config FILE[:variant]`` to the parser; every other ``--config.field=value`` overrides one field. Adds
    ``--expert`` too, for experts instead of the config's (afa_jax/experts/sources.py). What of the arguments is the
    config's is in the namespace as ``config_arguments``, to say later how something was made.

    Args:
        of: the kind of config that the command works on, of ``schema.SCHEMAS``.

    Raises:
        InputError: no such file, no such field, a value of another type, or a config of another kind.
    """
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="configs/*.py, with its variant")
    parser.add_argument(
        "--expert",
        action="append",
        metavar="NAME=PATH[,lora=PATH:WEIGHT][,FIELD=VALUE]",
        help="an expert, instead of the config's; repeat it for more. Fields: dtype, revision, variant, ...",
    )
    parser.epilog = "Any field of the config can be set with --config.FIELD=VALUE, nested fields with dots."
    known, rest = parser.parse_known_args(list(arguments))
    if unknown := [other for other in rest if not other.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    config = load_config(known.config, [override.removeprefix("--config.") for override in rest])
    check_kind(config, f"--config {known.config}", of)
    if known.expert:
        if of != "an ensemble":
            parser.error("--expert: this command trains one model, it has no experts")
        with config.unlocked():
            config.experts = [parse_argument(expert) for expert in known.expert]
        check(config)
    experts = [part for expert in known.expert or () for part in ("--expert", expert)]
    known.config_arguments = ["--config", known.config, *experts, *rest]
    return known, config


__all__ = ["Parser", "load_config", "parse", "run"]
