"""What a program holds, and what is advised where that is too much."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from afa_jax.scale.memory import arguments_of, gib, knob, memory_of, required


def test_memory_of_a_device() -> None:
    """Two arrays of 4 KiB, one split over eight devices and given back in its own place."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def shape(spec: Any) -> Any:
        return jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, spec))

    shapes = (shape(P("data")), shape(P()))
    compiled = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0).lower(*shapes).compile()
    memory = memory_of(compiled)
    assert memory is not None
    assert memory.arguments == arguments_of(shapes) == 4096 // 8 + 4096
    assert memory.aliased == 4096 // 8 and memory.outputs >= memory.aliased + 4
    assert memory.total == memory.arguments + memory.temporaries + memory.outputs - memory.aliased + memory.code
    assert str(memory).startswith("arguments 4.50 KiB, temporaries ")


def test_sizes_for_people() -> None:
    assert [gib(size) for size in (0, 90, 3 * 2**10, 500 * 2**20, 0.2 * 2**30)] == [
        "0 bytes", "90 bytes", "3.00 KiB", "0.49 GiB", "0.20 GiB",
    ]  # fmt: skip


def test_what_a_tpu_refuses() -> None:
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert required(RuntimeError(message)) == 24 * 2**30
    assert required(RuntimeError("INTERNAL: something else (24.00G)")) is None


@pytest.mark.parametrize(
    ("mode", "arguments", "mesh", "changes", "setting"),
    [
        ("train", 6, (1, 4, 1), {}, "--config.mesh.expert=2"),
        ("train", 6, (2, 3, 1), {}, "--config.mesh.expert=3"),
        ("train", 6, (2, 2, 1), {}, "--config.mesh.fsdp=2, a part"),
        ("sample", 6, (6, 1, 1), {}, "--config.mesh.fsdp=2 on a larger slice"),
        ("train", 1, (1, 4, 1), dict(remat="none"), "--config.train.remat=fused"),
        ("train", 1, (1, 4, 1), {}, "--config.train.accumulate=2"),
        ("train", 1, (1, 4, 1), dict(accumulate=2), "--config.train.accumulate=4"),
        ("train", 1, (1, 8, 2), {}, "--config.mesh.fsdp=4, or smaller data.size"),
        ("sample", 1, (1, 2, 1), {}, "--config.sample.batch=6"),
        ("sample", 1, (1, 6, 2), {}, "smaller sample.size"),
    ],
)
def test_the_setting_that_is_advised(mode: str, arguments: int, mesh: Any, changes: Any, setting: str) -> None:
    """By what takes most of ten units: weights go over more devices, temporaries are computed again or in parts."""
    train = dict(remat="fused", accumulate=1, batch=16) | changes
    config = ConfigDict(dict(train=train, sample=dict(batch=12)))
    axes = dict(zip(("expert", "data", "fsdp"), mesh, strict=True))
    assert setting in knob(mode, config, axes, 6, arguments=arguments, total=10)
