"""Pictures as CLIP networks take them, by Pillow's bicubic filter, which smooths when it shrinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def cropped(picture: np.ndarray, size: int, whole: Callable[[float], int] = round) -> np.ndarray:
    """The short side becomes ``size``, and the middle of the long one is kept: what CLIP, and most after it, do.

    Where the middle is between two pixels, torchvision takes one by ``round``, transformers by ``math.floor``.
    """
    rows, columns = picture.shape[:2]
    short = min(rows, columns)
    resized = _resize(picture, int(size * rows / short), int(size * columns / short))
    top, left = (whole((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def padded(picture: np.ndarray, size: int) -> Float[np.ndarray, "size size 3"]:
    """The long side becomes ``size``, and black is put around the short one: what HPSv2 does.

    Unlike ``cropped`` it does not round the colours, of 0..255, nor keep them in it.
    """
    scale = size / max(picture.shape[:2])
    resized = resize_colours(picture, *(round(side * scale) for side in picture.shape[:2]))
    missing = [size - side for side in resized.shape[:2]]
    return np.pad(resized, (*((m // 2, m - m // 2) for m in missing), (0, 0)))


def resize_colours(picture: np.ndarray, rows: int, columns: int) -> Float[np.ndarray, "rows columns 3"]:
    """Each colour of a uint8 picture resized in float32, which may pass 0 and 255."""
    colours = [Image.fromarray(picture[..., i].astype(np.float32)) for i in range(3)]
    return np.stack([np.asarray(x.resize((columns, rows), Image.Resampling.BICUBIC)) for x in colours], -1)


def to_pixels(squares: Sequence[np.ndarray]) -> Float[np.ndarray, "b 3 rows columns"]:
    """Squares of one size, colours in 0..255, normalised by CLIP's mean and deviation of each colour."""
    values = np.stack(squares).astype(np.float32) / 255
    return np.ascontiguousarray(((values - MEAN) / STD).transpose(0, 3, 1, 2))


def _resize(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if picture.shape[:2] == (rows, columns):
        return picture
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
