"""Entries of methods, checked without JAX: the kind, the kind's options, and the sampling options.

The kinds are functions in methods/registry.py and weights/merging/rules.py; a test holds the names here to theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.names import BASE, DISTILLED, LEARNED, MERGES, METHODS, SAMPLING
from afa_jax.weights.merging.options import fractions, number, numbers, share, whole

Check = Callable[[str, Any, Sequence[str]], object]
"""A function of (the option's name, its value, the experts' names) that raises InputError for a wrong value."""
EVERYWHERE = ("name", "family", "what", *SAMPLING)
"""Options that every kind of method has."""
FAMILIES = ("control", "parameter space", "output space", "feature space", "time axis", "AFA", "ablation")
LEAST = dict(eta=0, steps=1, guidance=1)
REQUIRED = dict(expert="expert", inside="expert", checkpoint="path", autombw="path", magicfusion="general")
"""The required option of each kind that has one."""


def _expert(what: str, value: Any, experts: Sequence[str]) -> None:
    if value not in experts:
        raise InputError(f"{what}: no expert {value!r}; there are {', '.join(experts)}")


def _source(what: str, value: Any, experts: Sequence[str]) -> None:
    if value not in (*experts, BASE):
        raise InputError(f"{what}: no expert {value!r}; there are {', '.join(experts)}, and {BASE}")


def _number(what: str, value: Any, experts: Sequence[str]) -> None:
    number(what, value)


def _share(what: str, value: Any, experts: Sequence[str]) -> None:
    share(what, value)


def _whole(what: str, value: Any, experts: Sequence[str]) -> None:
    whole(what, value)


def _by_expert(what: str, value: Any, experts: Sequence[str]) -> None:
    numbers(value, experts, what)


def _fractions(what: str, value: Any, experts: Sequence[str]) -> None:
    fractions(value, experts, what)


def _number_or_by_expert(what: str, value: Any, experts: Sequence[str]) -> None:
    if isinstance(value, Mapping | ConfigDict):
        numbers(value, (*experts, BASE), what)
    else:
        number(what, value)


def _styles(what: str, value: Any, experts: Sequence[str]) -> None:
    """Check weights by name; which styles there are, the run says."""
    if not isinstance(value, Mapping | ConfigDict) or not value:
        raise InputError(f"{what}={value!r:.80}; write weights by name, as food=0.7,animals=0.3")
    for name, weight in value.items():
        if number(f"{what}.{name}", weight) < 0:
            raise InputError(f"{what}.{name}={weight:g}; choose 0 or more")
    if not sum(value.values()) > 0:
        raise InputError(f"{what}: the weights sum to 0; give a style more than that")


def _list(what: str, value: Any, experts: Sequence[str]) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{what}={value!r}; write a list, [...]")


def _any(what: str, value: Any, experts: Sequence[str]) -> None:
    """Accept any value; it is checked where it is used."""


def _one_of(*choices: str) -> Check:
    def check(what: str, value: Any, experts: Sequence[str]) -> None:
        if value not in choices:
            raise InputError(f"{what}={value!r}; choose {', '.join(choices)}")

    return check


def _between(low: float, high: float, say: str) -> Check:
    """Return the check of a number from low to below or at high; ``say`` is the error's advice."""

    def check(what: str, value: Any, experts: Sequence[str]) -> None:
        if not low <= number(what, value) <= high:
            raise InputError(f"{what}={value:g}; choose {say}")

    return check


def _top(what: str, value: Any, experts: Sequence[str]) -> None:
    if not 1 <= whole(what, value) <= len(experts):
        raise InputError(f"{what}={value}; choose 1 to {len(experts)}, the number of experts")


def _each_once(what: str, value: Any, experts: Sequence[str]) -> None:
    _list(what, value, experts)
    if sorted(map(str, value)) != sorted(experts):
        raise InputError(f"{what}={list(value)}; name each of {', '.join(experts)} once")


