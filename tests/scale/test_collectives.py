"""What a compiled program exchanges: known programs on eight CPU devices, and a TPU's text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from afa_jax.scale.collectives import Collective, collectives, largest, replica_groups, summed

ROWS, WIDTH = 16, 6  # of float32, on each device: 384 bytes
SIZE = ROWS * WIDTH * 4


def mesh_of(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESHES = {"2x4": mesh_of(expert=2, data=4), "2x2x2": mesh_of(expert=2, data=2, fsdp=2)}


def text_of(function: Callable[..., Any], *arguments: Any) -> str:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def found(function: Callable[..., Any], mesh: Mesh, *shapes: tuple[int, ...], spec: Any = None) -> list[Collective]:
    """The collectives of ``shard_map(function)`` on float32 arguments, the same shape on each device."""
    spec = P() if spec is None else spec
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sharding = NamedSharding(mesh, spec)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    return collectives(text_of(mapped, *arguments), mesh.shape)


def psum(x: Any, axis: Any) -> Any:
    return jax.lax.psum(jnp.sin(x), axis)


def gather(x: Any, axis: Any) -> Any:
    return jax.lax.all_gather(jnp.sin(x), axis, tiled=True)


def scatter(x: Any, axis: Any) -> Any:
    return jax.lax.psum_scatter(jnp.sin(x), axis, tiled=True)


def rotate(x: Any, axis: Any) -> Any:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def exchange(x: Any, axis: Any) -> Any:
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


CASES = [
    (psum, "all-reduce", lambda k: SIZE, lambda k: 2 * SIZE * (k - 1) / k),
    (gather, "all-gather", lambda k: SIZE * k, lambda k: SIZE * (k - 1)),
    (scatter, "reduce-scatter", lambda k: SIZE, lambda k: SIZE * (k - 1) / k),
    (rotate, "collective-permute", lambda k: SIZE, lambda k: SIZE),
    (exchange, "all-to-all", lambda k: SIZE, lambda k: SIZE * (k - 1) / k),
]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize(
    ("function", "kind", "payload", "sent"), CASES, ids=lambda case: getattr(case, "__name__", None)
)
def test_each_collective_over_each_axis(shape: str, function: Any, kind: str, payload: Any, sent: Any) -> None:
    """Kind, axis, payload and least traffic, per device."""
    mesh = MESHES[shape]

    def all_axes(x: Any) -> Any:
        return [function(x, axis) for axis in mesh.axis_names]

    ours = found(all_axes, mesh, (ROWS, WIDTH))
    assert {(one.kind, one.axes, one.bytes, one.times) for one in ours} == {
        (kind, axis, payload(size), 1) for axis, size in mesh.shape.items()
    }
    assert [one.sent for one in ours] == pytest.approx([sent(mesh.shape[one.axes]) for one in ours])
    assert {one.group for one in ours} == ({2} if kind == "collective-permute" else set(mesh.shape.values()))
    assert {one.dtypes for one in ours} == {("f32",)}


def test_several_axes_and_where_they_are_in_the_program() -> None:
    mesh = MESHES["2x2x2"]

    def function(x: Any) -> Any:
        with jax.named_scope("fusion"):
            return jax.lax.psum(x, ("expert", "fsdp")), jax.lax.psum(jnp.sin(x), ("expert", "data", "fsdp"))

    one, other = sorted(found(function, mesh, (ROWS, WIDTH)), key=lambda one: one.group)
    assert (one.axes, one.group, other.axes, other.group) == ("expert+fsdp", 4, "expert+data+fsdp", 8)
    assert "fusion/psum" in one.place


def test_loops_multiply() -> None:
    """A scan of 7, in one of 5, and one whose length the program does not know."""
    mesh = MESHES["2x4"]

    def scanned(function: Callable[[Any], Any], length: int) -> Callable[[Any], Any]:
        return lambda x: jax.lax.scan(lambda x, _: (jnp.sin(function(x)), None), x, length=length)[0]

    def function(x: Any) -> Any:
        inner = scanned(lambda x: jax.lax.psum(x, "data"), 5)
        return scanned(lambda x: inner(jax.lax.psum(x, "expert")), 7)(jax.lax.psum(x, ("expert", "data")))

    assert {one.axes: one.times for one in found(function, mesh, (ROWS, WIDTH))} == {
        "expert": 7, "data": 35, "expert+data": 1,
    }  # fmt: skip

    def unknown(x: Any) -> Any:
        return jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: jax.lax.psum(x, "data") + 1, x)

    (one,) = found(unknown, mesh, (ROWS, WIDTH))
    assert one.times is None and not summed([one])[0].exact and summed([one])[0].bytes == SIZE


def test_a_branch_counts_as_if_taken() -> None:
    def function(x: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "data"), jnp.cos, x)

    (one,) = found(function, MESHES["2x4"], (ROWS, WIDTH))
    assert (one.times, one.conditional) == (1, True) and not summed([one])[0].exact


@pytest.mark.parametrize("shape", MESHES)
def test_what_the_partitioner_adds(shape: str) -> None:
    """GSPMD: the sum over a dimension that is split over ``data`` and the gathering of one split over ``expert``."""
    mesh = MESHES[shape]

    def place(spec: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    def function(x: Any, y: Any) -> Any:
        whole = jax.lax.with_sharding_constraint(jnp.sin(y), NamedSharding(mesh, P()))
        return x.sum(0), whole

    text = text_of(function, place(P("data"), 32, WIDTH), place(P("expert"), 32, WIDTH))
    rows = {(one.axes, one.kind): one for one in summed(collectives(text, mesh.shape))}
    assert rows["data", "all-reduce"].bytes == WIDTH * 4
    assert rows["expert", "all-gather"].bytes == 32 * WIDTH * 4
    assert len(rows) == 2


def test_sums_and_the_largest() -> None:
    mesh = MESHES["2x4"]

    def function(x: Any, y: Any) -> Any:
        def body(x: Any, _: None) -> Any:
            return jnp.sin(jax.lax.psum(x, "data")), None

        return jax.lax.scan(body, x, length=3)[0], jax.lax.all_gather(y, "expert", tiled=True)

    ours = found(function, mesh, (ROWS, WIDTH), (4 * ROWS, WIDTH))
    first, second = summed(ours)
    assert (first.kind, first.axes, first.bytes, first.times) == ("all-gather", "expert", 8 * SIZE, 1)
    assert (second.kind, second.axes, second.bytes, second.times) == ("all-reduce", "data", 3 * SIZE, 3)
    assert (second.instructions, second.largest, second.exact) == (1, SIZE, True)
    assert second.sent == pytest.approx(3 * SIZE * 1.5)
    assert [one.kind for one in largest(ours, 1)] == ["all-gather"]


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3),)),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh[a=2,b=2] {a}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_notations_of_groups(notation: str, groups: Any) -> None:
    assert replica_groups(f"channel_id=1, replica_groups={notation}, use_global_device_ids=true", 4) == groups


def test_groups_of_no_axis_are_listed() -> None:
    text = """HloModule m, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,3},{1,2}}, to_apply=%add
}
"""
    (one,) = collectives(text, dict(expert=2, data=2))
    assert (one.axes, one.groups, one.group) == ("other", ((0, 3), (1, 2)), 2)
    with pytest.raises(ValueError, match="for 4 devices and a mesh of 8"):
        collectives(text, dict(expert=2, data=4))
    with pytest.raises(ValueError, match="unknown notation"):
        replica_groups("replica_groups=<all>", 4)


def test_a_tpu_program() -> None:
    """Asynchronous forms, tuples, tiled layouts, a fused reduce-scatter, a loop without a stated length."""
    text = (Path(__file__).parent / "tpu.hlo").read_text()
    ours = {one.place.split("/")[-1]: one for one in collectives(text, dict(expert=2, data=2, fsdp=2))}
    facts = {place: (one.kind, one.axes, one.dtypes, one.bytes, one.times) for place, one in ours.items()}
    assert facts == {
        "gradients": ("all-reduce", "expert+data+fsdp", ("f32", "bf16"), 4 * 100 + 2 * 256, 1),
        "kernels": ("all-gather", "fsdp", ("bf16",), 2 * 64 * 128 * 2, 6),
        "rotated": ("collective-permute", "data", ("bf16",), 64 * 128 * 2, 6),
        "logits": ("all-to-all", "expert", ("f32",), 4 * 32, 6),
        "scattered": ("reduce-scatter", "expert", ("bf16",), 2 * 128 * 128, 6),
        "wrapped": ("all-gather", "data+fsdp", ("f32",), 4 * 16 * 4, 1),
    }
