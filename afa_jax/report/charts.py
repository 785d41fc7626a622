"""Charts as SVG: lines, points, differences, heat maps. They need no script and no font from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from afa_jax.report.axes import Axes, drawable, round_numbers, span_of, svg, svg_text, svg_title, tick_labels
from afa_jax.report.escape import escape
from afa_jax.report.labels import LETTER, labels_beside, shortened

NO_DATA = '<p class="note">no data</p>'
_FOREST = 240  # pixels, the least room for the differences themselves
_NOT_FINITE = "#999999"  # of a cell


class Mark(NamedTuple):
    """A point of a chart and the interval of its y, if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Row(NamedTuple):
    """A line of a forest chart: a difference with its interval, and what stands at its right."""

    name: str
    colour: str
    value: float
    low: float | None
    high: float | None
    note: str


def swatch(name: str, colour: str) -> str:
    """A colour and what it stands for."""
    return f'<span class="key"><span class="swatch" style="background:{colour}"></span>{escape(name)}</span>'


def points_of(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the lines of a run's metrics that have this one; NaN for what is no number."""
    found = [(line["step"], line[key]) for line in lines if key in line and drawable(line.get("step"))]
    return [(float(step), float(value) if drawable(value) else math.nan) for step, value in found]


def line_chart(
    series: Sequence[tuple[str, str, Sequence[tuple[Any, ...]]]],
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (760, 260),
    log_x: bool = False,
    points: bool = False,
) -> str:
    """Draw lines, with a gap where a point is not finite; a point between gaps is a dot.

    Args:
        series: (name, CSS colour, points); a point is (x, y), or (x, y, low, high) with the interval of y, or a Mark.
        log_x: logarithmic horizontal axis.
        points: mark the points and their intervals too.
    """
    lines = [(name, colour, [Mark(*point) for point in line]) for name, colour, line in series]
    pieces = [(name, colour, list(_pieces(line, log_x))) for name, colour, line in lines]
    every = [mark for _, _, own in pieces for piece in own for mark in piece]
    if not every:
        return NO_DATA
    axes = Axes([m.x for m in every], _reach(every), size, log_x=log_x, margin=0.03 if points else 0.0)
    drawn = ""
    for name, colour, own in pieces:
        for piece in own:
            if len(piece) > 1:
                path = " ".join(f"{axes.x(mark.x):.1f},{axes.y(mark.y):.1f}" for mark in piece)
                drawn += f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}">'
                drawn += f"{svg_title(name)}</polyline>"
            if points or len(piece) == 1:
                drawn += "".join(_dot(axes, mark, colour, f"{name}: {_said(mark)}") for mark in piece)
    names = "".join(swatch(name, colour) for name, colour, _ in lines)
    left_out = _left_out(sum(len(line) for _, _, line in lines) - len(every))
    return axes.draw(drawn, x_label, y_label) + f'<p class="keys">{names}</p>{left_out}'


def _pieces(line: Sequence[Mark], log_x: bool) -> Iterator[list[Mark]]:
    """Yield the parts of a line between the points that have no place on the axes."""
    piece: list[Mark] = []
    for mark in line:
        if drawable(mark.x, log=log_x) and drawable(mark.y):
            piece.append(mark)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _left_out(count: int) -> str:
    """Return the line that says how many values are not in a chart."""
    return f'<p class="note">Left out: {count} that {"is" if count == 1 else "are"} not finite.</p>' if count else ""


def scatter_chart(
    named: Sequence[tuple[str, str, Mark]],
    *,
    x_label: str,
    y_label: str,
    width: int = 640,
    log_x: bool = False,
    shown: Collection[str] | None = None,
) -> str:
    """Draw points with their names; the more names there are, the higher the chart, so that they have room.

    Args:
        named: (name, CSS colour, point).
        log_x: logarithmic horizontal axis.
        shown: whose names and intervals are drawn; a pointer on one of the other points, small and pale, says them.
    """
    whole, named = named, [row for row in named if drawable(row[2].x, log=log_x) and drawable(row[2].y)]
    if not named:
        return NO_DATA
    chosen = [row for row in named if shown is None or row[0] in shown]
    marks, places = [mark for _, _, mark in named], []
    size = (width, min(720, 300 + 10 * len(chosen)))
    drawn = [row[2] if row in chosen else Mark(row[2].x, row[2].y) for row in named]
    axes = Axes([mark.x for mark in marks], _reach(drawn), size, log_x=log_x, margin=0.08)
    pale, dots = "", ""
    for (name, colour, mark), short in zip(named, drawn, strict=True):
        said = f"{name}: {_said(mark)}"
        if short is mark:
            dots += _dot(axes, mark, colour, said, 4.5)
            places.append((axes.x(mark.x), axes.y(mark.y)))
        else:
            pale += f'<g opacity=".55">{_dot(axes, short, colour, said, 3.5)}</g>'
    labels = labels_beside([shortened(name) for name, _, _ in chosen], places, (axes.left, axes.top, *size))
    return axes.draw(pale + dots + labels, x_label, y_label) + _left_out(len(whole) - len(named))


