"""Crop and resize of pictures to the training size."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from afa_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Crop:
    """Resize (Lanczos) so that the picture just covers ``size``, crop to it at random, and mirror at random.

    Args:
        size: (rows, columns) in pixels.
        flip: mirror left and right with probability 1/2.

    Raises:
        InputError: ``size`` is no size in pixels.
    """

    size: tuple[int, int]
    flip: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise InputError(f"data.size={self.size}: choose (rows, columns)")

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Resize, crop and perhaps mirror uint8 ``[h, w, 3]`` to uint8 ``[rows, columns, 3]``."""
        rows, columns = self.size
        height, width = image.shape[:2]
        scale = max(rows / height, columns / width)
        height, width = max(rows, round(height * scale)), max(columns, round(width * scale))
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        top, left = int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1))
        mirror = self.flip and random.random() < 0.5
        cut = resized[top : top + rows, left : left + columns]
        return np.ascontiguousarray(cut[:, ::-1] if mirror else cut)
