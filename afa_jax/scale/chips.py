"""TPU chips: their figures, and descriptions of slices that need not exist.

Peak operations, memory bandwidth and interconnect are those of Google's documentation (cloud.google.com/tpu/docs: the
key specifications of v4, v5e, v5p, v6e and tpu7x, read in November 2026); a v4's interconnect is that of Jouppi et al.
2023 (arXiv 2304.01433: six links of 50 GB/s). The documentation gives them for a chip, and its newer pages sum the
interconnect over both directions. Here they are for one device, and for the one direction in which it sends.

Memory is what the compiler offers to a program: libtpu 0.0.52 refuses more with "exceeds available HBM".
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from afa_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device, as jax counts devices.

    Attributes:
        name: the generation's name, as in a topology's name.
        kind: ``device.device_kind``.
        per_chip: devices on a chip. v4 and v5p have two cores that run as one device; tpu7x has two devices.
        memory: bytes of HBM that a program may use.
        flops: peak bfloat16 operations a second.
        bandwidth: bytes a second from and to HBM.
        interconnect: bytes a second that it can send to other chips of the slice (ICI), over all links.
        topology: an example of a slice's name.
    """

    name: str
    kind: str
    per_chip: int
    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    topology: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kind="TPU v4", per_chip=1, memory=int(30.75 * GIB),
            flops=275e12, bandwidth=1200e9, interconnect=300e9, topology="v4:2x2x1",
        ),
        Chip(
            name="v5e", kind="TPU v5 lite", per_chip=1, memory=int(15.75 * GIB),
            flops=197e12, bandwidth=819e9, interconnect=200e9, topology="v5e:4x4",
        ),
        Chip(
            name="v5p", kind="TPU v5", per_chip=1, memory=int(95.73 * GIB),
            flops=459e12, bandwidth=2765e9, interconnect=600e9, topology="v5p:2x2x1",
        ),
        Chip(
            name="v6e", kind="TPU v6 lite", per_chip=1, memory=int(31.24 * GIB),
            flops=918e12, bandwidth=1638e9, interconnect=400e9, topology="v6e:4x4",
        ),
        Chip(
            name="tpu7x", kind="TPU7x", per_chip=2, memory=int(94.74 * GIB),
            flops=2307e12 / 2, bandwidth=7380e9 / 2, interconnect=600e9 / 2, topology="tpu7x:2x2x1",
        ),
    )
}  # fmt: skip
"""Chips by the name with which a topology begins."""


def chip_of(kind: str) -> Chip | None:
    """Return the chip of a ``device_kind``; None for an unknown one, such as a CPU."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def slice_devices(topology: str, slices: int = 1) -> list[Any]:
    """Return the devices of TPU slices for compiling ahead of time; no TPU need be present.

    Args:
        topology: the generation and the number of chips along each dimension: ``v5e:4x4``, ``v5p:2x2x1``.
        slices: the number of slices, joined by the data-centre network.

    Raises:
        InputError: there is no such slice, or libtpu, whose compiler is asked, is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        examples = ", ".join(chip.topology for chip in CHIPS.values())
        raise InputError(f"--topology {topology}: write GENERATION:CHIPSxCHIPS, as in {examples}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: the TPU's compiler is missing; pip install -r requirements-aot.txt")
    # Without the first variable, libtpu asks the network what TPU this is. Without the second, only one process at a
    # time may load it. Both rules are meant for a machine with TPUs; this one may have none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental.topologies import get_topology_desc

    # On request only do a v4's two cores count as one device; on real ones they do.
    options: dict[str, Any] = dict(chip_config_name="megacore") if name == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return list(get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise InputError(f"--topology {topology}: the TPU's compiler knows no such slice ({reason})") from error
