"""Functions mapped over the experts, and reductions of their results.

Without a mesh these are loops and sums over the leading axis. On a mesh each device has some of the experts, and only
these functions exchange their results (mesh/collectives.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.mesh.collectives import (
    all_rows,
    for_own_experts,
    own_experts,
    share_of_rows,
    share_sum_over_experts,
    sum_over_experts,
)
from afa_jax.target import platform
from afa_jax.trees import axis_size, stack, take

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shared:
    """A value that all experts get unchanged, such as the fused feature."""

    value: Any


jax.tree_util.register_dataclass(Shared, data_fields=["value"], meta_fields=[])


def map_experts(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` of each expert of this device, stacked on a leading axis.

    The result is that of ``jax.vmap`` over the leading axis. The program is a loop (``lax.map``), as vmap turns
    convolutions into grouped ones, which are several times slower, and N copies of a U-Net take N times as long to
    compile (benchmarks/map_experts.py).

    Args:
        function: takes one expert's arguments.
        arguments: trees whose leaves have the leading axis N; a ``Shared`` value goes to every expert unchanged.
    """
    own = tuple(None if isinstance(argument, Shared) else argument for argument in arguments)
    shared = for_own_experts(tuple(argument.value if isinstance(argument, Shared) else None for argument in arguments))

    def of_one(one: tuple[Any, ...]) -> Any:
        chosen = zip(arguments, one, shared, strict=True)
        return function(*(common if isinstance(argument, Shared) else mine for argument, mine, common in chosen))

    if axis_size(own) == 1:
        return stack([of_one(take(own, 0))])
    return jax.lax.map(lambda one: of_one(slices_first(one)), own)


def slices_first(one: T) -> T:
    """Keep XLA's CPU compiler from reading an expert's bias out of the stack in the loop that adds it.

    Such a loop is not vectorised; what that costs is in docs/speed.md. Only vectors: matrices go to library calls, and
    would be copied for the gradient.
    """
    if platform() != "cpu":
        return one
    return jax.tree.map(lambda leaf: jax.lax.optimization_barrier(leaf) if leaf.ndim == 1 else leaf, one)


def contract_experts(features: Array, kernel: Array) -> Array:
    """Return ``sum_n features[n] @ kernel[n]``, a 1x1 convolution of the experts' concatenated channels.

    Each expert's part is computed where the expert is. On a mesh a device gets its share of the rows only.

    Args:
        features: ``[n, b, h, w, c]``.
        kernel: ``[n * c, d]``.

    Returns:
        ``[b, h, w, d]``.
    """
    own = own_experts(kernel.reshape(-1, features.shape[-1], kernel.shape[-1]))
    return share_sum_over_experts(jnp.einsum("nbhwc,nco->bhwo", features, own))


def on_shares(function: Callable[..., Array], share: Array, rows: int, *others: Any, axis: int) -> Array:
    """Return ``function(share, *others)`` of all rows; the devices that hold experts divide the work.

    Args:
        function: works row by row.
        share: this device's share of the rows, as ``contract_experts`` gives it.
        rows: the number of all rows.
        others: further arguments, with all rows on every device.
        axis: the result's axis of rows.
    """
    return all_rows(function(share, *share_of_rows(others)), rows, axis=axis)


def weighted_sum(maps: Array, features: Array) -> Array:
    """Return ``sum_n maps[n] * features[n]`` over all experts, summed in float32, in the features' dtype.

    Args:
        maps: ``[n, b, h, w]``, or ``[n, b]`` where a weight is for a whole picture.
        features: ``[n, b, h, w, c]``.
    """
    # An accelerator's default would round both to bfloat16 or TF32 first; of so few terms, exact sums cost nothing.
    precision, pixels = jax.lax.Precision.HIGHEST, "hw"[: maps.ndim - 2]
    own = jnp.einsum(f"nb{pixels},nbhwc->bhwc", own_experts(maps), features.astype(jnp.float32), precision=precision)
    return sum_over_experts(own).astype(features.dtype)
