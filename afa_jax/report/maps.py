"""Maps as pictures: each expert has a colour, each pixel the mixture of the experts trusted there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLOURS = np.asarray(
    # Okabe and Ito's palette: told apart by colour-blind readers too.
    [(230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)],
    np.float32,
)


def paint(maps: np.ndarray) -> np.ndarray:
    """Maps ``[n, h, w]`` that sum to one -> uint8 ``[h, w, 3]``."""
    colours = COLOURS[np.arange(len(maps)) % len(COLOURS)]
    return np.einsum("nhw,nc->hwc", maps, colours).round().clip(0, 255).astype(np.uint8)


def contact_sheet(
    maps: Sequence[np.ndarray], names: Sequence[str], timesteps: Sequence[int], *, columns: int = 8, row: int = 32
) -> Image.Image:
    """Every site's maps over the timesteps of one picture.

    Args:
        maps: by site ``[steps, n, h, w]``.
        names: of the sites.
        timesteps: training timestep of each step, descending.
        columns: how many timesteps are shown, evenly spread, first and last among them.
        row: height of a row in pixels.
    """
    shown = np.unique(np.linspace(0, len(timesteps) - 1, min(columns, len(timesteps))).round().astype(int))
    width = max(1, round(row * maps[0].shape[3] / maps[0].shape[2]))
    label, gap, head = 8 * max(map(len, names)), 3, 16
    sheet = Image.new("RGB", (label + len(shown) * (width + gap), head + len(maps) * (row + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, step in enumerate(shown):
        draw.text((label + column * (width + gap), 2), f"t={timesteps[step]}", fill="black")
    for index, (name, site) in enumerate(zip(names, maps, strict=True)):
        top = head + index * (row + gap)
        draw.text((2, top + row // 2 - 6), name, fill="black")
        for column, step in enumerate(shown):
            tile = Image.fromarray(paint(site[step])).resize((width, row), Image.Resampling.NEAREST)
            sheet.paste(tile, (label + column * (width + gap), top))
    return sheet


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """(expert, CSS colour) in the experts' order."""
    return [(name, "rgb({:.0f},{:.0f},{:.0f})".format(*COLOURS[i % len(COLOURS)])) for i, name in enumerate(names)]