def forest_chart(rows: Sequence[Row], *, label: str, width: int = 760) -> str:
    """Draw differences with their intervals, a line each in the order given, around a line at zero.

    Args:
        label: of the axis.
        width: in pixels, or more where names and notes leave the differences no room.
    """
    every, rows = rows, [row for row in rows if drawable(row.value)]
    if not rows:
        return NO_DATA
    height, head = 22, 6
    left, right = (
        round(LETTER * max(len(text) for text in texts)) + 14
        for texts in zip(*((shortened(row.name), row.note) for row in rows), strict=True)
    )
    width = max(width, left + right + _FOREST)
    base = head + height * len(rows)
    low, high = span_of([0.0, *(v for row in rows for v in (row.value, row.low, row.high) if drawable(v))], 0.04)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    numbers = round_numbers(low, high)
    drawn = "".join(
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{head}" y2="{base}" stroke="{"#ddd" if v else "#555"}"/>'
        + svg_text(x(v), base + 16, tick, "middle")
        for v, tick in zip(numbers, tick_labels(numbers, sign=True), strict=True)
    )
    for index, row in enumerate(rows):
        y = head + height * (index + 0.5)
        drawn += svg_text(left - 10, y + 4, shortened(row.name), "end", row.name)
        drawn += svg_text(width - right + 10, y + 4, row.note, "start")
        if drawable(row.low) and drawable(row.high):
            ends = f'x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            drawn += f'<line {ends} stroke="{row.colour}" stroke-width="2"/>'
        said = svg_title(f"{row.name}: {row.note}")
        drawn += f'<circle cx="{x(row.value):.1f}" cy="{y:.1f}" r="4.5" fill="{row.colour}">{said}</circle>'
    chart = svg((width, base + 38), drawn + svg_text((left + width - right) / 2, base + 33, label, "middle"))
    return chart + _left_out(len(every) - len(rows))


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colour: Sequence[float | int],
    *,
    x_label: str,
    span: tuple[float, float] = (0.0, 1.0),
    size: tuple[int, int] = (14, 15),
) -> str:
    """Draw a field of cells from white, at the lower end of ``span``, to ``colour``, at its upper end.

    A value that is not finite has a grey cell.

    Args:
        values: ``[rows, columns]``.
        colour: red, green, blue from 0 to 255.
        size: (width, height) of a cell in pixels.
    """
    if not values.size:
        return NO_DATA
    wide, high = size
    left, head = round(LETTER * max(map(len, rows))) + 12, 4
    finite = np.isfinite(values)
    parts = np.clip((np.where(finite, values, span[0]) - span[0]) / (span[1] - span[0]), 0, 1)
    shades = (255 + parts[..., None] * (np.asarray(colour, np.float64) - 255)).round().astype(int)
    drawn = "".join(svg_text(left - 6, head + high * (i + 0.75), name, "end") for i, name in enumerate(rows))
    for (i, j), value in np.ndenumerate(values):
        fill = "#{:02x}{:02x}{:02x}".format(*shades[i, j]) if finite[i, j] else _NOT_FINITE
        said = svg_title(f"{rows[i]}, {columns[j]}: {value:.3f}")
        corner = f'x="{left + wide * j}" y="{head + high * i}"'
        drawn += f'<rect {corner} width="{wide}" height="{high}" fill="{fill}">{said}</rect>'
    base, right = head + high * len(rows), left + wide * len(columns)
    drawn += f'<rect x="{left}" y="{head}" width="{right - left}" height="{base - head}" fill="none" stroke="#999"/>'
    # As many labels as have room, the last of them where it is.
    every = max(1, math.ceil((LETTER * max(map(len, columns)) + 10) / wide))
    shown = [j for j in range(len(columns)) if j % every == 0 and len(columns) - 1 - j >= every] + [len(columns) - 1]
    drawn += "".join(svg_text(left + wide * (j + 0.5), base + 14, columns[j], "middle") for j in shown)
    width = max(right + round(LETTER * len(columns[-1]) / 2), left + round(LETTER * len(x_label)))
    return svg((width + 4, base + 34), drawn + svg_text(left, base + 30, x_label, "start"))


def _dot(axes: Axes, mark: Mark, colour: str, said: str, radius: float = 3.0) -> str:
    x, y = axes.x(mark.x), axes.y(mark.y)
    whisker = ""
    if drawable(mark.low) and drawable(mark.high):
        ends = f'y1="{axes.y(mark.low):.1f}" y2="{axes.y(mark.high):.1f}"'
        whisker = f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}" stroke-opacity=".55" stroke-width="1.4"/>'
    return whisker + f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{svg_title(said)}</circle>'


def _said(mark: Mark) -> str:
    interval = f" ({mark.low:.6g} to {mark.high:.6g})" if drawable(mark.low) and drawable(mark.high) else ""
    return f"{mark.y:.6g}{interval} at {mark.x:.6g}"


def _reach(marks: Sequence[Mark]) -> list[float]:
    return [value for mark in marks for value in (mark.y, mark.low, mark.high) if drawable(value)]


def legend_keys(colours: Mapping[str, str]) -> str:
    """A line of swatches: name -> CSS colour."""
    return f'<p class="keys">{"".join(swatch(name, colour) for name, colour in colours.items())}</p>'