_TRAINED: dict[str, Check] = dict(workdir=_any)
_SPARSE: dict[str, Check] = dict(
    threshold=_between(0, 1 - 2**-53, "it from 0 (all experts run) to below 1"),
    top=_top,
    unconditional=_one_of("own", "conditional"),
    reuse=_whole,
    chunk=_whole,
)
OPTIONS: Mapping[str, Mapping[str, Check] | None] = {
    "expert": dict(expert=_expert),
    "inside": dict(expert=_expert),
    "uniform": {},
    "base": {},
    "checkpoint": None,  # those of an expert of a config
    "average": dict(weights=_fractions),
    "add_difference": dict(a=_source, b=_source, c=_source, alpha=_number),
    "mbw": dict(weights=_any, preset=_any, of=_expert),
    "task_arithmetic": dict(scale=_number, scales=_by_expert),
    "ties": dict(density=_share, scale=_number),
    "dare": dict(
        p=_between(0, 1 - 2**-53, "a probability from 0 to below 1"),
        seed=_whole,
        then=_one_of("task_arithmetic", "ties"),
        scale=_number,
        density=_share,
    ),
    "slerp": dict(a=_source, b=_source, t=_between(0, 1, "it from 0, all a, to 1, all b")),
    "model_stock": {},
    "autombw": dict(path=_any, text_encoder=_any),
    LEARNED: _TRAINED,
    DISTILLED: dict(workdir=_any, style=_styles),
    "noise_average": dict(weights=_fractions),
    "magicfusion": dict(
        general=_source, experts=_list, k=_number_or_by_expert, fuse_above=_whole, general_first=_any
    ),
    "superdiff": dict(temperature=_between(0, float("inf"), "0 (all alike) or more")),
    "router": _TRAINED | _SPARSE,
    "ladder": _TRAINED | _SPARSE,
    "maxfusion": dict(threshold=_number, predictions=_one_of("fuse", "average")),
    "time": dict(
        scheme=_one_of("uniform", "tree", "refiner", "edges", "alternate"),
        experts=_list,
        edges=_list,
        order=_list,
        intervals=_whole,
        at=_whole,
    ),
    "gate": _TRAINED,
    "afa": dict(workdir=_any, temperature=_number, top=_top, order=_each_once),
}  # fmt: skip
"""The check of each option of each kind; a merge also has the option ``text_encoder``."""


def check_entry(entry: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Return the entry of a method as a dictionary: its kind is known, so are its options, and none is missing.

    Raises:
        InputError: that is not so, or a number to sample with makes no sense.
    """
    options = entry.to_dict() if isinstance(entry, ConfigDict) else dict(entry)
    kind = str(options.get("kind"))
    if kind not in METHODS:
        raise InputError(f"no method {kind!r:.80}; there are {', '.join(METHODS)}")
    if "family" in options and options["family"] not in FAMILIES:
        raise InputError(f"method {kind}: family={options['family']!r:.80}; choose {', '.join(FAMILIES)}")
    if "guidance_interval" in options:
        options["guidance_interval"] = part_of_path(f"method {kind}: guidance_interval", options["guidance_interval"])
    for field in LEAST:
        if field in options:
            value = options[field] = number(f"method {kind}: {field}", options[field])
            if value < LEAST[field] or (field == "steps" and value % 1):
                raise InputError(f"method {kind}: {field}={value:g}; choose {LEAST[field]} or more")
    if "steps" in options:
        options["steps"] = int(options["steps"])
    check_options(kind, {option for option in options if option not in ("kind", *EVERYWHERE)})
    if kind in REQUIRED and REQUIRED[kind] not in options:
        raise InputError(f"method {kind}: the option {REQUIRED[kind]} is missing")
    return options


def part_of_path(what: str, value: Any) -> tuple[float, float]:
    """Return a part of the sampler's path, (from, to), 0 its noisy start and 1 its clean end.

    Raises:
        InputError: it is not two numbers in this order between 0 and 1.
    """
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise InputError(f"{what}={value!r:.40}; write [FROM, TO], a part of the path, 0 <= FROM < TO <= 1")
    return low, high


def check_options(kind: str, options: set[str]) -> None:
    """Raise InputError for an option that a kind does not have."""
    if (own := OPTIONS[kind]) is None:
        return
    known = tuple(own)
    if kind in MERGES:
        said, known = f"{kind}: no option {{!r:.80}}; there are {{}}", (*known, "text_encoder")
    else:
        said = f"method {kind}: no option {{!r:.80}}; it has {{}}"
    if unknown := sorted(map(str, options - set(known))):
        raise InputError(said.format(unknown[0], ", ".join(known) or "none"))


def check_values(entry: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Raise InputError for an option's value that is wrong for any models.

    Args:
        entry: the result of check_entry.
        experts: the names of the config's experts.
    """
    kind = entry["kind"]
    for option, check in (OPTIONS[kind] or {}).items():
        if entry.get(option) is not None:  # None counts as not given
            check(f"{kind}: {option}", entry[option], experts)
