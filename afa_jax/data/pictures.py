"""PNG files with and without recipes, and grids of pictures."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from afa_jax.data.decode import open_image
from afa_jax.errors import BadExample, InputError
from afa_jax.files import partial_file
from afa_jax.records import recorded

OWN_PIXELS = 178_000_000  # the most pixels of a picture that this project made; grids are larger than training pictures


def grid(pictures: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Return rows of equally large pictures ``[h, w, 3]`` as one picture, on white."""
    height, width = pictures[0][0].shape[:2]
    rows, columns = len(pictures), max(len(row) for row in pictures)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            canvas[y : y + height, x : x + width] = picture
    return canvas


def save_png(path: Path, pixels: np.ndarray, recipe: Mapping[str, object]) -> None:
    """Write a picture with its recipe (text chunk "afa_jax", JSON), at once or not at all; processes do not meet.

    Raises:
        InputError: as recorded, which can be asked for before the picture is made.
    """
    info = PngInfo()
    info.add_itxt("afa_jax", json.dumps(recorded(recipe, "the recipe")))
    with partial_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=info)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture without a recipe as PNG, at once or not at all."""
    with partial_file(path) as partial:
        picture.save(partial, format="PNG", optimize=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture that this project made, as a whole.

    Raises:
        InputError: it is no picture, damaged, or has more than OWN_PIXELS.
    """
    try:
        picture = open_image(path, max_pixels=OWN_PIXELS)
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error) as error:
        reason = error.reason if isinstance(error, BadExample) else error
        raise InputError(f"{path}: a picture that cannot be read ({reason}); remove it, and make it again") from error
    with picture:
        yield picture


def read_png(path: Path) -> np.ndarray:
    """Return a picture of ours as uint8 ``[rows, columns, 3]``; raise InputError as ``opened``."""
    with opened(path) as picture:
        return np.asarray(picture.convert("RGB"))


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the recipe in a picture of ours, empty if it has none; raise InputError as ``opened``."""
    with opened(path) as picture:
        text = picture.info.get("afa_jax")
    try:
        recipe = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        recipe = {}
    return recipe if isinstance(recipe, dict) else {}
