"""The leaves of every network: linear, convolution, norms, embedding.

Parameters follow Flax's names and layouts (``kernel`` ``[in, out]`` or HWIO, ``scale``, ``bias``, ``embedding``).
A layer computes in the dtype of its input: parameters are cast to it on use, norms always reduce in float32. The
compute dtype of a network is therefore chosen once, where the network casts its inputs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from afa_jax.mesh.collectives import varying_axes
from afa_jax.target import platform

# XLA's CPU convolution is slow on small maps: with 32 samples of 2 x 4 x 288 it reached 2 GFLOP/s where one matrix
# product of the neighbourhoods reached 50 (benchmarks/conv.py). Up to this many output positions we use the product.
SMALL_MAP = 16


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default initialisation of PyTorch's layers."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


_shapes_only = contextvars.ContextVar("_shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Make layers within this context with shapes and dtypes in place of arrays, which is faster than to trace them."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _parameter(make: Callable[[], Array], shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """Return a parameter that ``make`` initialises."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype) if _shapes_only.get() else make())


def _constant(value: int, features: int, dtype: DTypeLike) -> nnx.Param:
    return _parameter(lambda: jnp.full((features,), value, dtype), (features,), dtype)


def _kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike, zero: bool) -> nnx.Param:
    if zero:
        return _parameter(lambda: jnp.zeros(shape, dtype), shape, dtype)
    fan_in = math.prod(shape[:-1])
    return _parameter(lambda: uniform_fan_in(rngs.params(), shape, fan_in, dtype), shape, dtype)


