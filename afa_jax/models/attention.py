"""Attention, computed in one place, and the transformer blocks of the U-Net and of SABW."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike

from afa_jax.models.layers import Conv, GroupNorm, Identity, LayerNorm, Linear, alike, gelu
from afa_jax.target import device_count, platform

Implementation = Literal["xla", "blocks", "cudnn", "splash"]

CUDNN_HEAD = 128  # the widest head that cuDNN's flash attention takes on every GPU since Ampere
SPLASH_BLOCK = 128  # the kernel's smallest tile; a sequence must be a multiple of it
BLOCK = 512  # queries at a time if there are many logits
MANY_LOGITS = 2**22  # the least logits of a head for which blocks are faster on a CPU (benchmarks/attention.py)


def attend(
    query: Array, key: Array, value: Array, *, causal: bool = False, implementation: Implementation | None = None
) -> Array:
    """Compute scaled dot-product attention, ``[b, s, heads, d]`` each; logits and softmax in float32.

    Without ``implementation`` it is chosen by platform and shapes:

    * On a GPU, cuDNN's flash attention in half precision and for heads of at most CUDNN_HEAD channels, which is all it
      supports (the VAE's one head is wider, as are those of SD1.5's lowest levels).
    * On a TPU, splash for sequences that are multiples of its block size, alone or within shard_map (the compiler
      cannot partition a Pallas kernel over devices).
    * "blocks" of queries, one after another, for long sequences on a CPU, and on TPUs over which the compiler
      partitions.
    * XLA everywhere else.

    Raises:
        ValueError: "splash" for a causal mask or for lengths that are not multiples of SPLASH_BLOCK; "blocks" for a
            causal mask or for queries that are not a multiple of BLOCK.
    """
    if query.dtype == jnp.float16 and platform() == "cpu":
        # XLA's CPU backend has no float16 product with float32 accumulation.
        wide = (x.astype(jnp.float32) for x in (query, key, value))
        return attend(*wide, causal=causal, implementation=implementation).astype(jnp.float16)
    if implementation is None:
        implementation = _choose(query, key, causal)
    if implementation == "splash":
        lengths = query.shape[1], key.shape[1]
        if causal or any(n % SPLASH_BLOCK for n in lengths):
            raise ValueError(
                f"splash attention here is without a mask and for lengths that are multiples of {SPLASH_BLOCK}, "
                f"not {lengths}, causal={causal}"
            )
        return _splash(query, key, value)
    if implementation == "blocks":
        return _blocks(query, key, value, causal)
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation=implementation)


def _choose(query: Array, key: Array, causal: bool) -> Implementation:
    backend = platform()
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= CUDNN_HEAD:
        return "cudnn"
    lengths = query.shape[1], key.shape[1]
    on_one = device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual
    if backend == "tpu" and on_one and not causal and not any(n % SPLASH_BLOCK for n in lengths):
        return "splash"
    many = lengths[0] % BLOCK == 0 and lengths[0] * lengths[1] >= MANY_LOGITS
    if backend in ("cpu", "tpu") and not causal and many:
        return "blocks"
    return "xla"


def _blocks(query: Array, key: Array, value: Array, causal: bool) -> Array:
    """Compute one block of queries after another, again for the gradient, so that memory never holds all logits."""
    batch, length, *rest = query.shape
    if causal or length % BLOCK:
        raise ValueError(f"attention in blocks is without a mask and for multiples of {BLOCK} queries, not {length}")

    @jax.checkpoint
    def one(block: Array) -> Array:
        return jax.nn.dot_product_attention(block, key, value, implementation="xla")

    blocks = jnp.moveaxis(query.reshape(batch, -1, BLOCK, *rest), 1, 0)
    return jnp.moveaxis(jax.lax.map(one, blocks), 0, 1).reshape(query.shape)


def _splash(query: Array, key: Array, value: Array) -> Array:
    library, masks = _splash_library()
    lengths = query.shape[1], key.shape[1]
    block_q, block_kv = (next(size for size in (512, 256, 128) if n % size == 0) for n in lengths)
    blocks = library.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask(lengths)] * query.shape[2])
    kernel = library.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=platform() != "tpu")
    scaled = query * query.shape[-1] ** -0.5
    heads_first = (x.transpose(0, 2, 1, 3) for x in alike(scaled, key, value, everywhere=True))
    return jax.vmap(kernel)(*heads_first).transpose(0, 2, 1, 3)


@functools.cache
def _splash_library() -> tuple[Any, Any]:
    """Return a copy of jax's module of splash kernels in which they run on meshes, and jax's module of masks.

    shard_map's check needs to know, for every kernel, along which of the mesh's axes its results vary; without the
    check gradients would be wrong. jax's splash attention has no way to say so.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    class Pallas:
        def __getattr__(self, name: str) -> Any:
            return getattr(pallas, name)

        @staticmethod
        def pallas_call(kernel: Any, *, out_shape: Any, **more: Any) -> Any:
            axes = ManualAxisType(varying=frozenset(jax.sharding.get_abstract_mesh().manual_axes))
            shapes = jax.tree.map(
                lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=axes), out_shape
            )
            return pallas.pallas_call(kernel, out_shape=shapes, **more)

    spec = importlib.util.find_spec(f"{splash_attention_mask.__package__}.splash_attention_kernel")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["pl"] = Pallas()
    return module, splash_attention_mask


