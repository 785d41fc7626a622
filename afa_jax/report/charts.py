"""Charts by matplotlib as SVG inside a page: lines, points, differences; no script, and no font from elsewhere.

matplotlib is imported when a chart is drawn. A mark's tooltip is drawn as the mark's link, which is then renamed.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
from markupsafe import Markup

from afa_jax.errors import printable
from afa_jax.report.pages import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST, SMALLEST = 1e200, 1e-200
"""The largest and the least magnitude in a chart; sums and products of such numbers do not overflow."""
_LONGEST = 60  # letters of a name in a chart
_LETTER = 6.6  # pixels, about the width of a letter
_FOREST = 240  # pixels, the least width of the differences
_GREY = "#bbbbbb"
_STYLE = {
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a page's reader has it or a narrower one
    "text.parse_math": False,  # a name with two dollars is a name
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,  # 0.9999 and 1, not 0 and 1 with "+0.9999" in a corner
    "axes.formatter.limits": (-4, 7),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "afa_jax",  # the same chart has the same bytes
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_INLINE = (  # parts that an <svg> inside a page does not need, and urls that are texts
    (r' xmlns(:xlink)?="[^"]*"| version="1.1"|(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"', ""),
    (r"font-size: 11px; font-family: 'DejaVu Sans', sans-serif;? ?", ""),  # the page's, as wide at the most
    (r'(width|height)="([\d.]+)pt"', r'\1="\2"'),
    (r"""<a xlink:href=(["'])(.*?)\1[^>]*>""", r"<g><title>\2</title>"),
    (r"</a>", "</g>"),
    (r"\s*\n\s*", "\n"),
)


class Mark(NamedTuple):
    """A point of a chart and the interval of its y, if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Row(NamedTuple):
    """A line of a forest chart: a difference with its interval, and the text at its right."""

    name: str
    colour: str
    value: float
    low: float | None
    high: float | None
    note: str


def drawable(value: Any, *, log: bool = False) -> TypeGuard[float]:
    """Return whether an axis has a place for this: a finite number, on a logarithmic axis a positive one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return SMALLEST <= value <= LARGEST if log else abs(value) <= LARGEST


def points_of(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) for the lines of a run's metrics that have this value; NaN if it is no number."""
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
) -> Markup:
    """Draw lines, with a gap where a point is not finite; a point between gaps is a dot.

    Args:
        series: (name, CSS colour, points); a point is (x, y), or (x, y, low, high) with the interval of y, or a Mark.
        log_x: logarithmic horizontal axis.
        points: mark the points and their intervals too.
    """
    lines = [(name, colour, [Mark(*point) for point in line]) for name, colour, line in series]
    placed = [[_has_place(mark, log_x) for mark in line] for _, _, line in lines]

    def draw(axes: Axes) -> None:
        for (name, colour, line), there in zip(lines, placed, strict=True):
            xy = [(mark.x, mark.y) if is_there else (math.nan,) * 2 for mark, is_there in zip(line, there, strict=True)]
            axes.plot(*np.reshape(xy, (-1, 2)).T, color=colour, url=printable(name))
            beside = zip([False, *there], there, [*there[1:], False], strict=False)
            dots = [own and (points or not (left or right)) for left, own, right in beside]
            _dots(axes, [(name, colour, mark) for mark in itertools.compress(line, dots)], 18)
        axes.set(xlabel=printable(x_label), ylabel=printable(y_label))
        axes.grid(axis="y")
        axes.margins(x=0.03 if points else 0)
        if log_x:
            _logarithmic(
                axes,
                [
                    mark.x
                    for (_, _, line), there in zip(lines, placed, strict=True)
                    for mark in itertools.compress(line, there)
                ],
            )

    there = list(itertools.chain(*placed))
    keys = [(name, colour) for name, colour, _ in lines]
    return _chart(size, draw, keys=keys, left_out=there.count(False)) if any(there) else _chart()


def scatter_chart(
    named: Sequence[tuple[str, str, Mark]],
    *,
    x_label: str,
    y_label: str,
    width: int = 640,
    log_x: bool = False,
    shown: Collection[str] | None = None,
) -> Markup:
    """Draw points with their names at the right; the more names there are, the higher the chart.

    Args:
        named: (name, CSS colour, point).
        log_x: logarithmic horizontal axis.
        shown: the names that are drawn with their intervals; the other points are small and pale, with tooltips.
    """
    there = [row for row in named if _has_place(row[2], log_x)]
    chosen = sorted((row for row in there if shown is None or row[0] in shown), key=lambda row: row[2].y)
    pale = [(name, colour, mark) for name, colour, mark in there if shown is not None and name not in shown]
    height = min(720, 300 + 10 * len(chosen))

    def draw(axes: Axes) -> None:
        _dots(axes, pale, 36, whole=False)
        _dots(axes, chosen, 60)
        axes.set(xlabel=printable(x_label), ylabel=printable(y_label))
        axes.grid(axis="y")
        axes.margins(0.08)
        if log_x:
            _logarithmic(axes, [mark.x for _, _, mark in there])
        places = _apart([axes.transLimits.transform((1, mark.y))[1] for _, _, mark in chosen], 15 / (height - 60))
        for (name, _, mark), place in zip(chosen, places, strict=True):
            line = dict(arrowstyle="-", color=_GREY, linewidth=0.7, shrinkA=0, shrinkB=4)
            axes.annotate(
                _shortened(name),
                (mark.x, mark.y),
                (1.01, place),
                textcoords="axes fraction",
                va="center",
                arrowprops=line,
            )

    return _chart((width, height), draw, left_out=len(named) - len(there)) if there else _chart()


