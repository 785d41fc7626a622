"""Pictures side by side, with labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scale: int = 2,
    gap: int = 6,
) -> Image.Image:
    """Rows of pictures uint8 ``[h, w, 3]``, each ``scale`` times as large as its row's first one, on white.

    Args:
        row_labels: left of the rows; a comma begins a new line.
        column_labels: above the columns.
    """
    height, width = (side * scale for side in rows[0][0].shape[:2])
    left, head = 6 + 7 * max(len(part.strip()) for label in row_labels for part in label.split(",")), 20
    font = ImageFont.load_default(13)
    size = (left + len(column_labels) * (width + gap), head + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + gap) + 2, 3), label, fill="black", font=font)
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = head + row * (height + gap)
        lines = [part.strip() for part in label.split(",")]
        draw.multiline_text((3, top + height // 2 - 8 * len(lines)), "\n".join(lines), fill="black", font=font)
        for column, pixels in enumerate(pictures):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (width + gap), top))
    return sheet
