"""The collectives of a compiled program: the bytes of each, and the mesh axes it runs over.

    found = collectives(compiled.as_text(), mesh.shape)
    for row in summed(found):
        print(row)

A compiler may promote, merge or split what the Python program asked for (XLA's CPU compiler sums bfloat16 in float32,
so its all-reduces are twice as large as a TPU's). These are the collectives that will run, not those that were
written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from afa_jax.scale.hlo import Executed, arrays_of, bytes_of, parse

COLLECTIVE_OPS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction of a program.

    Attributes:
        kind: one of COLLECTIVE_OPS.
        dtypes: the dtypes of the exchanged arrays, each once.
        bytes: payload of one device and one execution: an all-gather's result, any other collective's operands.
        axes: mesh axes that it runs over, such as "expert" or "expert+data", in the mesh's order; "none" if every group
            is a single device, "other" if the groups match no axes of the mesh.
        group: the number of devices in a group.
        groups: the groups (of a permutation the pairs of source and target), where ``axes`` is "other".
        times: executions in a run of the program; None if the program's text does not tell.
        conditional: whether it is in a branch; ``times`` counts as if the branch was always taken.
        place: its place in the Python program, as jax names it; empty if the compiler added it.
    """

    kind: str
    dtypes: tuple[str, ...]
    bytes: int
    axes: str
    group: int
    groups: Groups = ()
    times: int | None = 1
    conditional: bool = False
    place: str = ""

    @property
    def sent(self) -> float:
        """Return the least number of bytes that a device must send in one execution, with any algorithm.

        With k devices in a group, that is 2 (k - 1) / k of the payload for an all-reduce, all of it for a permutation
        or broadcast, and (k - 1) / k of it for the others.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        share = (self.group - 1) / self.group
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """All collectives of one kind over the same axes; bytes and counts are of one device in a run of the program.

    Attributes:
        instructions: the number of instructions in the program.
        times: executions; an instruction in a loop counts once per iteration.
        bytes: payload of all executions.
        sent: the least that a device must send in all executions.
        largest: payload of the largest one.
        exact: False if some loop's length is unknown (it counts as one iteration), or some are in a branch.
    """

    axes: str
    kind: str
    instructions: int
    times: int
    bytes: int
    sent: float
    largest: int
    exact: bool


def collectives(text: str, shape: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a program that was compiled for a mesh, in the order of a run.

    Args:
        text: ``compiled.as_text()``; device numbers in it are positions in the flattened ``mesh.devices``.
        shape: ``mesh.shape``, the axes' names and sizes.

    Raises:
        ValueError: the program is for another number of devices than the mesh has, or its groups are in an unknown
            notation.
    """
    program = parse(text)
    if program.devices != math.prod(shape.values()):
        raise ValueError(f"a program for {program.devices} devices and a mesh of {math.prod(shape.values())}")
    found = (_collective(executed, shape) for executed in program.executed())
    return [collective for collective in found if collective is not None]


def summed(found: Iterable[Collective]) -> list[Total]:
    """Sum collectives by axes and kind; return the totals with the most bytes first."""
    rows: dict[tuple[str, str], list[Collective]] = {}
    for one in found:
        rows.setdefault((one.axes, one.kind), []).append(one)
    totals = [
        Total(
            axes=axes,
            kind=kind,
            instructions=len(own),
            times=sum(_times(one) for one in own),
            bytes=sum(one.bytes * _times(one) for one in own),
            sent=sum(one.sent * _times(one) for one in own),
            largest=max(one.bytes for one in own),
            exact=all(one.times is not None and not one.conditional for one in own),
        )
        for (axes, kind), own in rows.items()
    ]
    return sorted(totals, key=lambda total: (-total.bytes, total.axes, total.kind))


def largest(found: Iterable[Collective], count: int = 10) -> list[Collective]:
    """Return the collectives that move the most bytes, summed over all their executions."""
    return sorted(found, key=lambda one: -one.bytes * _times(one))[:count]


def _times(one: Collective) -> int:
    return 1 if one.times is None else one.times


def _collective(executed: Executed, shape: Mapping[str, int]) -> Collective | None:
    instruction, computation = executed.instruction, executed.computation
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVE_OPS:
        return None
    # A TPU writes some reduce-scatters as a fusion of an all-reduce and of taking this device's part.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    shapes = [computation.instructions[operand].shape for operand in instruction.operands]
    if kind == "collective-permute":
        shapes = shapes[:1]  # any others are buffers and offsets for working in place
        groups = _pairs(instruction.attributes)
        axes, size = _axes_of_pairs(groups, shape), 1 + (not all(a == b for a, b in groups))
    else:
        groups = replica_groups(instruction.attributes, math.prod(shape.values()))
        axes, size = axes_of(groups, shape), len(groups[0])
    payload = sum(map(bytes_of, shapes)) * (size if kind == "all-gather" else 1)
    return Collective(
        kind=kind,
        dtypes=tuple(dict.fromkeys(dtype for shape in shapes for dtype, _ in arrays_of(shape))),
        bytes=payload,
        axes=axes,
        group=size,
        groups=groups if axes == "other" else (),
        times=executed.times,
        conditional=executed.conditional,
        place=instruction.place,
    )


