"""Self-contained HTML pages: pictures embedded, no scripts from elsewhere, open from disk."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .6rem; text-align: left; vertical-align: middle; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr:nth-child(even) { background: #f6f6f6; } img { image-rendering: pixelated; display: block; max-width: 100%; }
.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; border-radius: 2px; }
.note { color: #666; } .wide { overflow-x: auto; }
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from (heading, HTML) sections; the first heading may be empty."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" if heading else content for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def image(picture: Image.Image | np.ndarray, alt: str, *, scale: int = 1) -> str:
    """A picture as an ``<img>`` with its data inside, shown ``scale`` times as large."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    width, height = picture.width * scale, picture.height * scale
    return f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{encoded}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table whose cells are HTML already; the columns in ``numbers`` are right-aligned."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"number" if i in numbers else ""}">{c}</td>' for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def round_numbers(low: float | int, high: float | int, about: int = 5) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, around ``about`` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (760, 260),
) -> str:
    """Lines as SVG.

    Args:
        series: (name, CSS colour, points).
        size: (width, height) in pixels.
    """
    points = [point for _, _, line in series for point in line]
    if not points:
        return '<p class="note">no data</p>'
    (width, height), left, bottom = size, 64, 36
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - 8), 8 + (y1 - y) / (y1 - y0) * (height - bottom - 8)

    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="'
        + " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        + f'"><title>{html.escape(name)}</title></polyline>'
        for name, colour, line in series
    )
    ticks = "".join(
        f'<text x="{left - 6}" y="{place(x0, y)[1] + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        f'<line x1="{left}" x2="{width - 8}" y1="{place(x0, y)[1]:.1f}" y2="{place(x0, y)[1]:.1f}" stroke="#ddd"/>'
        for y in round_numbers(y0, y1)
    ) + "".join(
        f'<text x="{place(x, y0)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:.4g}</text>'
        for x in round_numbers(x0, x1)
    )
    names = "".join(
        f'<span class="swatch" style="background:{colour}"></span>{html.escape(name)}' for name, colour, _ in series
    )
    return (
        f'<svg width="{width}" height="{height}" font-size="11" font-family="sans-serif">{ticks}{lines}'
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
        f"</svg><p>{names}</p>"
    )
