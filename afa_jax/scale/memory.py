"""The memory of a compiled program on a device, and the setting to change if it is too much."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from afa_jax.scale.chips import GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, as the compiler states them.

    Attributes:
        arguments: parameters, optimizer state, frozen weights, a batch.
        temporaries: the peak of intermediate values; on a TPU without those in its on-chip memory.
        outputs: the results, including those that reuse an argument's memory.
        aliased: results that reuse an argument's memory.
        code: the program itself.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """Return the number of bytes that are needed at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code

    def __str__(self) -> str:
        return (
            f"arguments {gib(self.arguments)}, temporaries {gib(self.temporaries)}, outputs {gib(self.outputs)} "
            f"({gib(self.aliased)} in the place of arguments), program {gib(self.code)}"
        )


def gib(size: float | int) -> str:
    """Format a number of bytes for people: ``5.03 GiB``, or ``81.20 KiB`` for a much smaller one."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit / 10:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} bytes"


def memory_of(compiled: Any) -> Memory | None:
    """Return the figures of ``compiled.memory_analysis()``; None if the backend states none."""
    stated = compiled.memory_analysis()
    if stated is None:
        return None
    return Memory(
        arguments=stated.argument_size_in_bytes,
        temporaries=stated.temp_size_in_bytes,
        outputs=stated.output_size_in_bytes,
        aliased=stated.alias_size_in_bytes,
        code=stated.generated_code_size_in_bytes,
    )


def required(error: Exception) -> int | None:
    """Return the bytes that a program needs, from a TPU compiler's out-of-memory error; None for other errors."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMG])\) exceeds available HBM", str(error))
    return None if found is None else int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[found[2]])


def arguments_of(shapes: Any) -> int:
    """Return the arguments' bytes on one device; ``shapes`` is a tree of ShapeDtypeStructs with shardings."""
    import jax
    import numpy as np

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(shapes))


def knob(mode: str, config: Any, mesh: Mapping[str, int], experts: int, *, arguments: int, total: int) -> str:
    """Return advice on the setting to change for less memory, by the largest part.

    Args:
        mode: "train" or "sample".
        config: the run's config.
        mesh: the sizes of the mesh's axes.
        experts: the number of experts.
        arguments: bytes that a device holds all the time.
        total: bytes that a device needs.
    """
    devices, more_fsdp = math.prod(mesh.values()), f"--config.mesh.fsdp={2 * mesh['fsdp']}"
    if devices % (2 * mesh["expert"] * mesh["fsdp"]):
        more_fsdp += " on a larger slice"
    if 2 * arguments >= total:
        for size in range(mesh["expert"] + 1, experts + 1):
            if experts % size == 0 and devices % (size * mesh["fsdp"]) == 0:
                return f"the weights are most of it: --config.mesh.expert={size}, fewer experts on a device"
        return f"the weights are most of it: {more_fsdp}, a part of each expert on a device"
    rows = mesh["data"] * mesh["fsdp"]
    if mode == "sample":
        batch = config.sample.batch
        if batch > rows:
            return f"the temporaries are most of it: --config.sample.batch={max(rows, batch // 2)}"
        return "the temporaries are most of it, and a device samples one picture at a time: smaller sample.size"
    train = config.train
    if train.remat != "fused":
        return "the temporaries are most of it: --config.train.remat=fused"
    if train.batch // rows > train.accumulate:
        parts = next(n for n in range(train.accumulate + 1, train.batch // rows + 1) if train.batch // rows % n == 0)
        return (
            f"the temporaries are most of it: --config.train.accumulate={parts}, or more devices along data, "
            "or a smaller train.batch"
        )
    return f"the temporaries of one row are most of it: {more_fsdp}, or smaller data.size"
