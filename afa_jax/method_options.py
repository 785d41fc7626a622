"""What an entry of a method may say, known without JAX: its kind, the kind's options, and how it is sampled.

The kinds themselves are functions (methods/kinds.py, weights/merge_kinds.py); a test holds these names to theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.names import MERGES, METHODS, SAMPLING
from afa_jax.weights.merge_options import number

EVERYWHERE = ("name", "family", "what", *SAMPLING)
"""Options of every kind."""
FAMILIES = ("control", "parameter space", "output space", "feature space", "time axis", "AFA", "ablation")
LEAST = dict(eta=0, steps=1, guidance=1)
REQUIRED = dict(expert="expert", inside="expert", checkpoint="path", autombw="path", magicfusion="general")
"""Of the kinds that have one, the option that must be there."""
OPTIONS: Mapping[str, tuple[str, ...] | None] = dict(
    expert=("expert",),
    inside=("expert",),
    uniform=(),
    base=(),
    checkpoint=None,  # those of an expert of a config
    average=("weights",),
    add_difference=("a", "b", "c", "alpha"),
    mbw=("weights", "preset", "of"),
    task_arithmetic=("scale", "scales"),
    ties=("density", "scale"),
    dare=("p", "seed", "then", "scale", "density"),
    slerp=("a", "b", "t"),
    model_stock=(),
    autombw=("path", "text_encoder"),
    learned_mbw=("workdir",),
    noise_average=("weights",),
    magicfusion=("general", "experts", "k", "fuse_above", "general_first"),
    superdiff=("temperature",),
    router=("workdir",),
    maxfusion=("threshold", "predictions"),
    time=("scheme", "experts", "edges", "order", "intervals", "at"),
    gate=("workdir",),
    afa=("workdir", "temperature", "top", "order"),
)
"""Each kind's own options; a merge has ``text_encoder`` too."""


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
    for field in SAMPLING:
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


def check_options(kind: str, options: set[str]) -> None:
    """Raise InputError for an option that a kind does not have."""
    known = OPTIONS[kind]
    if known is None:
        return
    if kind in MERGES:
        said, known = f"{kind}: no option {{!r:.80}}; there are {{}}", (*known, "text_encoder")
    else:
        said = f"method {kind}: no option {{!r:.80}}; it has {{}}"
    if unknown := sorted(map(str, options - set(known))):
        raise InputError(said.format(unknown[0], ", ".join(known) or "none"))
