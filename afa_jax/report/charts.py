"""Charts as SVG: lines, points, differences, heat maps. They need no script and no font from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from afa_jax.report.labels import LETTER, labels_beside, shortened

NO_DATA = '<p class="note">no data</p>'
_FOREST = 240  # pixels, the least room for the differences themselves


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


def round_numbers(low: float | int, high: float | int, about: int = 5) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, around ``about`` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def round_powers(low: float | int, high: float | int) -> list[float]:
    """Where a logarithmic axis is labelled: 1, 2 and 5 times the powers of ten, on a short one all their multiples."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 5), range(1, 10)):
        numbers = [factor * 10.0**power for power in powers for factor in factors]
        found = [number for number in numbers if low * (1 - 1e-9) <= number <= high * (1 + 1e-9)]
        if len(found) > 3:
            break
    return found


class Axes:
    """The frame of a chart around some points: where a number lies, and the labels.

    Args:
        size: (width, height) in pixels.
        log_x: the horizontal axis is logarithmic; every x must be above 0.
        margin: part of each axis that is left free at both ends, for marks and labels.
    """

    def __init__(
        self,
        xs: Sequence[float | int],
        ys: Sequence[float | int],
        size: tuple[int, int],
        *,
        log_x: bool = False,
        margin: float = 0.0,
    ):
        (self.width, self.height), self.left, self.right, self.top, self.bottom = size, 64, 8, 8, 36
        self.log_x = log_x
        self._x, self._y = (_widened(values, margin) for values in ([self._scale(x) for x in xs], ys))

    def x(self, x: float | int) -> float:
        """Pixels from the left edge."""
        low, high = self._x
        return self.left + (self._scale(x) - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, y: float | int) -> float:
        """Pixels from the upper edge."""
        low, high = self._y
        return self.top + (high - y) / (high - low) * (self.height - self.top - self.bottom)

    def draw(self, content: str, x_label: str, y_label: str) -> str:
        """The chart with this content."""
        low, high = self._x
        numbers = round_powers(10**low, 10**high) if self.log_x else round_numbers(low, high)
        right, base = self.width - self.right, self.height - self.bottom
        ticks = "".join(
            _text(self.left - 6, self.y(y) + 4, f"{_clean(y):.4g}", "end")
            + f'<line x1="{self.left}" x2="{right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}" stroke="#ddd"/>'
            for y in round_numbers(*self._y)
        ) + "".join(
            f'<line x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" y1="{base}" y2="{base + 4}" stroke="#999"/>'
            + _text(self.x(x), base + 17, f"{_clean(x):.4g}", "middle")
            for x in numbers
        )
        labels = _text((self.left + right) / 2, self.height - 3, x_label, "middle") + (
            f'<text transform="translate(12 {base / 2:.0f}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(y_label)}</text>"
        )
        return svg((self.width, self.height), ticks + content + labels)

    def _scale(self, x: float | int) -> float:
        return math.log10(x) if self.log_x else float(x)


def svg(size: tuple[int, int], content: str) -> str:
    """A drawing that shrinks with the window as far as its labels can be read."""
    width, height = size
    return (
        f'<div class="wide"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'style="min-width:{min(width, 440)}px" font-size="11" font-family="system-ui, sans-serif">{content}'
        "</svg></div>"
    )


def swatch(name: str, colour: str) -> str:
    """A colour and what it stands for."""
    return f'<span class="key"><span class="swatch" style="background:{colour}"></span>{html.escape(name)}</span>'


def points_of(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of a run's metrics that have this one."""
    return [(float(line["step"]), line[key]) for line in lines if key in line]


def line_chart(
    series: Sequence[tuple[str, str, Sequence[tuple[Any, ...]]]],
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (760, 260),
    log_x: bool = False,
    points: bool = False,
) -> str:
    """Lines.

    Args:
        series: (name, CSS colour, points); a point is (x, y), or (x, y, low, high) with the interval of y, or a Mark.
        log_x: logarithmic horizontal axis.
        points: mark the points and their intervals too.
    """
    lines = [(name, colour, [Mark(*point) for point in line]) for name, colour, line in series]
    every = [mark for _, _, line in lines for mark in line]
    if not every:
        return NO_DATA
    axes = Axes([m.x for m in every], _reach(every), size, log_x=log_x, margin=0.03 if points else 0.0)
    drawn = ""
    for name, colour, line in lines:
        path = " ".join(f"{axes.x(mark.x):.1f},{axes.y(mark.y):.1f}" for mark in line)
        drawn += f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}">{_title(name)}</polyline>'
        drawn += "".join(_dot(axes, mark, colour, f"{name}: {_said(mark)}") for mark in line if points)
    names = "".join(swatch(name, colour) for name, colour, _ in lines)
    return axes.draw(drawn, x_label, y_label) + f'<p class="keys">{names}</p>'


def scatter_chart(
    named: Sequence[tuple[str, str, Mark]],
    *,
    x_label: str,
    y_label: str,
    width: int = 640,
    log_x: bool = False,
    shown: Collection[str] | None = None,
) -> str:
    """Points with their names; the more names there are, the higher the chart, so that they have room.

    Args:
        named: (name, CSS colour, point).
        log_x: logarithmic horizontal axis.
        shown: whose names and intervals are drawn; a pointer on one of the other points, small and pale, says them.
    """
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
    return axes.draw(pale + dots + labels, x_label, y_label)


