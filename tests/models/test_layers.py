"""Convolution's implementations against XLA's, and the sinusoids of the time embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afa_jax.models import layers
from tests.models.goldens import assert_close, jit


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "padding"),
    [
        (5, 7, 3, 1, (1, 1)),
        (6, 8, 3, 2, (1, 1)),  # the U-Net's downsampling
        (6, 8, 3, 2, (0, 1)),  # the VAE's
        (7, 5, 3, 2, (1, 1)),
        (7, 5, 3, 2, (0, 1)),
        (4, 6, 3, 1, (0, 0)),
        (5, 4, 1, 1, (0, 0)),
        (5, 4, 1, 2, (0, 0)),
        (1, 1, 3, 1, (1, 1)),
        (12, 13, 3, 1, (1, 1)),  # more than SMALL_MAP outputs
        (9, 8, 5, 3, (2, 1)),
    ],
)
def test_all_convolutions_agree(height, width, size, stride, padding):
    """Value and both gradients."""
    implementations = {
        "xla": layers._conv2d_xla,
        "columns": layers._conv2d_columns,
        "cpu": layers._conv2d_cpu,
        "chosen": layers.conv2d,
    }

    @jit
    def value_and_gradients(x, kernel, direction):
        result = {}
        for name, conv in implementations.items():
            y, gradients = jax.vjp(lambda x, kernel, conv=conv: conv(x, kernel, stride, padding), x, kernel)
            result[name] = (y, *gradients(direction[: y.shape[0], : y.shape[1], : y.shape[2]]))
        return result

    x, kernel, direction = (
        jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)
        for i, shape in enumerate([(2, height, width, 3), (size, size, 3, 4), (2, height, width, 4)])
    )
    answers = value_and_gradients(x, kernel, direction)
    expected = answers.pop("xla")
    rows = (height + sum(padding) - size) // stride + 1
    assert expected[0].shape[:2] == (2, rows)
    pairs = {
        f"{name} {part}": (ours, theirs)
        for name, answer in answers.items()
        for part, ours, theirs in zip(("value", "input gradient", "kernel gradient"), answer, expected, strict=True)
    }
    assert_close(5e-6, pairs)


def test_the_size_and_the_backend_choose_the_convolution(monkeypatch):
    used = []

    def spy(name):
        def conv(x, *rest):
            used.append(name)
            return x

        return conv

    for name in ("xla", "columns"):
        monkeypatch.setattr(layers, f"_conv2d_{name}", spy(name))
    kernel = jnp.zeros((3, 3, 2, 2))
    small, large = jnp.zeros((1, 4, 4, 2)), jnp.zeros((9, 8, 8, 2))
    for x, stride in ((small, 1), (large, 1), (large, 2)):
        layers.conv2d(x, kernel, stride)
    assert used == ["columns", "xla", "columns"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(layers, "_conv2d_cpu", spy("cpu"))
    layers.conv2d(small, kernel)
    assert used[3:] == ["xla"]


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(("rows", "size"), [(2, 3), (8, 3), (4, 1)])
def test_the_gradient_of_a_loop_over_experts_keeps_no_copy_of_their_kernels(monkeypatch, backend, rows, size):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    kernels, x = jnp.ones((3, size, size, 5, 7)), jnp.ones((2, rows, rows, 5))

    def total(x, kernels):
        return jnp.sum(jax.lax.map(lambda kernel: layers.conv2d(x, kernel, 1, (size // 2, size // 2)), kernels))

    equations = jax.make_jaxpr(jax.grad(total))(x, kernels).eqns
    loops = [equation for equation in equations if equation.primitive is jax.lax.scan_p]
    assert len(loops) == 2
    kept = [out.size for loop in loops for out in loop.params["jaxpr"].out_avals]
    assert kernels[0].size not in kept


def test_layers_compute_in_the_dtype_of_their_input():
    x = jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.bfloat16)
    for layer in (
        layers.Conv(8, 8, rngs=nnx.Rngs(0)),
        layers.Linear(8, 8, rngs=nnx.Rngs(0)),
        layers.GroupNorm(2, 8),
        layers.LayerNorm(8),
    ):
        assert jax.eval_shape(layer, x).dtype == jnp.bfloat16


def test_norms_reduce_in_float32():
    """Variance of values of 300 and more, squared, is beyond bfloat16's and float16's precision or range."""
    x = (300 + jnp.arange(64.0).reshape(1, 4, 2, 8)).astype(jnp.float16)
    for norm in (layers.GroupNorm(2, 8), layers.LayerNorm(8)):
        assert_close(2e-3, {type(norm).__name__: (norm(x), norm(x.astype(jnp.float32)))})


@pytest.mark.parametrize(("flip", "shift"), [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_timestep_embedding(flip, shift):
    t = np.array([0, 1, 500, 999])
    angles = t[:, None] * 10000.0 ** (-np.arange(4) / (4 - shift))
    parts = [np.cos(angles), np.sin(angles)]
    expected = np.concatenate(parts if flip else parts[::-1], -1)
    ours = layers.timestep_embedding(jnp.asarray(t), 8, flip_sin_to_cos=flip, shift=shift)
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # float32 rounds an angle of 999 by 3e-5