def axes_of(groups: Groups, shape: Mapping[str, int]) -> str:
    """Return the mesh axes that these groups span: their names joined by "+", or "none" or "other"."""
    if all(len(group) == 1 for group in groups):
        return "none"
    wanted = {frozenset(group) for group in groups}
    names = [name for name, size in shape.items() if size > 1]
    for chosen in itertools.chain.from_iterable(itertools.combinations(names, n + 1) for n in range(len(names))):
        if {frozenset(group) for group in _groups_over(shape, chosen)} == wanted:
            return "+".join(chosen)
    return "other"


def replica_groups(attributes: str, devices: int) -> Groups:
    """Parse the groups of devices in an instruction's attributes, in any of HLO's notations.

    ``{{0,1},{2,3}}`` lists them. ``{}`` is one group of all devices. ``[2,4]<=[4,2]T(1,0)`` is the numbers 0, 1, ... in
    the shape [4,2], transposed, then reshaped to 2 groups of 4. ``mesh['a'=2,'b'=4] {'a'}`` names axes of a mesh of its
    own; that mesh's devices may follow, in either of these notations. ``'b':(2)2`` is a part of an axis: b is split
    into 2 x 2 x 1, and the middle one is meant.

    Raises:
        ValueError: the notation is none of these.
    """
    found = re.search(r"replica_groups=(\{\{[\d,{} ]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if found:
        if found[1] == "{}":
            return (tuple(range(devices)),)
        return tuple(map(tuple, _device_array(found[1]).tolist()))
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes)
    if found is None:
        raise ValueError(f"replica groups in an unknown notation: {attributes[:200]}")
    shape = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", found[1])}
    numbers = None if found[2] is None else _device_array(found[2])
    chosen: list[str] = []
    for name, before, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", found[3]):
        if before:
            shape = _split(shape, name, int(before), int(size))
            name = f"{name}:({before}){size}"
        chosen.append(name)
    return _groups_over(shape, chosen, numbers)


def _device_array(text: str) -> np.ndarray:
    """Parse an array of device numbers as HLO prints it: listed, or an iota that is reshaped and transposed."""
    if "{" in text:
        return np.asarray([[int(number) for number in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)])
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$", text)
    if iota is None:
        return np.asarray([int(number) for number in text.split(",")])
    shape, source, order = (None if part is None else [int(n) for n in part.split(",")] for part in iota.groups())
    assert shape is not None and source is not None
    numbers = np.arange(math.prod(source)).reshape(source)
    return (numbers if order is None else numbers.transpose(order)).reshape(shape)


def _split(shape: dict[str, int], name: str, before: int, size: int) -> dict[str, int]:
    """Split an axis into three; the middle one, ``name:(before)size``, is the part that HLO names."""
    whole = {f"{name}<": before, f"{name}:({before}){size}": size, f"{name}>": shape[name] // (before * size)}
    return {key: value for old, own in shape.items() for key, value in (whole if old == name else {old: own}).items()}


def _groups_over(shape: Mapping[str, int], chosen: Iterable[str], numbers: np.ndarray | None = None) -> Groups:
    names, chosen = list(shape), list(chosen)
    ids = np.arange(math.prod(shape.values())) if numbers is None else numbers
    last = [names.index(name) for name in chosen]
    moved = np.moveaxis(ids.reshape(list(shape.values())), last, range(len(names) - len(last), len(names)))
    return tuple(map(tuple, moved.reshape(-1, math.prod(shape[name] for name in chosen)).tolist()))


def _pairs(attributes: str) -> Groups:
    found = re.search(r"source_target_pairs=\{([\d,{} ]*)\}", attributes)
    if found is None:
        raise ValueError(f"a permutation without source_target_pairs: {attributes[:200]}")
    return tuple((int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", found[1]))


def _axes_of_pairs(pairs: Groups, shape: Mapping[str, int]) -> str:
    """Return the axes along which some source and its target differ, joined by "+"; "none" for none."""
    sizes = tuple(shape.values())
    along = {
        axis
        for source, target in pairs
        for axis, (a, b) in enumerate(
            zip(np.unravel_index(source, sizes), np.unravel_index(target, sizes), strict=True)
        )
        if a != b
    }
    return "+".join(name for axis, name in enumerate(shape) if axis in along) or "none"
