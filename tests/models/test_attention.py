"""Attention's implementations against one another; the kernels of other backends in interpretation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from afa_jax.models.attention import BLOCK, _choose, attend


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
    assert chosen(jnp.bfloat16, 40) == "xla"  # several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(jnp.bfloat16, 40) == "splash"
    assert [chosen(jnp.bfloat16, 40, length=77), chosen(jnp.bfloat16, 64, causal=True)] == ["xla"] * 2


def test_they_say_what_they_cannot_do() -> None:
    x = jnp.ones((1, 77, 1, 8))
    with pytest.raises(ValueError, match="multiples of 128"):
        attend(x, x, x, implementation="splash")
    with pytest.raises(ValueError, match=f"multiples of {BLOCK} queries, not 77"):
        attend(x, x, x, implementation="blocks")
