"""The device mesh, and how stacks of networks and batches are split over it.

A stack of N networks is one network whose leaves have a leading axis N. On a mesh the stack is split over the axis
``expert``, and the rows of a batch over ``data`` and ``fsdp``. A training step or a sampler is one function that runs
on every device (``on_mesh``), on that device's experts and rows. It exchanges data with other devices by the
collectives of afa_jax/mesh/collectives.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.mesh.collectives import AXES, DATA, EXPERT, FSDP, ROWS
from afa_jax.trees import dotted

LARGE = 2**16
"""The least number of elements of a frozen array that is split over ``fsdp``."""

T = TypeVar("T")


def make_mesh(sizes: Mapping[str, int], *, experts: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh of the sizes that a config's ``mesh`` gives.

    Devices of several TPU slices, which only a slow network joins, are split over ``data`` first. The slices then
    exchange only the gradient of the aggregators.

    Args:
        sizes: the sizes of the axes data, fsdp and expert. A missing one is 1; one may be -1, which takes all devices
            left.
        experts: the number of experts, N, which ``expert`` must divide.
        devices: the devices of the mesh; all by default.

    Raises:
        InputError: the sizes do not fit the devices or the experts; the error names sizes that do.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices), experts)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise InputError(f"mesh.data={shape[0]}: the devices are on {slices} slices; choose a multiple of {slices}")
    within = (shape[0] // slices, *shape[1:])
    # An axis may take only a part of a side of the slice, such as 2 experts by 8 rows on 4 x 4 chips. jax.make_mesh
    # allows that on v5e only.
    if slices == 1:
        grid = create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        grid = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Make the mesh that a config asks for in ``mesh``; None for one device, or if it asks for none.

    Args:
        devices: the devices of the mesh; all by default.

    Raises:
        InputError: as make_mesh.
    """
    if "mesh" not in config:
        return None
    mesh = make_mesh(dict(config.mesh), experts=len(config.experts), devices=devices)
    return mesh if mesh.size > 1 else None


def resolve_sizes(sizes: Mapping[str, int], devices: int, experts: int | None = None) -> tuple[int, int, int]:
    """Return the sizes of the axes in the mesh's order; arguments and errors as make_mesh."""
    if unknown := [name for name in sizes if name not in AXES]:
        raise InputError(f"mesh.{unknown[0]}: no such axis; there are {', '.join(AXES)}")
    asked = [sizes.get(axis, 1) for axis in AXES]
    for axis, size in zip(AXES, asked, strict=True):
        if size != -1 and size < 1:
            raise InputError(f"mesh.{axis}={size}; choose 1 or more, or -1 for all devices that are left")
    if asked.count(-1) > 1:
        raise InputError(f"mesh: {asked.count(-1)} axes are -1; only one can take the devices that are left")
    known = math.prod(size for size in asked if size != -1)
    shape = tuple(devices // known if size == -1 else size for size in asked)
    fits = [
        (data, fsdp, expert)
        for data, fsdp, expert in itertools.product(range(1, devices + 1), repeat=3)
        if data * fsdp * expert == devices and (experts is None or experts % expert == 0)
    ]
    if shape not in fits:
        said = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, asked, strict=True))
        of = "" if experts is None else f" and {experts} experts"
        # Meshes that keep most of the sizes asked for come first, then those with little fsdp, which few users need.
        fits.sort(key=lambda fit: (-sum(a == b for a, b in zip(fit, asked, strict=True)), fit[1], fit[2]))
        listed = "; ".join(
            ", ".join(f"{axis}={size}" for axis, size in zip(AXES, fit, strict=True)) for fit in fits[:6]
        )
        raise InputError(f"mesh {said} does not fit {devices} devices{of}; these do: {listed}")
    return shape  # type: ignore[return-value]


RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(unet|experts)\.stages\..*", (EXPERT, FSDP)),
    (r"(unet|experts|text_encoder)\..*", (EXPERT,)),
    (r"(vae|aggregators|router|weights|params|opt|average|step)(\..*)?", ()),
)
"""The axes that split an array, by the first pattern that matches its dotted path. ``expert`` splits the first axis.
``fsdp`` splits the longest other axis that it divides, if the array is large."""


def spec_of(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return how an array of a run is split over a mesh, by RULES.

    Raises:
        InputError: no rule matches ``path``.
    """
    axes = next((axes for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
    if axes is None:
        raise InputError(f"no rule says how {path} is spread over devices; add one to RULES in mesh/parallel.py")
    spec: list[str | None] = [EXPERT if axes else None, *[None] * (len(shape) - 1)][: len(shape)]
    size = mesh.shape[FSDP]
    if FSDP in axes and size > 1 and math.prod(shape[1:]) >= LARGE:
        dividing = [i for i in range(1, len(shape)) if shape[i] % size == 0]
        if dividing:
            spec[max(dividing, key=lambda i: shape[i])] = FSDP
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def specs_of(tree: Any, mesh: Mesh, prefix: str = "") -> Any:
    """Return the tree with each array replaced by its spec; ``prefix`` is put before the arrays' dotted paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec_of(".".join(filter(None, (prefix, dotted(path)))), leaf.shape, mesh), tree
    )


def place(tree: T, mesh: Mesh, specs: Any) -> T:
    """Spread arrays that every process has over the mesh; ``specs`` is a tree or a prefix of one."""

    def put(spec: PartitionSpec, leaf: Any) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(spec, jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda leaf: put(spec, leaf), part),
        specs,
        tree,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Return the index of this process's share of a batch's rows, and the number of shares.

    Processes that hold different experts for the same rows have the same share.

    Raises:
        InputError: the shares of two processes overlap without being the same.
    """
    blocks = _row_blocks(mesh)
    shares = sorted(set(blocks.values()))
    if len({block for share in shares for block in share}) != sum(map(len, shares)):
        raise InputError(
            "mesh: two processes would share some rows of a batch and not others; choose sizes that divide the "
            f"{jax.local_device_count()} devices of a process, or are multiples of it"
        )
    return shares.index(blocks[jax.process_index()]), len(shares)


def place_rows(
    batch: Mapping[str, Any], mesh: Mesh, specs: Mapping[str, PartitionSpec] | None = None
) -> dict[str, Any]:
    """Spread a batch over the mesh from the rows of this process's share; the processes together give all rows.

    Args:
        specs: one for each array that is split along other axes too, not only along its rows.

    Raises:
        InputError: the rows do not divide among the devices.
    """
    own = _row_blocks(mesh)[jax.process_index()]
    shares = row_share(mesh)[1]

    def put(name: str, rows: np.ndarray) -> jax.Array:
        if len(rows) % len(own):
            devices = mesh.shape[DATA] * mesh.shape[FSDP]
            raise InputError(f"a batch of {len(rows) * shares} does not divide by {devices} devices")
        size = len(rows) // len(own)

        def block(index: Any) -> np.ndarray:
            first = own.index((index[0].start or 0) // size) * size
            return rows[(slice(first, first + size), *index[1:])]

        sharding = NamedSharding(mesh, (specs or {}).get(name, PartitionSpec(ROWS)))
        return jax.make_array_from_callback((len(rows) * shares, *rows.shape[1:]), sharding, block)

    return {name: put(name, np.asarray(rows)) for name, rows in batch.items()}


def _row_blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Return, by process index, the blocks of a batch's rows on its devices; there are data x fsdp blocks in all."""
    blocks: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        at = dict(zip(mesh.axis_names, place, strict=True))
        blocks.setdefault(device.process_index, set()).add(at[DATA] * mesh.shape[FSDP] + at[FSDP])
    return {process: tuple(sorted(own)) for process, own in blocks.items()}
