"""Subsets of a source, and the split into training and held-out examples."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from afa_jax.data.sources import PictureSource
from afa_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """The examples of ``source`` at ``indices``, in that order, as a source."""

    source: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Return the example's name in the source."""
        return self.source.name(int(self.indices[index]))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of the source's fingerprint and of the chosen indices."""
        chosen = np.ascontiguousarray(self.indices, "<i8").tobytes()
        return hashlib.sha256(self.source.fingerprint.encode() + chosen).hexdigest()


def hold_out(source: PictureSource, count: int, seed: int) -> tuple[Subset, Subset]:
    """Return (the remaining examples, ``count`` examples drawn with the seed), each in the source's order.

    A source may have a picture several times, under one name with several captions. If one of them is held out, none
    of them remains.

    Raises:
        InputError: nothing would remain.
    """
    order = np.random.default_rng((seed, len(source))).permutation(len(source))
    held_out = np.sort(order[:count])
    names = {source.name(int(index)) for index in held_out}
    rest = np.sort(order[count:])
    rest = rest[[source.name(int(index)) not in names for index in rest]] if len(rest) else rest
    if not len(rest):
        raise InputError(f"validation.pairs={count}, but there are {len(source)} examples in all")
    return Subset(source, rest), Subset(source, held_out)
