"""The methods that a config lists, by name, and the controls that every comparison has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.methods.method import check_entry, method_name

Entry = Mapping[str, Any]


def entries_of(config: ConfigDict) -> dict[str, Entry]:
    """Return the methods of ``evaluation.methods`` by name, and the controls that are missing there.

    Unless ``evaluation.controls=False``, every comparison includes each expert alone and inside the ensemble, the
    uniform average, and the trained maps with the experts permuted.

    Raises:
        InputError: two methods share a name, a kind or option is unknown, or equal_time or curves name no such method.
    """
    entries: dict[str, Entry] = {}
    for entry in config.evaluation.methods:
        options = entry.to_dict() if isinstance(entry, ConfigDict) else dict(entry)
        check_entry(options)
        name = options.setdefault("name", method_name(options))
        if name in entries:
            raise InputError(f"evaluation.methods: two are called {name!r}; give one a name of its own")
        entries[name] = options
    own = config.evaluation
    if own.get("controls", True):
        missing = missing_controls([*entries.values()], [expert["name"] for expert in config.get("experts", ())])
        entries = {control["name"]: control for control in missing} | entries
    for field, names in (
        ("equal_time", [name for name in own.get("equal_time", ()) if name != "all"]),
        ("curves.methods", curves_of(own).get("methods", ())),
    ):
        for name in names:
            if name not in entries:
                raise InputError(f"evaluation.{field}: no method {name!r}; there are {', '.join(entries)}")
    return entries


def missing_controls(entries: Sequence[Entry], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the controls missing from a list of methods; a method with its own number of steps is no control."""
    plain = [entry for entry in entries if "steps" not in entry]

    def there(**options: Any) -> bool:
        return any(all(entry.get(key) == value for key, value in options.items()) for entry in plain)

    wanted: list[dict[str, Any]] = [dict(kind=kind, expert=name) for kind in ("expert", "inside") for name in names]
    missing = [entry for entry in [*wanted, dict(kind="uniform")] if not there(**entry)]
    trained = next((entry for entry in plain if entry["kind"] == "afa" and "family" not in entry), None)
    if trained is not None and len(names) > 1 and not any(map(is_permuted, plain)):
        order = (*names[1:], names[0])
        missing.append(dict(trained) | dict(name=f"{trained['name']}, experts permuted", order=order, family="control"))
    return [dict(name=method_name(entry)) | entry for entry in missing]


def is_permuted(entry: Entry) -> bool:
    """Return whether a method is the control that is AFA with the experts permuted."""
    return entry["kind"] == "afa" and "order" in entry


def curves_of(config: ConfigDict) -> Any:
    """Return the section of an evaluation's curves; empty if there is none."""
    return config.get("curves") or {}