class Linear(nnx.Module):
    """``x @ kernel + bias`` over the last axis; kernel ``[in_features, out_features]``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        zero: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.kernel = _kernel(rngs, (in_features, out_features), param_dtype, zero)
        self.bias = _constant(0, out_features, param_dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
    """2-D convolution of NHWC features; kernel HWIO ``[size, size, in_channels, out_channels]``.

    Args:
        padding: (before, after) on both spatial axes.
        zero: start at zero, as the last layer of a residual branch does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bias: bool = True,
        zero: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.stride = stride
        self.padding = (size // 2, size // 2) if padding is None else padding
        self.kernel = _kernel(rngs, (size, size, in_channels, out_channels), param_dtype, zero)
        self.bias = _constant(0, out_channels, param_dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        y = conv2d(x, self.kernel[...].astype(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> Array:
    """Convolve ``x [b, h, w, i]`` with ``kernel [k, k, i, o]``; the implementation depends on size and backend."""
    size = kernel.shape[0]
    if size == 1 and stride == 1 and padding == (0, 0):
        # Not kernel[0, 0]: a loop over experts would keep a copy of that of every expert for the gradient.
        return jax.lax.dot_general(x, kernel, (((3,), (2,)), ((), ()))).reshape(*x.shape[:3], kernel.shape[3])
    if platform() != "cpu":
        return _conv2d_xla(x, kernel, stride, padding)
    return _conv2d_cpu(*alike(x, kernel), stride, padding)


def alike(*arrays: Array, everywhere: bool = False) -> tuple[Array, ...]:
    """Mark arrays on a mesh as varying along the same axes, as a custom gradient must vary like its argument.

    ``everywhere``: mark them as varying along every axis of the mesh.
    """
    differ = frozenset(jax.sharding.get_abstract_mesh().manual_axes if everywhere else ())
    differ = differ.union(*map(varying_axes, arrays))
    return tuple(
        jax.lax.pcast(array, tuple(missing), to="varying") if (missing := differ - varying_axes(array)) else array
        for array in arrays
    )


def _conv2d_xla(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _shifted_views(x: Array, size: int, stride: int, padding: tuple[int, int]) -> list[list[Array]]:
    """Return, for each position in the kernel, the pixels it meets, as ``[b * height * width, channels]``."""
    rows, columns = ((n + sum(padding) - size) // stride * stride + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    return [
        [padded[:, i : i + rows : stride, j : j + columns : stride].reshape(-1, x.shape[-1]) for j in range(size)]
        for i in range(size)
    ]


def _output_size(x: Array, size: int, stride: int, padding: tuple[int, int]) -> tuple[int, int]:
    height, width = ((n + sum(padding) - size) // stride + 1 for n in x.shape[1:3])
    return height, width


def _conv2d_columns(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Convolve by one matrix product of the pixels' neighbourhoods, ``[b * height * width, k * k * i]``."""
    size, channels = kernel.shape[0], kernel.shape[-1]
    columns = jnp.concatenate([view for row in _shifted_views(x, size, stride, padding) for view in row], -1)
    y = columns @ kernel.reshape(-1, channels)
    return y.reshape(x.shape[0], *_output_size(x, size, stride, padding), channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d_cpu(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Convolve by _conv2d_columns on small maps and by XLA on others; with our own gradients.

    XLA's kernel gradient is the slow part of training on a CPU. Its input gradient inside a loop, as in map_experts'
    scan, misses the fast convolution and ran up to 15 times slower than the matrix product (benchmarks/conv.py). The
    gradient keeps the kernel in its original form; of any other form a loop over experts would keep a copy of each.
    """
    convolve = _conv2d_columns if _is_small(x, kernel, stride, padding) else _conv2d_xla
    return convolve(x, kernel, stride, padding)


def _is_small(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> bool:
    return math.prod(_output_size(x, kernel.shape[0], stride, padding)) <= SMALL_MAP


def _conv2d_cpu_forward(
    x: Array, kernel: Array, stride: int, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _conv2d_cpu(x, kernel, stride, padding), (x, kernel)


def _conv2d_cpu_backward(
    stride: int, padding: tuple[int, int], residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: _conv2d_columns(x, kernel, stride, padding), x)(dy)
    if _is_small(x, kernel, stride, padding):
        (dkernel,) = jax.linear_transpose(lambda kernel: _conv2d_columns(x, kernel, stride, padding), kernel)(dy)
        return dx, dkernel
    rows = dy.reshape(-1, dy.shape[-1])
    views = [[view.T @ rows for view in row] for row in _shifted_views(x, kernel.shape[0], stride, padding)]
    return dx, jnp.stack([jnp.stack(row) for row in views])


_conv2d_cpu.defvjp(_conv2d_cpu_forward, _conv2d_cpu_backward)


class GroupNorm(nnx.Module):
    """Group normalisation over space and each group of channels, reduced in float32."""

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5, param_dtype: DTypeLike = jnp.float32):
        if channels % groups:
            raise ValueError(f"norm_num_groups {groups} does not divide {channels} channels")
        self.groups, self.eps = groups, eps
        self.scale = _constant(1, channels, param_dtype)
        self.bias = _constant(0, channels, param_dtype)

    def __call__(self, x: Array) -> Array:
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, reduced in float32."""

    def __init__(self, features: int, *, eps: float = 1e-5, param_dtype: DTypeLike = jnp.float32):
        self.eps = eps
        self.scale = _constant(1, features, param_dtype)
        self.bias = _constant(0, features, param_dtype)

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table ``[entries, features]`` looked up by integer ids."""

    def __init__(self, entries: int, features: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        # 0.02 is CLIP's initializer_range.
        shape = entries, features
        self.embedding = _parameter(
            lambda: 0.02 * jax.random.normal(rngs.params(), shape, param_dtype), shape, param_dtype
        )

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids]


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Apply the exact Gaussian error linear unit, ``x * Phi(x)`` (Hendrycks & Gimpel 2016), in float32 as PyTorch does.

    It uses erf. ``jax.nn.gelu`` uses erfc, whose accuracy in the tails is not needed here, and is slower on a CPU
    (docs/speed.md). The derivative is written out because jax 0.12 cannot differentiate erf or erfc on a mesh: their
    polynomials refuse constants beside an array that is split over devices.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y = x.astype(jnp.float32)
    below, density = _normal_cdf(y), math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * jnp.square(y))
    return (y * below).astype(x.dtype), ((below + y * density) * dx).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(math.sqrt(0.5) * x))


class Identity(nnx.Module):
    """A layer that returns its input; it fills a place in a list, so that indices equal the reference's."""

    def __call__(self, x: Array) -> Array:
        return x


def timestep_embedding(t: Array, width: int, *, flip_sin_to_cos: bool = True, shift: float = 0.0) -> Array:
    """Return sinusoids of timesteps, ``[b] -> [b, width]``, in float32 (Ho et al. 2020; Stable Diffusion's order)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, -1)
