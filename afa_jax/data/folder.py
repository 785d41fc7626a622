"""A folder of pictures with captions, as a random-access source."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from afa_jax.errors import InputError


class CaptionedFolder:
    """Pictures named by ``captions.jsonl``, one ``{"file_name": ..., "text": ...}`` a line.

    Every picture is opened and decoded once at the start, so that a damaged one shows before the run and not hours
    into it. A picture is resized by its short side and cropped at random, a pure function of (seed, index).

    Args:
        size: (rows, columns) of the crop.
        skip_unreadable: leave damaged pictures out, with a warning that names them, instead of stopping.

    Raises:
        InputError: the folder or its captions are missing or malformed, or a picture cannot be read.
    """

    def __init__(self, path: str, *, size: tuple[int, int], seed: int = 0, skip_unreadable: bool = False):
        self.folder, self.size, self.seed = Path(path), tuple(size), seed
        captions = self.folder / "captions.jsonl"
        if not captions.is_file():
            raise InputError(f"{captions}: no such file; it names each picture: {{'file_name': ..., 'text': ...}}")
        self.items: list[tuple[Path, str]] = []
        damaged: list[str] = []
        for number, line in enumerate(captions.read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                picture, text = self.folder / entry["file_name"], str(entry["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{captions}, line {number}: expected file_name and text ({error!r})") from error
            try:
                with Image.open(picture) as image:
                    image.draft("RGB", (64, 64))  # JPEG decodes faster when it may be small
                    image.load()
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
                if not skip_unreadable:
                    raise InputError(
                        f"{picture}: not a readable picture ({error}); mend it or set data.skip_unreadable"
                    ) from error
                damaged.append(picture.name)
                continue
            self.items.append((picture, text))
        if damaged:
            warnings.warn(
                f"{self.folder}: left out {len(damaged)} unreadable pictures: {', '.join(damaged)}", stacklevel=2
            )
        if not self.items:
            raise InputError(f"{captions} names no readable picture")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"CaptionedFolder({str(self.folder)!r}, size={self.size}, seed={self.seed}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 ``[rows, columns, 3]`` and ``caption``."""
        path, caption = self.items[index]
        with Image.open(path) as image:
            picture = image.convert("RGB")
        rows, columns = self.size
        scale = max(rows / picture.height, columns / picture.width)
        picture = picture.resize(
            (max(columns, round(picture.width * scale)), max(rows, round(picture.height * scale))),
            Image.Resampling.LANCZOS,
        )
        random = np.random.default_rng((self.seed, index))
        top = int(random.integers(picture.height - rows + 1))
        left = int(random.integers(picture.width - columns + 1))
        return dict(image=np.asarray(picture)[top : top + rows, left : left + columns], caption=caption)
