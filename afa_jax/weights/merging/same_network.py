"""One network of several checkpoints, the input of every merge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.opened import check_network, unet_blocks
from afa_jax.weights.tensors import Tensor, Tensors, WeightsError, cast, check_finite, result_dtype


@dataclasses.dataclass(frozen=True)
class SameNetwork:
    """One network of several checkpoints of one architecture, a tensor at a time in float32.

    Attributes:
        component: ``unet`` or ``text_encoder``.
        sources: the checkpoints by name.
        keys: the keys of the tensors, the same in all checkpoints.
    """

    component: str
    sources: Mapping[Any, Checkpoint]

    def __post_init__(self) -> None:
        """Raise WeightsError, without reading a tensor, as load_unet, or for another architecture than the first's."""
        for checkpoint in self.sources.values():
            check_network(checkpoint, self.component)
        shapes = [{key: tensor.shape for key, tensor in own.items()} for own in self.tensors.values()]
        first, *_ = self.whats.values()
        for own, what in zip(shapes, self.whats.values(), strict=True):
            if own != shapes[0]:
                other = " (text_encoder=base, or =NAME of an expert, takes one as it is)" * (self.component != "unet")
                raise WeightsError(f"{what} is of another architecture than {first}; merge models of one kind{other}")

    @functools.cached_property
    def tensors(self) -> dict[Any, Tensors]:
        """Return the state dicts by source."""
        return {name: checkpoint.tensors(self.component) for name, checkpoint in self.sources.items()}

    @functools.cached_property
    def whats(self) -> dict[Any, str]:
        """Return the files by source, for messages; finding one in a folder takes as long as reading a tensor."""
        return {name: checkpoint.what(self.component) for name, checkpoint in self.sources.items()}

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(next(iter(self.tensors.values())))

    @functools.cached_property
    def block_of(self) -> dict[str, str]:
        """Return, by a tensor's key, the name of its stage, ``time_embedding`` or ``text_encoder``."""
        if self.component != "unet":
            return dict.fromkeys(self.keys, self.component)
        return unet_blocks(next(iter(self.sources.values())))

    def read(self, source: Any, key: str) -> np.ndarray:
        """Read a tensor of a source in float32; raise WeightsError if it is not finite."""
        array = np.asarray(self.tensors[source][key], np.float32)
        check_finite(array, key, self.whats[source])
        return array

    def weighted_sum(self, weights: Mapping[Any, float], key: str) -> np.ndarray:
        """Sum the sources' tensors by weight; one of weight 0 is not read, and a single weight of 1 keeps all bits."""
        total: np.ndarray | None = None
        for source, weight in weights.items():
            if weight:
                term = np.float32(weight) * self.read(source, key)
                total = term if total is None else np.add(total, term, out=total)
        return np.zeros(self.tensors[next(iter(weights))][key].shape, np.float32) if total is None else total

    def merged(self, rule: Callable[[str], np.ndarray], of: Iterable[Any] | None = None) -> Tensors:
        """Return Tensors that ``rule(key)`` computes when they are read, in the ``result_dtype`` of ``of``'s.

        Reading one raises WeightsError for values that are too large for the dtype.

        Args:
            of: sources, all by default.
        """
        sources = list(self.sources if of is None else of)

        def tensor(key: str) -> Tensor:
            dtype = result_dtype(self.tensors[source][key].dtype for source in sources)
            shape = self.tensors[sources[0]][key].shape
            return Tensor(shape, dtype, lambda: cast(rule(key), dtype, key, "the merged weights"))

        return {key: tensor(key) for key in self.keys}
