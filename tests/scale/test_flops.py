"""Operations of compiled programs against formulas, and against XLA's own count where there is no loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from afa_jax.scale.flops import Flops, flops


def compiled(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_products_in_loops() -> None:
    def body(x: Any, kernel: Any) -> Any:
        return jnp.sin(x @ kernel), None

    program = compiled(lambda x, kernels: jax.lax.scan(body, x, kernels)[0], (8, 16), (5, 16, 16))
    assert flops(program.as_text()) == Flops(products=5 * 2 * 8 * 16 * 16, exact=True, unknown=())
    batched = compiled(lambda x, y: jnp.einsum("bik,bkj->bij", x, y), (3, 4, 5), (3, 5, 6))
    assert flops(batched.as_text()).products == 2 * 3 * 4 * 5 * 6


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "SAME", 1), (2, [(1, 1), (0, 1)], 1), (1, "VALID", 2)])
def test_convolutions_as_xla_counts_them(stride: int, padding: Any, dilation: int) -> None:
    """Forward and both gradients, which have the dilation and the padding."""

    def convolve(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    shapes = (2, 12, 10, 6), (3, 3, 6, 5)
    forward = compiled(convolve, *shapes)
    assert flops(forward.as_text()).products == forward.cost_analysis()["flops"]
    gradient = compiled(jax.grad(lambda *args: convolve(*args).sum(), (0, 1)), *shapes)
    products, theirs = flops(gradient.as_text()).products, gradient.cost_analysis()["flops"]
    assert products <= theirs <= 1.01 * products


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("name", ["splash_mha_fwd_residuals.3", "other.3"])
def test_kernels(name: str, rows: int) -> None:
    """Attention of 8 heads, 128 queries and 256 keys of width 40 on a TPU; other kernels are named."""
    first, order = ("4,", "3,2,1,0") if rows > 1 else ("", "2,1,0")  # the compiler drops an axis of one row
    text = f"""HloModule m

ENTRY %main (q: bf16[{first}8,128,40], k: bf16[{first}8,256,40]) -> bf16[{first}8,128,40] {{
  %mask = s8[1,8,8]{{2,1,0}} constant({{...}})
  %q = bf16[{first}8,128,40]{{{order}:T(8,128)(2,1)}} parameter(0)
  %k = bf16[{first}8,256,40]{{{order}:T(8,128)(2,1)}} parameter(1)
  ROOT %{name} = bf16[{first}8,128,40]{{{order}}} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
}}
"""
    expected = 4 * rows * 8 * 128 * 256 * 40 if name.startswith("splash") else 0
    assert flops(text) == Flops(products=expected, exact=True, unknown=() if expected else (name,))
