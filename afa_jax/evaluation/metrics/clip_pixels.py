"""Preprocessing of pictures for CLIP networks, by Pillow's antialiased bicubic filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def cropped(picture: np.ndarray, size: int, whole: Callable[[float], int] = round) -> np.ndarray:
    """Resize the short side to ``size`` and crop the centre of the long one, as CLIP and most later models do.

    ``whole`` rounds a centre between two pixels: torchvision takes ``round``, transformers ``math.floor``.
    """
    rows, columns = picture.shape[:2]
    short = min(rows, columns)
    resized = _resize(picture, int(size * rows / short), int(size * columns / short))
    top, left = (whole((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def padded(picture: np.ndarray, size: int) -> Float[np.ndarray, "size size 3"]:
    """Resize the long side to ``size`` and pad the short one with black, as HPSv2 does.

    Unlike ``cropped``, it neither rounds the colours nor clips them to 0..255.
    """
    scale = size / max(picture.shape[:2])
    resized = resize_colours(picture, *(round(side * scale) for side in picture.shape[:2]))
    missing = [size - side for side in resized.shape[:2]]
    return np.pad(resized, (*((m // 2, m - m // 2) for m in missing), (0, 0)))


def resize_colours(picture: np.ndarray, rows: int, columns: int) -> Float[np.ndarray, "rows columns 3"]:
    """Resize each colour of a uint8 picture in float32; the results may lie outside 0..255."""
    colours = [Image.fromarray(picture[..., i].astype(np.float32)) for i in range(3)]
    return np.stack([np.asarray(x.resize((columns, rows), Image.Resampling.BICUBIC)) for x in colours], -1)


def to_pixels(squares: Sequence[np.ndarray]) -> Float[np.ndarray, "b 3 rows columns"]:
    """Normalise squares of one size, colours in 0..255, by CLIP's mean and standard deviation of each colour."""
    values = np.stack(squares).astype(np.float32) / 255
    return np.ascontiguousarray(((values - MEAN) / STD).transpose(0, 3, 1, 2))


def _resize(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if picture.shape[:2] == (rows, columns):
        return picture
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
