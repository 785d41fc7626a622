"""Maps as pictures: each expert has a colour, and a pixel is the experts' colours mixed by their weights."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = np.asarray(
    # Okabe and Ito's palette: told apart by colour-blind readers too.
    [(230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)],
    np.float32,
)
_GREY = (110, 110, 110)
_LINE = 20  # pixels, of a legend
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def paint(maps: np.ndarray) -> np.ndarray:
    """Blend the experts' colours by maps ``[n, h, w]`` that sum to one; return uint8 ``[h, w, 3]``."""
    colours = COLOURS[np.arange(len(maps)) % len(COLOURS)]
    return np.einsum("nhw,nc->hwc", maps, colours).round().clip(0, 255).astype(np.uint8)


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (expert, CSS colour) pairs in the experts' order."""
    return [(name, f"#{bytes(COLOURS[i % len(COLOURS)].astype(np.uint8)).hex()}") for i, name in enumerate(names)]


def mean_maps(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Average maps ``[..., n, h, w]`` over the sites, enlarged to the largest site: ``[..., n, rows, columns]``."""
    rows, columns = (max(site.shape[axis] for site in maps) for axis in (-2, -1))
    total = np.zeros((*maps[0].shape[:-2], rows, columns), np.float32)
    for site in maps:
        down, across = (np.arange(size) * site.shape[-2 + i] // size for i, size in enumerate((rows, columns)))
        total += site[..., down[:, None], across]
    return total / len(maps)


def most_varied(maps: Sequence[np.ndarray]) -> int:
    """Return the index of the site whose maps ``[steps, n, h, w]`` have the largest mean variance over the pixels."""
    return int(np.argmax([site.var((2, 3)).mean() for site in maps]))


def contact_sheet(
    maps: Sequence[np.ndarray],
    names: Sequence[str],
    timesteps: Sequence[int],
    *,
    columns: int = 8,
    row: int = 32,
    path: np.ndarray | None = None,
    experts: Sequence[str] = (),
) -> Image.Image:
    """Draw every site's maps over the timesteps of one picture.

    Args:
        maps: each site's maps, ``[steps, n, h, w]``.
        names: the sites' names.
        timesteps: training timestep of each step, descending.
        columns: the number of timesteps shown, evenly spread, including the first and the last.
        row: height of a row in pixels.
        path: the clean picture that each step implies, uint8 ``[steps, rows, columns, 3]``, for a row on top.
        experts: names of the n experts, for a legend.
    """
    shown = np.unique(np.linspace(0, len(timesteps) - 1, min(columns, len(timesteps))).round().astype(int))
    rows = [] if path is None else [("picture so far", [path[step] for step in shown])]
    rows += [("mean over the sites", [paint(m) for m in mean_maps([site[shown] for site in maps])])]
    rows += [(name, [paint(site[step]) for step in shown]) for name, site in zip(names, maps, strict=True)]
    font = ImageFont.load_default(12)
    width = max(1, round(row * maps[0].shape[3] / maps[0].shape[2]))
    cell = max(width, round(font.getlength("t=999")) + 4)
    left, gap = 12 + round(max(font.getlength(name) for name, _ in rows)), 4
    wide = left + len(shown) * (cell + gap)
    places = _key_places(experts, wide - 6, font)
    head = 20 + _height(places)
    sheet = Image.new("RGB", (wide, head + len(rows) * (row + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    _keys(draw, experts, places, (6, 3), font)
    for column, step in enumerate(shown):
        draw.text((left + column * (cell + gap), head - 17), f"t={timesteps[step]}", fill="black", font=font)
    for index, (name, tiles) in enumerate(rows):
        top = head + index * (row + gap)
        draw.text((left - 6, top + row // 2), name, fill="black", font=font, anchor="rm")
        for column, tile in enumerate(tiles):
            sheet.paste(_enlarged(tile, (width, row)), (left + column * (cell + gap), top))
    return sheet


def frames(
    maps: Sequence[np.ndarray],
    names: Sequence[str],
    timesteps: Sequence[int],
    path: np.ndarray,
    experts: Sequence[str],
    prompt: str,
    *,
    width: int = 340,
) -> list[Image.Image]:
    """Draw one frame per step with the picture so far and the experts' weights at each place.

    The first row has the clean picture that the step's prediction implies, and the mean of all sites' maps. The second
    row has the maps of the first, the middle and the last site, and of the site whose maps vary most over the pixels.
    Below are the experts with their mean weights.

    Args:
        maps, names, timesteps, path, experts: as in contact_sheet.
        prompt: the title of each frame.
        width: width of the picture in pixels.
    """
    large, small = ImageFont.load_default(14), ImageFont.load_default(12)
    edge, gap, label = 10, 8, 18
    height = round(width * path.shape[1] / path.shape[2])
    total = 2 * width + gap
    part = (total - 3 * gap) // 4
    quarter = part, round(height * part / width)
    title, places = _wrapped(prompt, total, large), _key_places([f"{name} 100 %" for name in experts], total, small)
    head = edge + 19 * len(title)
    first, second = head + 26 + label, head + 26 + label + height + gap + label
    bottom = second + quarter[1] + gap
    size = (2 * edge + total, bottom + _height(places) + edge)
    average, chosen = mean_maps(maps), (0, len(maps) // 2, len(maps) - 1, most_varied(maps))
    made = []
    for step, t in enumerate(timesteps):
        frame = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(frame)
        draw.multiline_text((edge, edge - 2), "\n".join(title), fill="black", font=large, spacing=3)
        draw.text((edge, head + 2), f"step {step + 1} of {len(timesteps)}, t = {t}", fill=_GREY, font=small)
        done = edge + round(total * (step + 1) / len(timesteps))
        draw.rectangle((edge, head + 20, edge + total - 1, head + 22), fill=(225, 225, 225))
        draw.rectangle((edge, head + 20, done - 1, head + 22), fill=_GREY)
        tiles = [
            ("picture so far", path[step], (edge, first), (width, height)),
            (f"trusted, mean of {len(maps)} sites", paint(average[step]), (edge + width + gap, first), (width, height)),
        ]
        for place, index in enumerate(chosen):
            corner = (edge + place * (part + gap), second)
            tiles.append((names[index], paint(maps[index][step]), corner, quarter))
        for text, pixels, (x, y), shape in tiles:
            draw.text((x, y - label + 2), text, fill=_GREY, font=small)
            frame.paste(_enlarged(pixels, shape), (x, y))
        weights = average[step].mean((1, 2))
        texts = [f"{name} {100 * weight:.0f} %" for name, weight in zip(experts, weights, strict=True)]
        _keys(draw, texts, places, (edge, bottom + 4), small)
        made.append(frame)
    return made


def with_legend(picture: Image.Image, experts: Sequence[str]) -> Image.Image:
    """Return the picture with a legend of the experts' colours below it."""
    font = ImageFont.load_default(12)
    places = _key_places(experts, picture.width - 12, font)
    whole = Image.new("RGB", (picture.width, picture.height + _height(places) + 6), "white")
    whole.paste(picture, (0, 0))
    _keys(ImageDraw.Draw(whole), experts, places, (6, picture.height + 4), font)
    return whole


def animation(made: Sequence[Image.Image], *, seconds: float = 6.0) -> bytes:
    """Encode frames as a lossless WebP that runs for ``seconds``, rests on the last frame and begins again."""
    each = max(40, round(1000 * seconds / len(made)))
    data = io.BytesIO()
    durations = [each] * (len(made) - 1) + [each + 2000]
    made[0].save(data, format="WEBP", save_all=True, append_images=made[1:], duration=durations, loop=0, lossless=True)
    return data.getvalue()


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Resize a tile to (width, height); when enlarged, its pixels stay visible."""
    tile = Image.fromarray(pixels)
    larger = size[0] >= tile.width
    return tile.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _wrapped(text: str, room: int, font: Font) -> list[str]:
    """Wrap a text into lines no wider than ``room`` pixels."""
    lines = [text]
    for letters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, letters)
        if all(font.getlength(line) <= room for line in lines):
            break
    return lines


def _key_places(texts: Sequence[str], room: int, font: Font) -> list[tuple[int, int]]:
    """Return the (x, y) of each key of a legend; lines are no wider than ``room`` pixels unless one key alone is."""
    places, x, y = [], 0, 0
    for text in texts:
        wide = 16 + round(font.getlength(text))
        if x and x + wide > room:
            x, y = 0, y + _LINE
        places.append((x, y))
        x += wide + 14
    return places


def _height(places: Sequence[tuple[int, int]]) -> int:
    return places[-1][1] + _LINE if places else 0


def _keys(
    draw: ImageDraw.ImageDraw, texts: Sequence[str], places: Sequence[tuple[int, int]], at: tuple[int, int], font: Font
) -> None:
    for index, (text, place) in enumerate(zip(texts, places, strict=True)):
        x, y = at[0] + place[0], at[1] + place[1]
        colour = tuple(int(c) for c in COLOURS[index % len(COLOURS)])
        draw.rectangle((x, y + 1, x + 11, y + 12), fill=colour)
        draw.text((x + 16, y), text, fill="black", font=font)
