"""Sizes, rules and places of meshes; nothing is compiled here."""

from __future__ import annotations

import dataclasses
import types
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from afa_jax.errors import InputError
from afa_jax.fusion.afa import FusedUNets
from afa_jax.mesh import parallel
from afa_jax.mesh.collectives import AXES
from afa_jax.mesh.parallel import make_mesh, place, place_rows, resolve_sizes, row_share, spec_of, specs_of
from afa_jax.training.step import batch_specs
from afa_jax.trees import flatten, stack
from tests import tiny


def test_one_size_takes_the_devices_that_are_left() -> None:
    assert resolve_sizes(dict(expert=2, data=-1), 8, experts=6) == (4, 1, 2)
    assert resolve_sizes(dict(data=-1, fsdp=2, expert=1), 8) == (4, 2, 1)
    assert resolve_sizes(dict(expert=-1), 3, experts=3) == (1, 1, 3)
    assert dict(make_mesh(dict(expert=4, data=-1)).shape) == dict(data=2, fsdp=1, expert=4)


@pytest.mark.parametrize(
    ("sizes", "devices", "experts", "message"),
    [
        (
            dict(expert=4, data=-1),
            8,
            6,
            r"mesh data=-1, fsdp=1, expert=4 does not fit 8 devices and 6 experts; these do: .*expert=2",
        ),
        (dict(expert=2, data=2), 8, 6, r"data=4, fsdp=1, expert=2"),
        (dict(expert=3, data=-1), 8, 3, r"these do: .*data=8, fsdp=1, expert=1"),
        (dict(expert=-1, data=-1), 8, 2, "only one can take the devices that are left"),
        (dict(expert=0), 8, 2, r"mesh.expert=0; choose 1 or more, or -1"),
        (dict(model=2), 8, 2, r"mesh.model: no such axis; there are data, fsdp, expert"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    sizes: dict[str, int], devices: int, experts: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve_sizes(sizes, devices, experts)


def test_what_is_offered_instead_fits() -> None:
    with pytest.raises(InputError) as refused:
        resolve_sizes(dict(expert=4, data=3, fsdp=1), 12, experts=6)
    offered = str(refused.value).split("these do: ")[1].split("; ")
    for line in offered:
        sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in line.split(", "))}
        assert resolve_sizes(sizes, 12, experts=6) == tuple(sizes[axis] for axis in AXES)


def test_slices_are_split_over_data(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int
        platform: str = "tpu"
        device_kind: str = "x"

    devices = [Device(i, i // 4, i // 4) for i in range(8)]
    made: dict[str, object] = {}

    def hybrid(within: tuple[int, ...], between: tuple[int, ...], devices: object, **_: bool) -> np.ndarray:
        made.update(within=within, between=between)
        return np.asarray(jax.devices()).reshape(4, 1, 2)

    monkeypatch.setattr(parallel, "create_hybrid_device_mesh", hybrid)
    assert dict(make_mesh(dict(expert=2, data=-1), devices=devices).shape) == dict(data=4, fsdp=1, expert=2)
    assert made == dict(within=(2, 1, 2), between=(2, 1, 1))
    with pytest.raises(InputError, match=r"mesh.data=1: the devices are on 2 slices; choose a multiple of 2"):
        make_mesh(dict(expert=8), devices=devices)


def test_an_axis_may_be_a_part_of_a_slices_side() -> None:
    """Two experts by eight rows on 4 x 4 chips of a v6e."""

    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        coords: tuple[int, int, int]
        core_on_chip: int = 0
        process_index: int = 0
        platform: str = "tpu"
        device_kind: str = "TPU v6 lite"

    chips = [Chip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
    grid = make_mesh(dict(expert=2, data=-1), experts=6, devices=chips).devices
    assert grid.shape == (8, 1, 2) and {chip.id for chip in grid.flat} == set(range(16))
    for one, other in grid[:, 0]:  # experts of the same rows are neighbours
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_every_array_of_a_run_has_a_rule() -> None:
    mesh = make_mesh(dict(data=2, fsdp=2, expert=2))
    kernel = (2, 3, 3, 320, 640)
    assert spec_of("unet.stages.1.resnet.conv1.kernel", kernel, mesh) == PartitionSpec(
        "expert", None, None, None, "fsdp"
    )
    assert spec_of("unet.stages.1.resnet.conv1.bias", (2, 640), mesh) == PartitionSpec("expert")
    assert spec_of("text_encoder.final_layer_norm.scale", (2, 768), mesh) == PartitionSpec("expert")
    assert spec_of("vae.decoder.conv_in.kernel", (3, 3, 4, 512), mesh) == PartitionSpec()
    with pytest.raises(InputError, match=r"no rule says how adapter.kernel is spread"):
        spec_of("adapter.kernel", (2, 2), mesh)
    unet = jax.eval_shape(lambda: stack([tiny.unet(i) for i in range(2)]))
    ensemble = FusedUNets(experts=unet, aggregators=tiny.aggregators(2))
    specs = flatten(specs_of(ensemble, mesh))
    assert set(specs) == set(flatten(ensemble))
    assert all((spec == PartitionSpec("expert")) == path.startswith("experts.") for path, spec in specs.items())


def test_fsdp_splits_the_longest_dimension_that_divides() -> None:
    mesh = make_mesh(dict(data=1, fsdp=4, expert=2))
    assert spec_of("unet.stages.0.x.kernel", (2, 3, 3, 1024, 516), mesh) == PartitionSpec("expert", None, None, "fsdp")
    assert spec_of("unet.stages.0.x.kernel", (2, 3, 3, 321, 641), mesh) == PartitionSpec("expert")
    assert spec_of("unet.stages.0.x.kernel", (2, 8, 8), mesh) == PartitionSpec("expert")  # too small to be worth it


def test_rows_come_from_the_processes_that_have_devices_for_them() -> None:
    rows = dict(image=np.arange(16).reshape(8, 2), states=np.arange(64).reshape(8, 4, 2))
    for sizes in (dict(data=8), dict(data=4, expert=2), dict(data=2, fsdp=2, expert=2), dict(expert=4, data=2)):
        mesh = make_mesh(sizes)
        assert row_share(mesh) == (0, 1)
        placed = place_rows(rows, mesh, batch_specs(rows))
        for name, values in rows.items():
            np.testing.assert_array_equal(placed[name], values)
        own = placed["states"].addressable_shards[0].data.shape
        assert own == (8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 4 // mesh.shape["expert"], 2)
    with pytest.raises(InputError, match="a batch of 6 does not divide by 4 devices"):
        place_rows(dict(image=np.zeros((6, 2))), make_mesh(dict(data=4, expert=2)))


@pytest.mark.parametrize(
    ("shape", "per_process", "shares"),
    [
        ((4, 1, 2), 4, [(0, 2), (1, 2)]),  # two groups of experts in each process
        ((4, 1, 2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a group over two processes, which read the same rows
        ((1, 1, 8), 4, [(0, 1), (0, 1)]),
    ],
)
def test_shares_of_several_processes(
    shape: tuple[int, int, int], per_process: int, shares: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = np.asarray([types.SimpleNamespace(process_index=i // per_process) for i in range(8)], dtype=object).reshape(
        shape
    )
    mesh = Mock(spec=Mesh, devices=grid, axis_names=AXES, shape=dict(zip(AXES, shape, strict=True)))
    found = []
    for process in range(8 // per_process):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(row_share(mesh))
    assert found == shares


def test_experts_are_placed_where_they_run() -> None:
    experts = stack([tiny.unet(i, tiny.MICRO_UNET) for i in range(4)])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    for count in (1, 2, 4):
        mesh = make_mesh(dict(expert=count, data=-1), experts=4)
        placed = place(experts, mesh, specs_of(experts, mesh, "unet"))
        for device in jax.devices():
            held = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(placed)
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            assert held <= 1.01 * whole / count
