"""The report on a compiled program: what one device holds, computes and exchanges."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from afa_jax.scale.chips import Chip
from afa_jax.scale.collectives import Collective, Total, collectives, largest, summed
from afa_jax.scale.flops import Flops, flops
from afa_jax.scale.memory import Memory, gib, memory_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The costs of one device of a mesh in a run of the program.

    Attributes:
        memory: the program's memory; None if the backend does not state it.
        flops: the program's operations.
        beside: bytes that a run holds on the device and this program does not use.
        totals: the collectives' totals, by axes and kind.
        largest: the collectives that move the most bytes.
        chip: the kind of device; None if its figures are unknown here.
    """

    memory: Memory | None
    beside: int
    flops: Flops
    totals: tuple[Total, ...]
    largest: tuple[Collective, ...]
    chip: Chip | None

    @property
    def needed(self) -> int:
        """Return the bytes that a device needs for the program and for the run's other arrays."""
        return self.beside + (0 if self.memory is None else self.memory.total)

    @property
    def bounds(self) -> dict[str, float]:
        """Return lower bounds in seconds for each part of a run; the parts may overlap, and no run reaches a bound.

        ``compute``: the products at the peak for bfloat16; ``memory``: every argument read and every result written
        once; ``exchange``: the bytes that must be sent, over all links at once.
        """
        if self.chip is None:
            return {}
        bounds = dict(compute=self.flops.products / self.chip.flops)
        if self.memory is not None:
            bounds["memory"] = (self.memory.arguments + self.memory.outputs) / self.chip.bandwidth
        return bounds | dict(exchange=sum(total.sent for total in self.totals) / self.chip.interconnect)

    def json(self) -> dict[str, Any]:
        """Return all fields and the bounds as plain data."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: _plain(value) for name, value in own.items()}
        return plain | dict(bounds=self.bounds)

    def __str__(self) -> str:
        lines = []
        if self.memory is not None:
            lines.append(f"memory of a device: {self.memory}; beside it {gib(self.beside)} that it does not use")
        about = "" if self.flops.exact else " (loops of unknown length count once, branches as if taken)"
        kinds = sorted({re.sub(r"[.\d]+$", "", name) for name in self.flops.unknown})
        missing = f", without {len(self.flops.unknown)} kernels ({', '.join(kinds)})" if kinds else ""
        lines.append(f"{self.flops.products / 1e12:.4g} TFLOP a device in products and convolutions{missing}{about}")
        lines += [f"exchanged by a device: {'' if self.totals else 'nothing'}".rstrip(), *table(self.totals)]
        if self.bounds:
            bounds = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in self.bounds.items())
            lines.append(f"lower bounds of the time, not estimates: {bounds}")
        return "\n".join(lines)


def examine(compiled: Any, shape: Mapping[str, int], chip: Chip | None, held: int | None = None) -> Report:
    """Read a compiled program.

    Args:
        shape: the shape of the mesh that it was compiled for.
        chip: the kind of device, if it is known.
        held: bytes that a run holds on a device while the program runs; jax passes only the arguments that it uses.
    """
    text, memory = compiled.as_text(), memory_of(compiled)
    found = [
        one for one in collectives(text, shape) if one.axes != "none"
    ]  # on a CPU a device may exchange with itself
    return Report(
        memory=memory,
        beside=max(0, (held or 0) - (0 if memory is None else memory.arguments)),
        flops=flops(text),
        totals=tuple(summed(found)),
        largest=tuple(largest(found)),
        chip=chip,
    )


def table(totals: tuple[Total, ...]) -> list[str]:
    """Return totals as the lines of an aligned table."""
    if not totals:
        return []
    rows: list[tuple[str, ...]] = [("axes", "kind", "instructions", "times", "payload", "sent, at least", "largest")]
    for one in totals:
        times = f"{one.times}{'' if one.exact else '?'}"
        sizes = (gib(one.bytes), gib(one.sent), gib(one.largest))
        rows.append((one.axes, one.kind, str(one.instructions), times, *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["", *map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])]) for row in rows]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
