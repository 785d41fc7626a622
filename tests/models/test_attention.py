"""Attention's implementations against one another; the kernels of other backends in interpretation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from afa_jax.mesh.collectives import ROWS, on_mesh
from afa_jax.mesh.parallel import make_mesh
from afa_jax.models.attention import BLOCK, _choose, attend

MESH, SPLIT = make_mesh(dict(data=8, fsdp=1, expert=1)), PartitionSpec(ROWS)


@pytest.mark.parametrize(("implementation", "length"), [("splash", 128), ("blocks", 2 * BLOCK)])
def test_other_implementations_are_attention(implementation: str, length: int) -> None:
    """Values and gradients, at a head width that is not a multiple of the kernel's lanes."""
    shape = (2, length, 2, 40)
    query, key, value = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    weights = jax.random.normal(jax.random.key(3), shape)

    def both(implementation: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(*qkv, implementation=implementation)  # type: ignore[arg-type]
            return (out * weights).sum(), out

        gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(query, key, value)
        return out, gradients

    (out, gradients), (expected, expected_gradients) = both(implementation), both("xla")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-4 * float(jnp.abs(reference).max()))


def test_the_backend_and_the_shapes_choose_the_implementation(monkeypatch):
    def chosen(dtype: DTypeLike, width: int, length: int = 128, causal: bool = False) -> str:
        x = jnp.zeros((1, length, 2, width), dtype)
        return _choose(x, x, causal)

    assert chosen(jnp.bfloat16, 64) == "xla"
    assert [chosen(jnp.float32, 8, length=n) for n in (1024, 2048, 2100)] == ["xla", "blocks", "xla"]
    assert chosen(jnp.float32, 8, length=2048, causal=True) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(jnp.bfloat16, 40) == "cudnn"
    # The VAE's one head, the lowest levels of SD1.5, and float32 are beyond cuDNN's kernels.
    assert [chosen(jnp.bfloat16, 512), chosen(jnp.bfloat16, 160), chosen(jnp.float32, 40)] == ["xla"] * 3
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    # The compiler cannot partition a kernel over several devices; where a program is each device's own, it need not.
    assert [chosen(jnp.bfloat16, 40), chosen(jnp.bfloat16, 40, length=4096)] == ["xla", "blocks"]
    within: list[str] = []
    on_mesh(lambda: within.append(chosen(jnp.bfloat16, 40)), MESH, (), SPLIT)()
    assert within == ["splash"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(jnp.bfloat16, 40) == "splash"
    assert [chosen(jnp.bfloat16, 40, length=77), chosen(jnp.bfloat16, 64, causal=True)] == ["xla"] * 2


@pytest.mark.parametrize("gradients", [False, True])
def test_the_kernel_runs_on_a_mesh(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    """Within a loop over experts and with stages computed again, as in training; the values within one device's."""
    query = jax.random.normal(jax.random.key(0), (8, 128, 2, 40))
    text = jax.random.normal(jax.random.key(1), (128, 2, 40))  # the same on all devices: its gradient is a sum

    def one(scale: jax.Array, query: jax.Array, text: jax.Array) -> jax.Array:
        return attend(scale * query, *[jnp.broadcast_to(text, query.shape)] * 2, implementation="splash")

    def forward(query: jax.Array, text: jax.Array) -> jax.Array:
        return jax.lax.map(lambda scale: jax.checkpoint(one)(scale, query, text), jnp.arange(2.0)).sum(0)

    if not gradients:
        program = jax.jit(on_mesh(forward, MESH, (SPLIT, PartitionSpec()), SPLIT))
        np.testing.assert_allclose(program(query, text), jax.jit(forward)(query, text), atol=1e-5)
        return

    def backward(query: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda *both: jnp.sin(forward(*both)).sum(), (0, 1))(query, text)

    # An interpreted kernel cannot run where gradients are checked, so this one is only compiled to where it can.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    program = jax.jit(on_mesh(backward, MESH, (SPLIT, PartitionSpec()), (SPLIT, PartitionSpec()), gradients=True))
    lowered = program.trace(query, text).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") >= 3 and "all_reduce" in lowered


def test_they_say_what_they_cannot_do() -> None:
    x = jnp.ones((1, 77, 1, 8))
    with pytest.raises(ValueError, match="multiples of 128"):
        attend(x, x, x, implementation="splash")
    with pytest.raises(ValueError, match=f"multiples of {BLOCK} queries, not 77"):
        attend(x, x, x, implementation="blocks")
