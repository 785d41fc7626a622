"""The mesh: one function on every device, and what a device asks of the others; outside a mesh all is the identity.

The experts are split over the mesh axis ``expert`` and the rows of a batch over ``data`` and ``fsdp``: devices along
``expert`` have the same rows and other experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afa_jax.trees import axis_size

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")
"""The mesh's axes; devices that are neighbours along the last one are near one another, for it exchanges the most."""
ROWS = (DATA, FSDP)
"""The axes over which the rows of a batch are split."""

T = TypeVar("T")


def on_mesh(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any, *, gradients: bool = False
) -> Callable[..., Any]:
    """A function that runs on every device, on its experts and rows; without a mesh the function itself.

    Args:
        gradients: it differentiates what it computes, so that JAX has to know what is the same on which devices.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=gradients)


def experts_everywhere(tree: Any) -> int:
    """N, of a stack of this device's experts."""
    return axis_size(tree) * _size(EXPERT)


def sum_over_experts(partial: jax.Array) -> jax.Array:
    """The sum over the devices that hold experts of what each of them has added up over its own."""
    return jax.lax.psum(partial, EXPERT) if _size(EXPERT, 0) else partial


def mean_over_experts(stacked: jax.Array) -> jax.Array:
    """The mean over all N experts of what this device has of its own, ``[own, ...]``."""
    if _size(EXPERT) == 1:
        return sum_over_experts(stacked.mean(0))
    return sum_over_experts(stacked.sum(0)) / experts_everywhere(stacked)


def own_experts(stacked: jax.Array) -> jax.Array:
    """Of ``[n, ...]``, which every device has, the rows of this device's experts, ``[own, ...]``."""
    size = _size(EXPERT)
    if size == 1:
        return stacked
    own = len(stacked) // size
    return jax.lax.dynamic_slice_in_dim(stacked, jax.lax.axis_index(EXPERT) * own, own)


def share_sum_over_experts(partial: jax.Array) -> jax.Array:
    """As sum_over_experts, but each device gets its share of the rows only, ``[share, ...]``; see ``divided``."""
    size = _size(EXPERT)
    if size == 1:
        return sum_over_experts(partial)
    return jax.lax.psum_scatter(_filled(partial, size), EXPERT, scatter_dimension=0, tiled=True)


def share_of_rows(rows: T) -> T:
    """A device's share of rows ``[b, ...]`` that all those that hold experts have; see ``divided``."""
    size = _size(EXPERT)
    if size == 1:
        return rows

    def own(leaf: jax.Array) -> jax.Array:
        filled = _filled(leaf, size)
        share = len(filled) // size
        return jax.lax.dynamic_slice_in_dim(filled, jax.lax.axis_index(EXPERT) * share, share)

    return jax.tree.map(own, rows)


def all_rows(share: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """The ``count`` rows of which each device that holds experts has a share."""
    if not _size(EXPERT, 0):
        return share
    rows = jax.lax.all_gather(share, EXPERT, axis=axis, tiled=True, to="invarying")
    return jax.lax.slice_in_dim(rows, 0, count, axis=axis)


def divided(function: Callable[..., T], *rows: jax.Array) -> T:
    """``function(*rows)``, which works row by row, divided among the devices that would all do the same.

    The rows ``[b, ...]`` are those that every device with experts has; where their number does not divide, some
    devices work at rows that nobody needs rather than all of them at all rows.
    """
    return jax.tree.map(lambda share: all_rows(share, len(rows[0])), function(*share_of_rows(rows)))


def whole(tree: T, shapes: Any) -> T:
    """A tree whose leaves are split over ``fsdp``, gathered: those that have not got the shape of ``shapes``."""
    if not is_split():
        return tree

    def gather(leaf: jax.Array, shape: Any) -> jax.Array:
        split = [i for i, (own, full) in enumerate(zip(leaf.shape, shape.shape, strict=True)) if own != full]
        return jax.lax.all_gather(leaf, FSDP, axis=split[0], tiled=True) if split else leaf

    return jax.tree.map(gather, tree, shapes)


def is_split() -> bool:
    """Whether leaves of the experts may be split over ``fsdp`` here."""
    return _size(FSDP) > 1


def for_own_experts(tree: T) -> T:
    """What the devices that hold experts have in common, as each of them gives it to its own experts.

    The same values; but a gradient is summed over those devices here, once, and not wherever the experts use them.
    """
    if not _size(EXPERT, 0):
        return tree
    return jax.tree.map(
        lambda leaf: leaf if EXPERT in varying_axes(leaf) else jax.lax.pcast(leaf, EXPERT, to="varying"), tree
    )


def on_each_device(tree: T) -> T:
    """What is the same on every device, free to become different: a sum over the devices comes later, once."""
    axes = _axes()
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), tree) if axes else tree


def sum_over_devices(tree: T) -> T:
    """Each device's part of a sum over rows and experts, added up: a gradient of ``on_each_device``'s result."""
    return jax.lax.psum(tree, _axes()) if _axes() else tree


def mean_over_devices(tree: T) -> T:
    """The mean over the devices' batches of what is a mean over the rows of each."""

    def mean(leaf: jax.Array) -> jax.Array:
        axes = tuple(sorted(varying_axes(leaf)))
        return jax.lax.pmean(leaf, axes) if axes else leaf

    return jax.tree.map(mean, tree)


def row_shares() -> int:
    """Over how many devices the rows of a batch are split here."""
    return _size(DATA) * _size(FSDP)


def _axes() -> tuple[str, ...]:
    """The mesh's axes within ``on_mesh``; none outside."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _size(axis: str, outside: int = 1) -> int:
    """Of a mesh axis within ``on_mesh``."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(mesh.shape[axis]) if axis in mesh.manual_axes else outside


def _filled(rows: jax.Array, size: int) -> jax.Array:
    """Rows up to a number that divides by ``size``, the last one again and again."""
    missing = -len(rows) % size
    return jnp.concatenate([rows, *[rows[-1:]] * missing]) if missing else rows


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh's axes along which devices may have different values of an array; none outside a mesh."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # jax before 0.11
