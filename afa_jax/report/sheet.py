"""Pictures side by side, with labels, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LETTER, _LINE = 7, 16  # pixels, of the labels
_LABEL = 30  # letters of a row's label in a line, but for longer words


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scale: int = 2,
    gap: int = 6,
) -> Image.Image:
    """Rows of pictures uint8 ``[h, w, 3]``, each ``scale`` times as large as the first one, on white.

    Args:
        rows: at least one; None leaves a gap.
        row_labels: left of the rows; a comma begins a new line.
        column_labels: above the columns.
    """
    first = next(picture for pictures in rows for picture in pictures if picture is not None)
    height, width = (side * scale for side in first.shape[:2])
    beside = [
        [line for part in label.split(",") for line in textwrap.wrap(part.strip(), _LABEL)] for label in row_labels
    ]
    above = [textwrap.wrap(label, max(1, width // _LETTER)) for label in column_labels]
    left, head = 6 + _LETTER * max(len(line) for lines in beside for line in lines), 4 + _LINE * max(map(len, above))
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
