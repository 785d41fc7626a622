"""Merging: several experts' U-Nets and text encoders become one, by arithmetic on their weights.

afa_jax/weights/merging/rules.py has the arithmetic. It is done in float32 when a tensor is read, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.merging.rules import BASE, MERGE_RULES, OVER_BASE, Part
from afa_jax.weights.merging.same_network import SameNetwork
from afa_jax.weights.opened import unet_blocks

_VERSION = 1  # of the kinds' arithmetic; part of every merge's hash, so raise it when the arithmetic changes


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint(MemoryCheckpoint):
    """A merge in memory; its hashes are made of its sources' hashes and its recipe, without computing the merge.

    Attributes:
        sources: for each network, the checkpoints it is made of by name, in order.
        recipes: for each merged network, kind and options as JSON; a network taken unchanged has none.
    """

    sources: Mapping[str, Mapping[Any, Checkpoint]] = dataclasses.field(default_factory=dict)
    recipes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def sha256(self, component: str) -> str:
        hashes = [(name, checkpoint.sha256(component)) for name, checkpoint in self.sources[component].items()]
        if component not in self.recipes:
            return hashes[0][1]
        return hashlib.sha256(json.dumps([_VERSION, component, self.recipes[component], hashes]).encode()).hexdigest()


def needs_base(kind: str, options: Mapping[str, Any]) -> bool:
    """Say whether a merge reads the base model's U-Net or text encoder."""
    named = [options.get("a"), options.get("b"), options.get("text_encoder")]
    if kind == "add_difference":
        named.append(options.get("c", BASE))
    return BASE in named or kind in OVER_BASE


def merge(
    kind: str, checkpoints: Mapping[str, Checkpoint], base: Checkpoint | None, options: Mapping[str, Any]
) -> MergedCheckpoint:
    """Merge several experts into one U-Net and text encoder, whose Tensors are merged when they are read.

    They have the experts' dtype if it is the same in all, float16 in place of 8 bits, else float32. Integer tensors
    (``position_ids``) are no weights, and no Checkpoint has them among its tensors. The VAE is not merged: the model
    is to be used with the base's.

    Args:
        kind: one of MERGE_RULES.
        checkpoints: the experts by name, in order; of one architecture.
        base: theta_0, for kinds and options for which ``needs_base`` is true.
        options: the keyword arguments of the kind's function in MERGE_RULES, and ``text_encoder``: ``merge`` it as the
            U-Net (the default), or take it from ``base`` or from the expert of this name.

    Raises:
        InputError: no such kind, option or expert, or an expert called ``base``; a value that makes no sense; the base
            model is needed and lacks its U-Net or text encoder; networks of several architectures.
        WeightsError: a network cannot be read. Reading a tensor raises it for values not finite or beyond the dtype.
    """
    own = {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in options.items()}
    text_encoder = own.pop("text_encoder", "merge")
    check_options(kind, own)
    if BASE in checkpoints:
        raise InputError(f"{kind}: an expert is called {BASE!r}, which is the base model's name in a merge; rename it")
    if text_encoder not in ("merge", BASE, *checkpoints):
        raise InputError(f"{kind}: text_encoder={text_encoder!r}; choose merge, base, {', '.join(checkpoints)}")
    everything: dict[Any, Checkpoint] = dict(checkpoints)
    if needs_base(kind, own):
        everything[None] = _needed(base, "unet", kind)
    sources: dict[str, Mapping[Any, Checkpoint]] = dict(unet=everything, text_encoder=everything)
    if text_encoder == BASE:
        sources["text_encoder"] = {BASE: _needed(base, "text_encoder", kind)}
    elif text_encoder != "merge":
        sources["text_encoder"] = {text_encoder: checkpoints[text_encoder]}
    elif None in everything:
        _needed(base, "text_encoder", kind)
    merged = EXPERT_COMPONENTS if text_encoder == "merge" else ("unet",)
    first = next(iter(checkpoints.values()))
    stages = tuple(dict.fromkeys(stage for stage in unet_blocks(first).values() if stage != "time_embedding"))
    states = {}
    for component, named in sources.items():
        network = SameNetwork(component, named)
        tensors = next(iter(network.tensors.values()))
        if component in merged:
            tensors = network.merged(MERGE_RULES[kind](Part(network, stages), **own), checkpoints)
        states[component] = (next(iter(named.values())).config(component), tensors)
    recipe = json.dumps(dict(kind=kind, options=own), sort_keys=True, default=str)
    return MergedCheckpoint(
        states,
        path=Path(f"{kind} of {', '.join(checkpoints)}"),
        sources=sources,
        recipes=dict.fromkeys(merged, recipe),
    )


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise InputError for a merge that there is not, or an option that it does not have."""
    if kind not in MERGE_RULES:
        raise InputError(f"no merge {kind!r}; there are {', '.join(MERGE_RULES)}")
    parameters = inspect.signature(MERGE_RULES[kind]).parameters.values()
    known = [*(own.name for own in parameters if own.kind == own.KEYWORD_ONLY), "text_encoder"]
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"{kind}: no option {unknown[0]!r}; there are {', '.join(known)}")


def _needed(base: Checkpoint | None, component: str, kind: str) -> Checkpoint:
    if base is None or component not in base.components:
        what = dict(unet="U-Net", text_encoder="text encoder")[component]
        which = "no base model is given" if base is None else f"{base.path} has none"
        raise InputError(f"{kind} takes the base model's {what}, and {which}; name a base model that has one")
    return base
