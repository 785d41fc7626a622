"""Checks of config fields: functions that return a value as it is used, or raise with what was expected.

``section`` combines them. It refuses unknown fields with the nearest known name, and fills missing fields with their
defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError

Check = Callable[[Any], Any]
"""A function that returns the value, perhaps converted, or raises Wrong."""
REQUIRED: Any = object()
"""The default of a field that a config must have."""
ABSENT: Any = object()
"""The default of an optional field, which is left out of a config that does not set it."""


class Wrong(Exception):
    """A value that a field cannot have; the message says what was expected."""


SEEDS = 2**32
"""The number of seeds: a seed is below it."""
MOST_PIXELS = 2**26
"""The most pixels of a picture that is made or trained on; no accelerator has the memory for a network on more."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A check and a default."""

    check: Check
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields and sections by name.

    Attributes:
        optional: whether a config may lack the section; any other missing section is filled with defaults.
        open_: whether other fields are accepted unchecked, because another part of the program checks them.
    """

    fields: Mapping[str, Field | Section]
    optional: bool = False
    open_: bool = False

    def filled(self, config: ConfigDict, where: str = "") -> None:
        """Fill missing fields with their defaults.

        An optional section that is None is taken out.

        Raises:
            InputError: a section is no mapping.
        """
        for name, field in self.fields.items():
            path = f"{where}{name}"
            if isinstance(field, Section):
                if name not in config:
                    if field.optional:
                        continue
                    config[name] = ConfigDict()
                if isinstance(config[name], Mapping) and not isinstance(config[name], ConfigDict):
                    config[name] = ConfigDict(dict(config[name]))
                if config[name] is None and field.optional:
                    del config[name]  # the same as a missing section
                    continue
                if not isinstance(config[name], ConfigDict):
                    raise InputError(f"{path}={config[name]!r:.80}: expected a section, dict(...)")
                field.filled(config[name], f"{path}.")
            elif name not in config and field.default not in (REQUIRED, ABSENT):
                config[name] = field.default

    def check(self, config: ConfigDict, where: str = "") -> None:
        """Check every field and convert its value to the type in use.

        Raises:
            InputError: a field that is unknown, missing or wrong, by its name, with what to write.
        """
        for name in config:
            if name not in self.fields and not self.open_:
                raise unknown(f"{where}{name}", [f"{where}{known}" for known in self.fields])
        for name, field in self.fields.items():
            path = f"{where}{name}"
            if isinstance(field, Section):
                if name in config and config[name] is not None:
                    field.check(config[name], f"{path}.")
            elif name in config:
                value = config[name]
                try:
                    checked = field.check(value)
                except Wrong as wrong:
                    raise InputError(f"{path}={shown(value)}: expected {wrong}") from None
                if checked is not value:
                    put(config, name, checked)
            elif field.default is REQUIRED:
                raise InputError(f"{path} is missing: write {expected(field.check)}")


_DEEPEST = 32
"""The most levels of nesting in a value."""
_OF_ARRAYS = ("numpy", "jax", "ml_dtypes")


def as_data(value: Any, depth: int = 0) -> Any:
    """Return a value as the plain data that it stands for: a path's text, numpy's numbers as Python's, a dtype's name.

    What is plain already is returned as it is; a ConfigDict is changed in its place.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type) and value.__module__.partition(".")[0] in _OF_ARRAYS:
        return value.__name__  # np.float16, jnp.bfloat16
    if hasattr(value, "tolist") and not isinstance(value, ConfigDict):
        return value.tolist()
    if depth > _DEEPEST:
        return value
    if isinstance(value, ConfigDict):
        for name, own in [*value._fields.items()]:
            if (data := as_data(own, depth + 1)) is not own:
                put(value, name, data)
    elif type(value) in (list, tuple):
        items = [as_data(own, depth + 1) for own in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    elif type(value) is dict:
        data = {name: as_data(own, depth + 1) for name, own in value.items()}
        return value if all(data[name] is value[name] for name in data) else data
    return value


def put(config: ConfigDict, name: str, value: Any) -> None:
    """Replace a field by a value of any type; in the place of a float ConfigDict would make one of an integer."""
    with config.unlocked():
        del config[name]
        config[name] = value


# The names of a field in other tools, and in configs of another kind.
_ALIASES = {"base": "init", "init": "base", "learning_rate": "lr", "batch_size": "batch"}


def unknown(name: str, names: Sequence[str]) -> InputError:
    """Return the error for an unknown field, with the nearest known one.

    The only field of the same last name, in this section or else in all, comes before one of similar spelling.
    """
    section, _, last = name.rpartition(".")
    other = _ALIASES.get(last, "")
    alike = [known for known in names if known.rpartition(".")[2] in (last, other)]
    beside = [known for known in alike if known.rpartition(".")[0] == section]
    close = next((found for found in (beside, alike) if len(found) == 1), difflib.get_close_matches(name, names, n=1))
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names[:20])}"
    return InputError(f"{name}: no such field; {hint}")


