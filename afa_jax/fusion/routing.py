"""Statistics of an ensemble's maps, and changes of its routing after training.

``Sharpened``, ``TopK`` and ``Permuted`` wrap aggregators and take their place in FusedUNets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from afa_jax.errors import InputError
from afa_jax.mesh.experts import weighted_sum
from afa_jax.types import Feature, Maps, OwnFeatures, TextStates, TimeEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerouted:
    """Aggregators, or a substitute for them, whose maps are changed before the features are fused."""

    aggregators: Any

    def site(self, stage: int) -> Changed | None:
        """Return the fuser after a stage, None where the experts are not fused."""
        fuser = self.aggregators.site(stage)
        return None if fuser is None else Changed(fuser=fuser, by=dataclasses.replace(self, aggregators=None))

    def change(self, maps: Maps) -> Maps:
        """Return the maps to fuse with."""
        raise TypeError(f"{type(self).__name__} does not say how it changes maps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharpened(Rerouted):
    """Aggregators whose maps are ``softmax(logits / temperature)``: below 1 sharper, above 1 more even.

    Computed from the maps, ``m^(1 / temperature)`` over its sum, so it works for any fuser. At 1 the maps are the same
    up to rounding.

    Raises:
        InputError: a temperature that is not positive.
    """

    temperature: float | int

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}; choose more than 0")

    def change(self, maps: Maps) -> Maps:
        """Return the maps with that temperature."""
        return jax.nn.softmax(jnp.log(maps) / self.temperature, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Rerouted):
    """Aggregators whose maps keep the k largest weights at each pixel, divided by their sum; k = 1 is a hard choice.

    Among equal weights those of the first experts stay. With k = n the maps are the same up to rounding.

    Raises:
        InputError: k below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k={self.k}; choose 1 or more")

    def change(self, maps: Maps) -> Maps:
        """Return the maps with zeros for all but k experts at each pixel."""
        rank = jnp.argsort(jnp.argsort(-maps, axis=0, stable=True), axis=0)
        # A softmax, so that with k = 1 the remaining weight is exactly one.
        return jax.nn.softmax(jnp.where(rank < self.k, jnp.log(maps), -jnp.inf), axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Permuted(Rerouted):
    """Aggregators whose maps go to other experts: expert i gets the map of expert ``order[i]``.

    This is the control that tells whether a router knows its experts. In the identity order the maps keep every bit.

    Raises:
        InputError: an order that is no permutation; when called, one of another number of experts.
    """

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise InputError(f"order={self.order} is not a permutation of 0 to {len(self.order) - 1}")

    def change(self, maps: Maps) -> Maps:
        """Return the maps in the other order."""
        if len(self.order) != len(maps):
            raise InputError(f"order={self.order} is not one of {len(maps)} experts")
        return maps[jnp.asarray(self.order)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """A fuser that fuses the features with its maps as ``by.change`` changes them."""

    fuser: Any
    by: Any

    def __call__(self, features: OwnFeatures, temb: TimeEmbedding, text: TextStates) -> tuple[Feature, Maps]:
        maps = self.by.change(self.fuser(features, temb, text)[1])
        return weighted_sum(maps, features), maps


for _wrapper, _options in ((Sharpened, ["temperature"]), (TopK, ["k"]), (Permuted, ["order"])):
    jax.tree_util.register_dataclass(_wrapper, data_fields=["aggregators"], meta_fields=_options)
jax.tree_util.register_dataclass(Changed, data_fields=["fuser", "by"], meta_fields=[])
