"""Facts about chips, against the TPU's own compiler where it is installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from afa_jax.errors import InputError
from afa_jax.scale.chips import CHIPS, GIB, chip_of, slice_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler: pip install -r requirements-aot.txt"
)


@needs_libtpu
@pytest.mark.parametrize("name", CHIPS)
def test_devices_are_counted_as_jax_counts_them(name: str) -> None:
    chip = CHIPS[name]
    devices = slice_devices(chip.topology)
    chips = 1
    for along in chip.topology.partition(":")[2].split("x"):
        chips *= int(along)
    assert len(devices) == chips * chip.per_chip
    assert chip_of(devices[0].device_kind) is chip


@needs_libtpu
def test_several_slices() -> None:
    assert [device.slice_index for device in slice_devices("v5e:2x2", slices=2)] == [0] * 4 + [1] * 4


@needs_libtpu
def test_a_slice_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"v5e:3x3: the TPU's compiler knows no such slice \(.*not divisible"):
        slice_devices("v5e:3x3")


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:4", "v5e-16", "v5litepod:4x4"])
def test_what_is_no_topology(topology: str) -> None:
    with pytest.raises(InputError, match="write GENERATION:CHIPSxCHIPS, as in v4:2x2x1, v5e:4x4"):
        slice_devices(topology)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-aot\.txt"):
        slice_devices("v5e:2x2")


def test_figures_are_of_a_device() -> None:
    """tpu7x has two devices on a chip: 192 GiB, 2307 TFLOP/s and 1200 GB/s in both directions are shared."""
    chip = CHIPS["tpu7x"]
    assert (chip.flops, chip.interconnect) == (2307e12 / 2, 300e9)
    assert 94 * GIB < chip.memory < 96 * GIB
    assert CHIPS["v5e"].memory < 16 * GIB < 1.02 * CHIPS["v5e"].memory
    assert chip_of("cpu") is None