def forest_chart(rows: Sequence[Row], *, label: str, width: int = 760) -> str:
    """Differences with their intervals, a line each in the order given, around a line at zero.

    Args:
        label: of the axis.
        width: in pixels, or more where names and notes leave the differences no room.
    """
    if not rows:
        return NO_DATA
    height, head = 22, 6
    left, right = (
        round(LETTER * max(len(text) for text in texts)) + 14
        for texts in zip(*((shortened(row.name), row.note) for row in rows), strict=True)
    )
    width = max(width, left + right + _FOREST)
    base = head + height * len(rows)
    low, high = _widened([0.0, *(v for row in rows for v in (row.value, row.low, row.high) if v is not None)], 0.04)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    drawn = "".join(
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{head}" y2="{base}" stroke="{"#ddd" if _clean(v) else "#555"}"/>'
        + _text(x(v), base + 16, f"{v:+.4g}" if _clean(v) else "0", "middle")
        for v in round_numbers(low, high)
    )
    for index, row in enumerate(rows):
        y = head + height * (index + 0.5)
        drawn += _text(left - 10, y + 4, shortened(row.name), "end", row.name)
        drawn += _text(width - right + 10, y + 4, row.note, "start")
        if row.low is not None and row.high is not None:
            ends = f'x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            drawn += f'<line {ends} stroke="{row.colour}" stroke-width="2"/>'
        said = _title(f"{row.name}: {row.note}")
        drawn += f'<circle cx="{x(row.value):.1f}" cy="{y:.1f}" r="4.5" fill="{row.colour}">{said}</circle>'
    return svg((width, base + 38), drawn + _text((left + width - right) / 2, base + 33, label, "middle"))


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
    """A field of cells from white, at the lower end of ``span``, to ``colour``, at its upper end.

    Args:
        values: ``[rows, columns]``.
        colour: red, green, blue from 0 to 255.
        size: (width, height) of a cell in pixels.
    """
    wide, high = size
    left, head = round(LETTER * max(map(len, rows))) + 12, 4
    parts = np.clip((values - span[0]) / (span[1] - span[0]), 0, 1)
    shades = (255 + parts[..., None] * (np.asarray(colour, np.float64) - 255)).round().astype(int)
    drawn = "".join(_text(left - 6, head + high * (i + 0.75), name, "end") for i, name in enumerate(rows))
    for (i, j), value in np.ndenumerate(values):
        fill = "#{:02x}{:02x}{:02x}".format(*shades[i, j])
        said = _title(f"{rows[i]}, {columns[j]}: {value:.3f}")
        corner = f'x="{left + wide * j}" y="{head + high * i}"'
        drawn += f'<rect {corner} width="{wide}" height="{high}" fill="{fill}">{said}</rect>'
    base, right = head + high * len(rows), left + wide * len(columns)
    drawn += f'<rect x="{left}" y="{head}" width="{right - left}" height="{base - head}" fill="none" stroke="#999"/>'
    # As many labels as have room, the last of them where it is.
    every = max(1, math.ceil((LETTER * max(map(len, columns)) + 10) / wide))
    shown = [j for j in range(len(columns)) if j % every == 0 and len(columns) - 1 - j >= every] + [len(columns) - 1]
    drawn += "".join(_text(left + wide * (j + 0.5), base + 14, columns[j], "middle") for j in shown)
    width = max(right + round(LETTER * len(columns[-1]) / 2), left + round(LETTER * len(x_label)))
    return svg((width + 4, base + 34), drawn + _text(left, base + 30, x_label, "start"))


def _dot(axes: Axes, mark: Mark, colour: str, said: str, radius: float = 3.0) -> str:
    x, y = axes.x(mark.x), axes.y(mark.y)
    whisker = ""
    if mark.low is not None and mark.high is not None:
        ends = f'y1="{axes.y(mark.low):.1f}" y2="{axes.y(mark.high):.1f}"'
        whisker = f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}" stroke-opacity=".55" stroke-width="1.4"/>'
    return whisker + f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{_title(said)}</circle>'


def _said(mark: Mark) -> str:
    interval = "" if mark.low is None or mark.high is None else f" ({mark.low:.4g} to {mark.high:.4g})"
    return f"{mark.y:.4g}{interval} at {mark.x:.4g}"


def _reach(marks: Sequence[Mark]) -> list[float]:
    return [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]


def _widened(values: Sequence[float | int], margin: float) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    if not high > low:
        high = low + 1
    return low - margin * (high - low), high + margin * (high - low)


def _clean(value: float) -> float:
    """Without what is left of sums of tenths: 0.30000000000000004 - 0.3 is no tick."""
    return 0.0 if abs(value) < 1e-12 else value


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _text(x: float | int, y: float | int, text: str, anchor: str, whole: str = "") -> str:
    more = _title(whole) if whole != text and whole else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}{more}</text>'


def legend_keys(colours: Mapping[str, str]) -> str:
    """A line of swatches: name -> CSS colour."""
    return f'<p class="keys">{"".join(swatch(name, colour) for name, colour in colours.items())}</p>'
