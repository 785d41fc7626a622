"""Checks of merge options: numbers, and numbers by experts' names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError


def number(what: str, value: Any) -> float:
    """Return a finite number as a float; raise InputError for anything else."""
    finite = float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            finite = float(value)
    if not math.isfinite(finite):
        raise InputError(f"{what}={value!r}; make it a finite number")
    return finite


def whole(what: str, value: Any) -> int:
    """Return a whole number, also if written as 1e4; raise InputError for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{what}={value!r}; make it a whole number")
    return value


def share(what: str, value: Any) -> float:
    """Return a number above 0, up to 1; raise InputError for anything else."""
    if not 0 < number(what, value) <= 1:
        raise InputError(f"{what}={value:g}; choose a share above 0, up to 1")
    return float(value)


def fractions(weights: Any, experts: Sequence[str], what: str) -> list[float]:
    """Return the experts' weights in the experts' order, 0 for one that ``weights`` does not name.

    Raises:
        InputError: ``weights`` is no mapping of experts' names to finite numbers, or they do not sum to 1.
    """
    own = numbers(weights, experts, what)
    total = math.fsum(own.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"{what}: the weights sum to {total:g}; make it 1")
    return [own.get(name, 0.0) for name in experts]


def numbers(values: Any, experts: Sequence[str], what: str) -> dict[str, float]:
    """Return finite numbers by the names of some or all experts.

    Raises:
        InputError: ``values`` is no mapping of experts' names to finite numbers.
    """
    if not isinstance(values, Mapping | ConfigDict):
        raise InputError(f"{what}: {values!r} names no experts; write dict({experts[0]}=...)")
    found = {}
    for name, value in values.items():
        if name not in experts:
            raise InputError(f"{what}: no expert {name!r}; there are {', '.join(experts)}")
        found[name] = number(f"{what}: {name}", value)
    return found
