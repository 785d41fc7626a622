"""Labelled pictures side by side in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LETTER, _LINE = 7, 16  # the labels' font size in pixels
_LABEL = 30  # letters of a row's label in a line
_LINES = 8  # the most lines of a label


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scale: int = 2,
    gap: int = 6,
) -> Image.Image:
    """Draw rows of pictures uint8 ``[h, w, 3]``, each ``scale`` times as large as the first one, on white.

    Args:
        rows: at least one picture; None leaves a gap.
        row_labels: left of the rows; a comma begins a new line.
        column_labels: above the columns; of a long one, the beginning.
    """
    first = next(picture for pictures in rows for picture in pictures if picture is not None)
    height, width = (side * scale for side in first.shape[:2])
    beside = [
        [line for part in label.split(",") for line in _wrapped(part, _LABEL)][: height // _LINE + 1]
        for label in row_labels
    ]
    above = [_wrapped(label, max(8, width // _LETTER)) for label in column_labels]
    left = 6 + _LETTER * max((len(line) for lines in beside for line in lines), default=0)
    head = 4 + _LINE * max(map(len, above), default=0)
    font = ImageFont.load_default(13)
    size = (left + len(column_labels) * (width + gap), head + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(above):
        draw.multiline_text(
            (left + column * (width + gap) + 2, 3), "\n".join(lines), fill="black", font=font, spacing=2
        )
    for row, (pictures, lines) in enumerate(zip(rows, beside, strict=True)):
        top = head + row * (height + gap)
        draw.multiline_text((3, top + height // 2 - 8 * len(lines)), "\n".join(lines), fill="black", font=font)
        for column, pixels in enumerate(pictures):
            if pixels is not None:
                tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + column * (width + gap), top))
    return sheet


def _wrapped(label: str, letters: int) -> list[str]:
    """Return the lines of a label, at most _LINES; characters that cannot be shown become spaces."""
    shown = "".join(c if c.isprintable() else " " for c in label[: letters * _LINES * 2])
    return textwrap.wrap(shown.strip(), letters, max_lines=_LINES, placeholder=" ...")