class Attention(nnx.Module):
    """Multi-head attention over tokens ``[b, s, width]``; to itself, or to ``context [b, s', context_width]``."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide {width} channels")
        self.heads = heads
        context_width = context_width or width
        self.to_q = Linear(width, width, bias=bias, rngs=rngs, param_dtype=param_dtype)
        self.to_k = Linear(context_width, width, bias=bias, rngs=rngs, param_dtype=param_dtype)
        self.to_v = Linear(context_width, width, bias=bias, rngs=rngs, param_dtype=param_dtype)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs, param_dtype=param_dtype)])

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attend(query, key, value).reshape(x.shape))


class GEGLU(nnx.Module):
    """``a * gelu(b)`` with exact GELU, where a and b are the halves of one projection."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.proj = Linear(width, 2 * inner, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """GEGLU and a projection back."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.net = nnx.List(
            [
                GEGLU(width, 4 * width, rngs=rngs, param_dtype=param_dtype),
                Identity(),  # the reference's dropout
                Linear(4 * width, width, rngs=rngs, param_dtype=param_dtype),
            ]
        )

    def __call__(self, x: Array) -> Array:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward; each after a layer norm and with a residual.

    ``context_width=None`` leaves out the text: attn2 and norm2 do not exist then.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.norm1 = LayerNorm(width, param_dtype=param_dtype)
        self.attn1 = Attention(width, heads, rngs=rngs, param_dtype=param_dtype)
        if context_width is not None:
            self.norm2 = LayerNorm(width, param_dtype=param_dtype)
            self.attn2 = Attention(width, heads, context_width=context_width, rngs=rngs, param_dtype=param_dtype)
        self.norm3 = LayerNorm(width, param_dtype=param_dtype)
        self.ff = FeedForward(width, rngs=rngs, param_dtype=param_dtype)
        self.has_text = context_width is not None

    def __call__(self, x: Array, context: Array | None) -> Array:
        x = x + self.attn1(self.norm1(x))
        if self.has_text:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Spatial transformer on NHWC features: norm, project in, blocks over the pixels as tokens, project out, residual.

    Args:
        linear_projection: the projections are stored as linear layers (SD2.x), not as 1x1 convolutions (SD1.x).
        zero: start the last projection at zero.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int | None,
        *,
        layers: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
        zero: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        def project(zero: bool) -> Linear | Conv:
            if linear_projection:
                return Linear(channels, channels, zero=zero, rngs=rngs, param_dtype=param_dtype)
            return Conv(channels, channels, 1, zero=zero, rngs=rngs, param_dtype=param_dtype)

        self.norm = GroupNorm(groups, channels, eps=1e-6, param_dtype=param_dtype)
        self.proj_in = project(False)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(channels, heads, context_width, rngs=rngs, param_dtype=param_dtype)
                for _ in range(layers)
            ]
        )
        self.proj_out = project(zero)

    def __call__(self, x: Array, context: Array | None) -> Array:
        # A 1x1 convolution acts on each pixel alone, so both kinds of projection run before the pixels become tokens.
        y = self.proj_in(self.norm(x))
        tokens = y.reshape(y.shape[0], -1, y.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))
