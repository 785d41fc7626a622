"""Records of how a file was made: plain JSON data, without paths of the machine that made it.

Configs, recipes of pictures, ``ensemble.json``, reports and the metadata of merges are published. One rule holds for
all paths in them. An absolute path, or one that leads out of the working directory (``..``, ``~``), is reduced to its
last name. A relative path, a hub id and a URL stay as they are. Hashes beside the names identify the files. Nothing is
loaded by a record: experts are found by the paths of the config at hand. Files that serve only to resume a run
(``checkpoints/``, written by orbax, and logs of optuna) are not published.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from afa_jax.errors import InputError

TEXTS = frozenset(("prompt", "prompts", "negative_prompt", "name", "what"))
"""Fields that hold text and never a path."""
_DEEPEST = 32  # containers within containers
_LONGEST = 64  # bits of a whole number


def recorded(value: Any, where: str = "config") -> Any:
    """Return a config, or a part of one, as a record keeps it: ``plain`` data with ``public`` paths.

    Raises:
        InputError: as plain.
    """
    return public(plain(value, where))


def record_text(record: Any, where: str = "config") -> str:
    """Return the JSON text of ``recorded(record)``; raise as recorded."""
    return json.dumps(recorded(record, where), indent=2, allow_nan=False) + "\n"


def plain(value: Any, where: str = "config", depth: int = 0) -> Any:
    """Return the JSON data of a value: ConfigDicts as dicts, tuples as lists, numpy's scalars and dtypes as Python's.

    Args:
        where: the value's name in a message; fields and positions are appended.

    Raises:
        InputError: something in it is no data, such as a function, a number that is not finite or data without end.
    """
    if depth > _DEEPEST:
        raise InputError(f"{where[:100]}: more than {_DEEPEST} containers within each other; write plain data")
    if isinstance(value, ConfigDict | Mapping):
        return {key: plain(_field(value, key, where), f"{where}.{key}", depth + 1) for key in _keys(value, where)}
    if isinstance(value, str | None):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if callable(value) and isinstance(getattr(value, "dtype", None), np.dtype):
        return value.dtype.name  # jnp.bfloat16 and the like
    if hasattr(value, "tolist"):
        value = value.tolist()  # arrays and numpy's scalars
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > _LONGEST:
            raise InputError(f"{where}: a number of {value.bit_length()} bits; choose a smaller one")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{where}={value}: choose a finite number")
        return value
    if isinstance(value, Set):
        value = sorted(value, key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{where}[{number}]", depth + 1) for number, item in enumerate(value)]
    raise InputError(
        f"{where} is a {type(value).__name__}, which no record can keep; write numbers, texts, lists or dicts"
    )


def _keys(value: Any, where: str) -> list[str]:
    try:
        keys = list(value)
    except TypeError:  # a ConfigDict sorts them
        keys = [None]
    for key in keys:
        if not isinstance(key, str):
            raise InputError(f"{where} has the key {str(key)[:100]}, which is no text; write it in quotes")
    return keys


def _field(value: Any, key: Any, where: str) -> Any:
    try:
        return value[key]
    except RequiredValueError:
        raise InputError(f"{where}.{key} needs a value; give it in the config or by --{where}.{key}=VALUE") from None


def public(value: Any, field: str = "") -> Any:
    """Return data with the machine's paths cut down to names; containers keep their types.

    Args:
        field: the value's name; values of TEXTS are never paths.
    """
    if isinstance(value, str):
        return value if field in TEXTS else public_path(value)
    if isinstance(value, Mapping):
        return {key: public(own, str(key)) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(public(item, field) for item in value)
    return value


def public_path(path: str | Path) -> str:
    """Return a path as records name it: its last name if it reveals a place on this machine.

    Of a text ``NAME:PATH`` or ``KIND,FIELD=PATH,...``, as methods and experts are written, this is done to each path.
    """
    text = str(path)
    local = text.removeprefix("file://")
    windows = PureWindowsPath(local)
    if windows.drive and windows.root and "://" not in local:
        return windows.name
    if not local.startswith(("/", "~", "..")) and _NAMED.search(text):
        return _NAMED.sub(lambda part: part[1] + public_path(part[2]), text)
    parts = PurePosixPath(local).parts
    leaves = local.startswith(("/", "~")) or ".." in parts
    if local == text and (not leaves or "://" in local):
        return text
    return next((part for part in reversed(parts) if part not in ("/", "..", "~")), ".")


_NAMED = re.compile(r"(?:^|(?<=,))([^/\\,=:]+[=:])(?!//)([^,]+)")
"""A part of a specification that gives a name a value; no URL, whose scheme is followed by two slashes."""


def public_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments as records name them.

    Args:
        arguments: ``--config FILE[:VARIANT]``, ``--expert NAME=PATH,...`` and ``--config.FIELD=VALUE``, as
            ``commands.parse`` lists them.
    """
    result = []
    for argument in arguments:
        if argument.startswith("--config."):
            name, equals, value = argument.partition("=")
            result.append(f"{name}{equals}{_public_value(value, name.rpartition('.')[2])}")
        else:
            result.append(public_path(argument))
    return result


def _public_value(text: str, field: str) -> str:
    """Return an override's value, which may be a Python literal, without the machine's paths."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return str(public(text, field))
    cleaned = public(value, field)
    return text if cleaned == value else repr(cleaned)


_PATH = re.compile(r"(?<![\w./~-])~?/[^\s'\",;:()<>|]+")


def public_sentence(sentence: str) -> str:
    """Return a message, which may quote paths, with those of this machine cut down to names."""
    for prefix in (os.getcwd(), os.path.expanduser("~")):
        if len(prefix) > 1:
            sentence = sentence.replace(prefix + "/", "")

    def name(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith("//") else public_path(match[0])

    return _PATH.sub(name, sentence)
