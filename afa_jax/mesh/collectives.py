"""Functions that run on every device of a mesh, and the collectives they call; without a mesh these are the identity.

The experts are split over the mesh axis ``expert``, and the rows of a batch over ``data`` and ``fsdp``. Devices along
``expert`` have the same rows and different experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afa_jax.trees import axis_size

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")
"""The mesh's axes. ``expert`` exchanges the most and is therefore last, where neighbouring devices are closest."""
ROWS = (DATA, FSDP)
"""The axes that split the rows of a batch."""

T = TypeVar("T")


def on_mesh(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any, *, gradients: bool = False
) -> Callable[..., Any]:
    """Return a function that runs on every device on its own experts and rows; without a mesh ``function`` itself.

    Args:
        gradients: ``function`` takes gradients, so JAX must track which arrays are the same on which devices.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=gradients)


def experts_everywhere(tree: Any) -> int:
    """Return N, the number of all experts, from a stack of this device's experts."""
    return axis_size(tree) * _size(EXPERT)


def sum_over_experts(partial: jax.Array) -> jax.Array:
    """Sum over the expert axis: each device gives the sum over its own experts."""
    return jax.lax.psum(partial, EXPERT) if _size(EXPERT, 0) else partial


def mean_over_experts(stacked: jax.Array) -> jax.Array:
    """Average over all N experts; each device gives the values of its own experts, ``[own, ...]``."""
    if _size(EXPERT) == 1:
        return sum_over_experts(stacked.mean(0))
    return sum_over_experts(stacked.sum(0)) / experts_everywhere(stacked)


def own_experts(stacked: jax.Array) -> jax.Array:
    """Return the rows of this device's experts, ``[own, ...]``, from ``[n, ...]``, which every device has."""
    size = _size(EXPERT)
    if size == 1:
        return stacked
    own = len(stacked) // size
    return jax.lax.dynamic_slice_in_dim(stacked, jax.lax.axis_index(EXPERT) * own, own)


def share_sum_over_experts(partial: jax.Array) -> jax.Array:
    """Sum as sum_over_experts, but give each device its share of the rows only, ``[share, ...]``; see ``divided``."""
    size = _size(EXPERT)
    if size == 1:
        return sum_over_experts(partial)
    return jax.lax.psum_scatter(_filled(partial, size), EXPERT, scatter_dimension=0, tiled=True)


def share_of_rows(rows: T) -> T:
    """Return this device's share of rows ``[b, ...]`` that all devices of the expert axis have; see ``divided``."""
    size = _size(EXPERT)
    if size == 1:
        return rows

    def own(leaf: jax.Array) -> jax.Array:
        filled = _filled(leaf, size)
        share = len(filled) // size
        return jax.lax.dynamic_slice_in_dim(filled, jax.lax.axis_index(EXPERT) * share, share)

    return jax.tree.map(own, rows)


def all_rows(share: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """Gather all ``count`` rows from the shares that the devices of the expert axis have."""
    if not _size(EXPERT, 0):
        return share
    rows = jax.lax.all_gather(share, EXPERT, axis=axis, tiled=True, to="invarying")
    return jax.lax.slice_in_dim(rows, 0, count, axis=axis)


def divided(function: Callable[..., T], *rows: jax.Array) -> T:
    """Compute ``function(*rows)``, which works row by row, with the rows divided among the devices of the expert axis.

    Each of these devices has all rows ``[b, ...]``, and without the division each would compute all of them. If their
    number does not divide evenly, the last row is repeated as padding and its extra results are dropped.
    """
    return jax.tree.map(lambda share: all_rows(share, len(rows[0])), function(*share_of_rows(rows)))


def whole(tree: T, shapes: Any) -> T:
    """Gather the leaves that are split over ``fsdp``: those whose shape differs from the one in ``shapes``."""
    if not is_split():
        return tree

    def gather(leaf: jax.Array, shape: Any) -> jax.Array:
        split = [i for i, (own, full) in enumerate(zip(leaf.shape, shape.shape, strict=True)) if own != full]
        return jax.lax.all_gather(leaf, FSDP, axis=split[0], tiled=True) if split else leaf

    return jax.tree.map(gather, tree, shapes)


def is_split() -> bool:
    """Return whether leaves of the experts may be split over ``fsdp`` here."""
    return _size(FSDP) > 1


def for_own_experts(tree: T) -> T:
    """Mark values that all devices of the expert axis share as inputs of each device's own experts.

    The values stay the same. Their gradient is summed over those devices once, here, not at each use by the experts.
    """
    if not _size(EXPERT, 0):
        return tree
    return jax.tree.map(
        lambda leaf: leaf if EXPERT in varying_axes(leaf) else jax.lax.pcast(leaf, EXPERT, to="varying"), tree
    )


def on_each_device(tree: T) -> T:
    """Mark values that are the same on every device as free to differ, so that one later sum over devices suffices."""
    axes = _axes()
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), tree) if axes else tree


def sum_over_devices(tree: T) -> T:
    """Add up the devices' parts of a sum over rows and experts, such as a gradient of ``on_each_device``'s result."""
    return jax.lax.psum(tree, _axes()) if _axes() else tree


def mean_over_devices(tree: T) -> T:
    """Average over the devices' batches values that are each a mean over one device's rows."""

    def mean(leaf: jax.Array) -> jax.Array:
        axes = tuple(sorted(varying_axes(leaf)))
        return jax.lax.pmean(leaf, axes) if axes else leaf

    return jax.tree.map(mean, tree)


def row_shares() -> int:
    """Return the number of devices over which the rows of a batch are split here."""
    return _size(DATA) * _size(FSDP)


def _axes() -> tuple[str, ...]:
    """Return the names of the mesh's axes within ``on_mesh``; none outside."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _size(axis: str, outside: int = 1) -> int:
    """Return the size of a mesh axis within ``on_mesh``; ``outside`` if there is no such axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(mesh.shape[axis]) if axis in mesh.manual_axes else outside


def _filled(rows: jax.Array, size: int) -> jax.Array:
    """Pad rows to a multiple of ``size`` by repeating the last one."""
    missing = -len(rows) % size
    return jnp.concatenate([rows, *[rows[-1:]] * missing]) if missing else rows


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the mesh's axes along which devices may have different values of an array; none outside a mesh."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # jax before 0.11
