"""What a report says of a small program whose figures are known."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from afa_jax.scale.chips import CHIPS
from afa_jax.scale.report import examine


def test_a_product_whose_gradient_is_summed() -> None:
    """[256, 64] x [64, 32], rows over 8 devices; the gradient of the kernel is summed over them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(kernel: Any, x: Any) -> Any:
        return jnp.sin(x @ kernel).sum()

    def shape(spec: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    compiled = jax.jit(jax.grad(loss)).lower(shape(P(), 64, 32), shape(P("data"), 256, 64)).compile()
    chip = CHIPS["v5e"]
    report = examine(compiled, mesh.shape, chip, held=16 * 2**10 + 100)
    assert report.flops.products == 2 * 2 * 256 * 64 * 32 // 8
    (total,) = report.totals
    assert (total.axes, total.kind, total.bytes) == ("data", "all-reduce", 64 * 32 * 4)
    assert report.memory is not None
    read_and_written = report.memory.arguments + report.memory.outputs
    assert report.bounds == pytest.approx(
        dict(
            compute=report.flops.products / 197e12,
            memory=read_and_written / 819e9,
            exchange=64 * 32 * 4 * 2 * 7 / 8 / 200e9,
        )
    )
    lines = str(report).splitlines()
    assert lines[0].startswith("memory of a device: arguments 16.00 KiB, ")
    assert lines[0].endswith("; beside it 100 bytes that it does not use") and report.beside == 100
    assert report.needed == report.memory.total + 100
    assert lines[1] == "2.621e-07 TFLOP a device in products and convolutions"
    assert [line.split() for line in lines[3:5]] == [
        ["axes", "kind", "instructions", "times", "payload", "sent,", "at", "least", "largest"],
        ["data", "all-reduce", "1", "1", "8.00", "KiB", "14.00", "KiB", "8.00", "KiB"],
    ]
    assert lines[-1].startswith("lower bounds of the time, not estimates: compute ")
    assert json.loads(json.dumps(report.json()))["largest"][0]["axes"] == "data"
    assert "lower bounds" not in str(examine(compiled, mesh.shape, None))
