"""What the commands share: configs, overrides, and one clear line for an error."""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import importlib.util
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ml_collections import ConfigDict

from afa_jax.errors import COMPILING, InputError, Stopped

_PLACES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""Errors of the place that a file was to be written to or read from."""


def run(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command as ``python -m`` does.

    Returns:
        The exit status: what the command returns, 0 for None; 0 too for a run that saved and stopped at SIGTERM; 2
        after one line on stderr for an InputError (something to mend: an argument, a file, a full disk, a loss that is
        not finite); 130 for SIGINT. Of several processes each ends when the others have come as far, and with 1 when
        one of them has left it.
    """
    show = warnings.showwarning
    warnings.showwarning = _one_line_warning
    failure: BaseException | None = None
    try:
        status = command(sys.argv[1:] if arguments is None else arguments) or 0
    except BaseException as error:
        explained, failure = _explain(error), error
        if explained is None:
            raise
        status = explained
    finally:
        warnings.showwarning = show
    if "afa_jax.distributed" in sys.modules:  # else the command knows nothing of other processes, nor of jax perhaps
        from afa_jax.distributed import finish

        status = finish(status, failure)
    return _without_compiling(status) if isinstance(failure, Stopped | KeyboardInterrupt) else status


def _explain(error: BaseException) -> int | None:
    """The exit status for what ended a command, which it says in a line; None for an error of our own."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space left on the disk; make room there"
        elif error.filename is not None and error.errno in _PLACES:
            reason = f"{error.strerror}; choose another place, or mend that"
        else:
            return _unexpected(error)
        print(f"error: {error.filename or 'a file'}: {reason}", file=sys.stderr)
        return 2
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return None if isinstance(error, SystemExit) else _unexpected(error)


def _unexpected(error: BaseException) -> int | None:
    """One of several processes must not be raised out of: it would wait for the others at its exit."""
    from afa_jax.distributed import lost, several

    if not several():
        return None
    if lost(error):
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
    """The exit status of a run that was stopped; what it is compiling cannot be, and is not waited for."""
    if any(thread.name == COMPILING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # all that is to be saved is
    return status


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=file or sys.stderr)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are an InputError, one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse a command's arguments and load the config that ``--config`` names.

    Adds ``--config FILE[:variant]`` to the parser; every other ``--config.field=value`` overrides one field. Adds
    ``--expert`` too, for experts instead of the config's (afa_jax/ingredients.py). What of the arguments is the
    config's is in the namespace as ``config_arguments``, to say later how something was made.

    Raises:
        InputError: no such file, no such field, or a value of another type.
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
    if unknown := [argument for argument in rest if not argument.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    config = load_config(known.config, [argument.removeprefix("--config.") for argument in rest])
    if known.expert:
        from afa_jax.ingredients import parse_argument

        if "experts" not in config:
            parser.error(f"--expert: {known.config} is not of an ensemble, it has no experts")
        with config.unlocked():
            config.experts = [parse_argument(argument) for argument in known.expert]
    experts = [part for argument in known.expert or () for part in ("--expert", argument)]
    known.config_arguments = ["--config", known.config, *experts, *rest]
    return known, config


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of ``path.py`` or ``path.py:variant``, with overrides such as ``train.steps=100``.

    Raises:
        InputError: as parse.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise InputError(f"--config {spec}: no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    try:
        config = module.get_config(variant)
    except KeyError as error:
        raise InputError(f"--config {spec}: no variant {variant!r} ({error})") from error
    for override in overrides:
        _override(config, override)
    config.lock()
    return config


def _override(config: ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"--config.{override}: write --config.{name}=VALUE")
    *parents, field = name.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or field not in node:
        known = list(config.keys()) if not isinstance(node, ConfigDict) else [".".join([*parents, k]) for k in node]
        close = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"--config.{name}: no such field" + (f"; did you mean {close[0]}?" if close else ""))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    old = node[field]
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise InputError(f"--config.{name}={text}: expected {type(old).__name__}, as {old!r}")
    node[field] = value
