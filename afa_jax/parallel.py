"""How the experts are run: the one place where "for each expert" happens.

A stack of N networks is one network whose leaves have a leading axis N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from afa_jax.errors import InputError

Mode = Literal["unroll", "scan", "vmap"]
MODES: tuple[Mode, ...] = ("unroll", "scan", "vmap")
DEFAULT_MODE: Mode = "scan"
"""Chosen by benchmarks/map_experts.py: vmap turns convolutions into grouped ones, which are several times slower; scan
saves compile time at the price of slicing the parameters in a loop."""

T = TypeVar("T")


def stack(trees: Sequence[T]) -> T:
    """N trees of one structure as one tree with a leading axis N on every leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: T, index: Any) -> T:
    """The tree at one index of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def axis_size(tree: Any) -> int:
    """The common length of the leading axis."""
    return int(jax.tree.leaves(tree)[0].shape[0])


def map_experts(
    function: Callable[..., Any], mapped: tuple[Any, ...], shared: tuple[Any, ...] = (), mode: Mode | None = None
) -> Any:
    """``function(*mapped[i], *shared)`` for each expert i, results stacked on a leading axis.

    The meaning of every mode is ``jax.vmap`` over the leading axis of ``mapped``; they differ in the compiled program.

    Args:
        mapped: trees whose leaves have the leading axis N.
        shared: trees that all experts get as they are.
        mode: "unroll" (N copies in the program), "scan" (one copy, run N times) or "vmap".
    """
    mode = mode or DEFAULT_MODE
    if mode == "vmap":
        return jax.vmap(lambda one: function(*one, *shared))(mapped)
    if mode == "scan":
        return jax.lax.map(lambda one: function(*one, *shared), mapped)
    return stack([function(*take(mapped, i), *shared) for i in range(axis_size(mapped))])


def data_mesh() -> Mesh:
    """All devices on one axis, ``data``."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: T, mesh: Mesh) -> T:
    """A copy on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(batch: T, mesh: Mesh) -> T:
    """A batch split over the devices by its leading axis.

    Raises:
        InputError: the devices do not divide the batch.
    """
    size, devices = len(np.asarray(jax.tree.leaves(batch)[0])), mesh.devices.size
    if size % devices:
        raise InputError(f"a batch of {size} does not divide by {devices} devices")
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