def shown(value: Any) -> str:
    """Return a value as text for a message; a long one is cut."""
    try:
        text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def expected(check: Check) -> str:
    """Return a check's description of the expected value."""
    try:
        check(REQUIRED)
    except Wrong as wrong:
        return str(wrong)
    return "a value"


def integer(low: int = 0, high: int = 2**31 - 1) -> Check:
    """Return a check for whole numbers from low to high; 1e4 is one."""

    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Wrong(f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """Return a check for finite numbers, as floats, from low (or only ``above`` it) to high (or only ``below`` it)."""
    parts = [f"{'above' if above else 'from'} {low:g}"] if low > -math.inf else []
    parts += [f"{'below' if below else 'to'} {high:g}"] if high < math.inf else []
    what = " ".join(["a finite number", *parts])

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Wrong(what)
        try:
            real = float(value)
        except OverflowError:
            raise Wrong(what) from None
        fits = (low < real if above else low <= real) and (real < high if below else real <= high)
        if not (math.isfinite(real) and fits):
            raise Wrong(what)
        return value if isinstance(value, float) else real

    return check


def text(*, empty: bool = True) -> Check:
    """Return a check for a text of at most 10,000 characters, none of them NUL."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not (value or empty) or "\0" in value or len(value) > 10_000:
            raise Wrong("a text in quotes" if empty else "a text in quotes that is not empty")
        return value

    return check


def choice(*names: str, aliases: Mapping[str, str] | None = None) -> Check:
    """Return a check for one of a few names, in any case; ``aliases`` gives the names of other spellings."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value not in names:
            value = (aliases or {}).get(value.lower(), value.lower())
        if value not in names or not isinstance(value, str):
            raise Wrong(f"one of {', '.join(map(repr, names))}")
        return value

    return check


def one_name(value: Any) -> str:
    """Return a name that fits on a line, into ``--expert NAME=PATH,...`` and into ``--method expert:NAME``."""
    fits = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() and value.strip() == value
    if not fits or set(value) & set("/:,=") or value in (".", ".."):
        raise Wrong("a name on one line, such as 'photo', without / : , =")
    return str(value)


def boolean(value: Any) -> bool:
    """Check that a value is True or False; 1, 0 and texts are not."""
    if not isinstance(value, bool):
        raise Wrong("True or False")
    return value


def optional(check: Check) -> Check:
    """Return a check for None or a value that ``check`` accepts."""

    def checked(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except Wrong as wrong:
            raise Wrong(f"{wrong}, or None") from None

    return checked


def many(check: Check, low: int = 0, high: int = 100_000) -> Check:
    """Return a check for a tuple or list of values that ``check`` accepts."""

    def checked(value: Any) -> Any:
        what = f"{low} values" if low == high else f"a list of {low} or more" if low else "a list"
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            raise Wrong(f"{what}, each {expected(check)}")
        try:
            changed = [check(each) for each in value]
        except Wrong as wrong:
            raise Wrong(f"{what}, each {wrong}") from None
        return value if all(a is b for a, b in zip(changed, value, strict=True)) else type(value)(changed)

    return checked


def either(*checks: Check) -> Check:
    """Return a check for a value that any of the checks accepts; the first one that does converts it."""

    def checked(value: Any) -> Any:
        wrongs = []
        for check in checks:
            try:
                return check(value)
            except Wrong as wrong:
                wrongs.append(str(wrong))
        raise Wrong(", or ".join(wrongs))

    return checked


def mapping(value: Any) -> Any:
    """Check that a value is a dict; its fields are checked by another part of the program."""
    if not isinstance(value, Mapping | ConfigDict):
        raise Wrong("dict(...)")
    return value


def record(**fields: Field) -> Check:
    """Return a check for a dict of these fields; one that is None counts as missing."""
    required = ", ".join(f"{name}=..." for name, field in fields.items() if field.default is REQUIRED)

    def checked(found: Any) -> Any:
        if not isinstance(found, Mapping | ConfigDict):
            raise Wrong(f"dict({required})")
        for name in found:
            if name not in fields:
                close = difflib.get_close_matches(str(name), fields, n=1)
                raise Wrong(
                    f"dict({required}) without {str(name)[:80]}"
                    + (f"; did you mean {close[0]}?" if close else f"; there are {', '.join(fields)}")
                )
        changed = dict(found)
        for name, field in fields.items():
            if found.get(name) is None and field.default is REQUIRED:
                raise Wrong(f"dict({required}), {name} is missing")
            if found.get(name) is not None:
                try:
                    changed[name] = field.check(found[name])
                except Wrong as wrong:
                    raise Wrong(f"dict({required}) whose {name} is {wrong}") from None
        return found if all(changed[name] is found[name] for name in changed) else changed

    return checked


def named(key: Check, value: Check) -> Check:
    """Return a check for a dict whose names ``key`` accepts and whose values ``value`` accepts."""

    def checked(found: Any) -> Any:
        if not isinstance(found, Mapping | ConfigDict):
            raise Wrong(f"dict(name=...), each {expected(value)}")
        changed = {}
        for name, each in found.items():
            key(name)
            try:
                changed[name] = value(each)
            except Wrong as wrong:
                raise Wrong(f"dict(name=...), each {wrong}") from None
        return found if all(changed[name] is found[name] for name in changed) else changed

    return checked


def loras(value: Any) -> Any:
    """Check a list of LoRAs, ``[(path, weight), ...]``."""
    what, path, weight = "[(path, weight), ...]", text(empty=False), number()
    if not isinstance(value, list | tuple):
        raise Wrong(what)
    for each in value:
        if not isinstance(each, list | tuple) or len(each) != 2:
            raise Wrong(what)
        try:
            path(each[0]), weight(each[1])
        except Wrong as wrong:
            raise Wrong(f"{what}, with {wrong}") from None
    return value


def distinct(check: Check) -> Check:
    """Return a check for a list of dicts that ``check`` accepts and whose names differ."""

    def checked(value: Any) -> Any:
        found = check(value)
        names = [each["name"] for each in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise Wrong(f"names that differ ({twice[0]!r:.40} is there twice)")
        return found

    return checked


def size(value: Any) -> Any:
    """Check a size, (rows, columns) in pixels."""
    side = integer(1, 2**16)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Wrong("(rows, columns) in pixels, such as (512, 512)")
    try:
        rows, columns = map(side, value)
    except Wrong as wrong:
        raise Wrong(f"(rows, columns) in pixels, each {wrong}") from None
    if rows * columns > MOST_PIXELS:
        raise Wrong(f"(rows, columns) of {MOST_PIXELS:,} pixels together at most")
    return value if rows is value[0] and columns is value[1] else (rows, columns)