def forest_chart(rows: Sequence[Row], *, label: str, width: int = 760) -> Markup:
    """Draw differences with their intervals, a line each in the order given, around a line at zero.

    Args:
        label: the axis's label.
        width: the width in pixels; wider if names and notes leave no room for the differences.
    """
    there = [row for row in rows if drawable(row.value)]
    names, notes = [_shortened(row.name) for row in there], [printable(row.note) for row in there]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color="#555555", linewidth=1)
        ends = [(y, row.low, row.high, row.colour) for y, row in enumerate(there) if _is_interval(row)]
        if ends:
            ys, low, high, colours = zip(*ends, strict=True)
            axes.hlines(ys, low, high, colors=colours, linewidth=2)
        dots = axes.scatter(
            [row.value for row in there], range(len(there)), 60, [row.colour for row in there], zorder=3
        )
        dots.set_urls([printable(f"{row.name}: {row.note}") for row in there])
        axes.set(xlabel=printable(label), ylim=(len(there) - 0.5, -0.5))
        axes.set_yticks(range(len(there)), names)
        axes.secondary_yaxis("right").set_yticks(range(len(there)), notes)
        for axis in (axes, *axes.child_axes):
            axis.tick_params(axis="y", left=False, right=False)
        for text, row in zip(axes.get_yticklabels(), there, strict=True):
            text.set_url(printable(row.name))
        axes.grid(axis="x")

    if not there:
        return _chart()
    beside = 40 + round(_LETTER * (max(map(len, names)) + max(map(len, notes))))
    size = (max(width, beside + _FOREST), 22 * len(there) + 44)
    return _chart(size, draw, left_out=len(rows) - len(there))


def _chart(
    size: tuple[int, int] | None = None,
    draw: Callable[[Axes], None] | None = None,
    *,
    keys: Sequence[tuple[str, str]] = (),
    left_out: int = 0,
) -> Markup:
    """Return the drawing with its legend and the number of values left out; without a drawing, a note of no data."""
    svg = _svg(size, draw) if size and draw else ""
    return Markup(render("chart.html", svg=Markup(svg), keys=keys, left_out=left_out))


def _svg(size: tuple[int, int], draw: Callable[[Axes], None]) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    text = io.StringIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's reader may have a font for it
        figure = Figure((size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure.subplots())
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for found, becomes in _INLINE:
        svg = re.sub(found, becomes, svg)
    # A hundredth of a pixel is enough.
    return re.sub(r"<(path|use|text) [^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)


def _dots(axes: Axes, named: Sequence[tuple[str, str, Mark]], area: float, *, whole: bool = True) -> None:
    """Draw points with tooltips of name and value; ``whole`` adds their intervals, otherwise they are pale."""
    if not named:
        return
    colours, marks = [colour for _, colour, _ in named], [mark for _, _, mark in named]
    said = [printable(f"{name}: {_said(mark)}") for name, _, mark in named]
    ends = [(mark.x, mark.low, mark.high, colour) for _, colour, mark in named if whole and _is_interval(mark)]
    if ends:
        at, low, high, shades = zip(*ends, strict=True)
        axes.vlines(at, low, high, colors=shades, alpha=0.55, linewidth=1.4)
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    axes.scatter(x, y, area, colours, alpha=None if whole else 0.55, linewidths=0, zorder=3).set_urls(said)


def _logarithmic(axes: Axes, xs: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic: labels at 1, 2 and 5 times powers of ten, over many decades at powers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 1e4 * min(xs) else (1,)))
    axes.xaxis.set_major_formatter("{x:.6g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places between 0 and 1 as little as possible, so that neighbours are ``gap`` apart."""
    up = list(itertools.accumulate(places, lambda below, own: max(below + gap, own)))
    down = itertools.accumulate(up[::-1], lambda above, own: min(above - gap, own), initial=1 + gap)
    return list(down)[:0:-1]


def _has_place(mark: Mark, log_x: bool) -> bool:
    return drawable(mark.x, log=log_x) and drawable(mark.y)


def _is_interval(of: Mark | Row) -> bool:
    return drawable(of.low) and drawable(of.high)


def _shortened(name: str) -> str:
    """Return a name as a chart shows it, cut off with an ellipsis if it is too long."""
    name = printable(name)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1].rstrip() + "…"


def _said(mark: Mark) -> str:
    interval = f" ({mark.low:.6g} to {mark.high:.6g})" if _is_interval(mark) else ""
    return f"{mark.y:.6g}{interval} at {mark.x:.6g}"
