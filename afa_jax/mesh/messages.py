"""Messages between processes: values and errors as JSON, which runs no code.

A value arrives with the same bits and type: None, booleans, integers, floats (also NaN and infinities), strings, bytes,
and lists, tuples and dicts of these. An error arrives as its class, one of a fixed set, and its arguments.
"""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

from afa_jax.errors import InputError, Stopped


def dumps(value: Any) -> bytes:
    """Return a value, or an error, as bytes that ``loads`` reads.

    Raises:
        TypeError: the value is, or holds, one of another type; the error names the type.
    """
    try:
        return json.dumps(_encoded(value)).encode()
    except RecursionError:
        raise TypeError("nested too deep to be told to another process") from None


def loads(data: bytes) -> Any:
    """Return the value that ``dumps`` encoded.

    Raises:
        ValueError: the bytes are not a message of ``dumps``.
    """
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError("a message of another process that is none") from error
    return _decoded(found)


def _encoded(value: Any) -> Any:
    """Return a value as JSON; a list, or a type that JSON lacks, becomes a list of the type's name and its parts."""
    if isinstance(value, BaseException):
        return _told(value)
    kind = type(value)  # the exact type: a subclass would arrive as another type
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in (list, tuple):
        return [kind.__name__, *map(_encoded, value)]
    if kind is dict:
        return ["dict", *([_encoded(key), _encoded(item)] for key, item in value.items())]
    raise TypeError(f"{kind.__qualname__} cannot be told to another process")


def _decoded(data: Any) -> Any:
    match data:
        case None | bool() | int() | float() | str():
            return data
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["list", *items]:
            return [_decoded(item) for item in items]
        case ["tuple", *items]:
            return tuple(_decoded(item) for item in items)
        case ["dict", *items]:
            return {_decoded(key): _decoded(item) for key, item in items}
        case ["KeyboardInterrupt"]:
            return KeyboardInterrupt()
        case ["Stopped", int(by), step]:
            return Stopped(signal.Signals(by), step)
        case ["OSError", *arguments]:
            return OSError(*arguments)  # with an errno it makes a FileNotFoundError or the like
        case ["InputError", [*names], [*arguments], str(text)]:
            return _input_error(names, arguments, text)
        case ["RuntimeError", str(text)]:
            return RuntimeError(text)
    raise ValueError("a message of another process that is none")


def _told(error: BaseException) -> list[Any]:
    """Return an error as JSON; an error of any other type becomes a RuntimeError that names it."""
    if isinstance(error, InputError):
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, InputError)]
        plain = all(argument is None or isinstance(argument, str | int | float) for argument in error.args)
        return ["InputError", names, list(error.args) if plain else [], str(error)]
    if isinstance(error, Stopped):
        return ["Stopped", int(error.by), error.step]
    if isinstance(error, OSError):
        if error.errno is None:
            return ["OSError", str(error)]
        return ["OSError", error.errno, error.strerror, None if error.filename is None else str(error.filename)]
    if isinstance(error, KeyboardInterrupt):
        return ["KeyboardInterrupt"]
    return ["RuntimeError", f"{type(error).__name__}: {error}"]


def _input_error(names: list[str], arguments: list[Any], text: str) -> InputError:
    """Return an error of the first of these classes that this process knows, with the same message.

    A class is unknown where its module was not imported. Arguments that JSON lacks were not sent.
    """
    known = {kind.__name__: kind for kind in _kinds(InputError)}
    kind = next((known[name] for name in names if name in known), InputError)
    for given in (arguments, [text]):
        with contextlib.suppress(TypeError):  # the class takes other arguments than it keeps
            error = kind(*given)
            if str(error) == text:
                return error
    return InputError(text)


def _kinds(kind: type[InputError]) -> list[type[InputError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _kinds(below))]
