"""The command line's notation of a method: ``KIND[:EXPERT][,FIELD=VALUE]...``.

    ties,density=0.3                           dict(kind="ties", density=0.3)
    expert:photo                               dict(kind="expert", expert="photo")
    average,weights.a=0.3,weights.b=0.7        dict(kind="average", weights=dict(a=0.3, b=0.7))
    slerp,a=photo,b=anime,name=half            dict(kind="slerp", a="photo", b="anime", name="half")
    distilled:runs/d                           dict(kind="distilled", workdir="runs/d")

A value is a Python literal (a number, True, None, a list, a dict, a quoted string), or else text. Commas within
brackets and quotes are part of a value.
"""

from __future__ import annotations

import ast
from typing import Any

from afa_jax.errors import InputError
from afa_jax.names import DISTILLED

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def parse_method(text: str) -> dict[str, Any]:
    """Parse a method from the command line into a config's form, ``dict(kind=..., **fields)``.

    Raises:
        InputError: the kind is missing, a part is not FIELD=VALUE, a field occurs twice, or a bracket or quote does not
            close.
    """
    first, *others = _split(text)
    kind, colon, expert = first.partition(":")
    if not kind or "=" in kind or (colon and not expert):
        raise InputError(f"--method {text}: write KIND, or KIND:EXPERT, then FIELD=VALUE after commas")
    method: dict[str, Any] = dict(kind=kind) | (
        {("workdir" if kind == DISTILLED else "expert"): expert} if colon else {}
    )
    for other in others:
        path, equals, value = other.partition("=")
        *parents, field = path.split(".")
        if not equals or not value or "" in (*parents, field):
            raise InputError(f"--method {text}: {other!r} is not FIELD=VALUE; commas separate fields")
        node: Any = method
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or field in node:
            raise InputError(f"--method {text}: {path} is there twice; give it once")
        node[field] = _value(value)
    return method


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _split(text: str) -> list[str]:
    """Split a text at the commas that are outside brackets and quotes."""
    parts, quote = [""], ""
    expected: list[str] = []  # brackets that are to close
    for character in text:
        if character == "," and not expected and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (expected or parts[-1].endswith(f"={character}")):  # not the apostrophe of a name
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
    if expected or quote:
        raise InputError(f"--method {text}: {(quote or expected[-1])!r} is missing")
    return parts
