"""The one table between our parameters and the keys of a checkpoint.

A parameter's place in a module and its key in a diffusers or transformers state dict differ in three ways only: the
U-Net's stages (diffusers nests layers in blocks), the name of the last component (``kernel``, ``scale`` and
``embedding`` are all ``weight`` in PyTorch) and the layout of kernels (HWIO and ``[in, out]`` against OIHW and
``[out, in]``). Each is written down here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Key = Callable[[str], str]

_PYTORCH_NAME = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The names of the VAE's attention layers in diffusers before 0.15 -> since then."""
_STAGE_KEYS = tuple(
    (re.compile(pattern), key)
    for pattern, key in (
        (r"conv_in\.conv_in\.", r"conv_in."),
        (r"conv_out\.(conv_norm_out|conv_out)\.", r"\1."),
        (r"mid_block\.", r"mid_block."),
        (r"(\w+\.\d+)\.layers\.(\d+)\.(resnet|attention)\.", r"\1.\3s.\2."),
        (r"(up_blocks\.\d+)\.layers\.\d+\.upsampler\.", r"\1.upsamplers.0."),
        (r"(down_blocks\.\d+)\.downsampler\.downsampler\.", r"\1.downsamplers.0."),
    )
)


def unet_key(stage_names: list[str], layer_name: str) -> Key:
    """Return the key function of a U-Net.

    Args:
        stage_names: names of its stages, in order.
        layer_name: name of the up layer that the last stage contains.
    """

    def key(path: str) -> str:
        path = pytorch_name(path)
        head, _, rest = path.partition(".")
        if head != "stages":
            return path
        index, _, rest = rest.partition(".")
        name = stage_names[int(index)]
        if name == "conv_out" and rest.startswith("layer."):
            name, rest = layer_name, rest.removeprefix("layer.")
        full = f"{name}.{rest}"
        for pattern, replacement in _STAGE_KEYS:
            if pattern.match(full):
                return pattern.sub(replacement, full, count=1)
        raise KeyError(f"no key for the parameter {full!r}")

    return key


def text_key(path: str) -> str:
    """Return the key of a text encoder's parameter in a diffusers folder."""
    return "text_model." + pytorch_name(path)


def without_pixels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a 1x1 convolution's shape as a linear layer's; old files have such in the VAE's attention."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def pytorch_name(path: str) -> str:
    """Return the path with its last component as PyTorch calls it."""
    head, dot, last = path.rpartition(".")
    return head + dot + _PYTORCH_NAME[last]


def to_pytorch(path: str, array: np.ndarray) -> np.ndarray:
    """Turn an array from our layout into PyTorch's."""
    if path.endswith("kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def from_pytorch(path: str, array: np.ndarray) -> np.ndarray:
    """Convert an array from PyTorch's layout to ours."""
    if path.endswith("kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def shape_in_pytorch(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a parameter of ours has in a checkpoint."""
    if path.endswith("kernel"):
        return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
    return shape
