"""Charts, whatever the numbers and names: labels that are true and told apart, texts that are shown as they are."""

import html
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from afa_jax.errors import printable
from afa_jax.report.charts import Mark, Row, forest_chart, line_chart, points_of, scatter_chart
from afa_jax.report.pages import heat_map

NAN, INF = math.nan, math.inf


def texts_of(chart: str, anchor: str) -> list[str]:
    """The texts at the left of an axis ("end"), below one ("middle") or at the right of a chart ("start")."""
    found = re.findall(rf'<text style="text-anchor: {anchor}"[^>]*>(.*?)</text>', chart)
    return [html.unescape(text) for text in found]


def places_of(chart: str) -> list[tuple[float, float]]:
    """Where the points of a chart are."""
    found = re.findall(r'<use xlink:href="#[^"]*" x="([^"]*)" y="([^"]*)" style="fill: #ff0000', chart)
    return [(float(x), float(y)) for x, y in found]


def line_of(ys: list[float], *, points: bool = False) -> str:
    return line_chart([("a", "red", list(enumerate(ys, 1)))], x_label="", y_label="", points=points)


@pytest.mark.parametrize("ys", [[0.9998, 1.0], [-0.1, 0.3], [0.0, 15000.0], [1e6, 1e6 + 0.001], [0.0, 1e-9]])
def test_labels_are_true_and_told_apart(ys):
    numbers = [float(text) for text in texts_of(line_of(ys), "end")]
    assert len(numbers) > 3 and min(np.diff(numbers)) > 0
    np.testing.assert_allclose(np.diff(numbers), np.diff(numbers)[0], rtol=1e-6)  # as far apart as their places


@pytest.mark.parametrize(
    ("xs", "labels"),
    [
        ((1, 1000), ["1", "2", "5", "10", "20", "50", "100", "200", "500", "1000"]),
        ((0.07, 0.31), ["0.1", "0.2"]),
        ((1000, 1500), ["1000", "1100", "1200", "1300", "1400", "1500"]),
    ],
)
def test_logarithmic_axes_have_round_numbers(xs, labels):
    chart = line_chart([("a", "red", [(x, 1.0) for x in xs])], x_label="", y_label="", log_x=True)
    assert set(labels) <= set(texts_of(chart, "middle"))


def test_a_long_logarithmic_axis_has_powers_of_ten():
    chart = line_chart([("a", "red", [(1e-9, 1.0), (1e9, 1.0)])], x_label="", y_label="", log_x=True)
    powers = np.log10([float(text) for text in texts_of(chart, "middle") if text])
    assert 3 < len(powers) < 15 and (powers == powers.round()).all()


SERIES = {
    "constant": [1.0] * 4,
    "constant zero": [0.0] * 4,
    "constant and large": [1e20] * 4,
    "one point": [0.5],
    "nearly one": [1.0, 0.99995, 0.9999],
    "tiny at a large offset": [1e6, 1e6 + 1e-3, 1e6 + 2e-3],
    "one after rounding": [1.0, 1.0 + 2.3e-16],
    "below zero": [-5.0, -1e-3, -3.0],
    "small": [1e-12, 3e-12],
    "denormal": [5e-324, 1e-310],
    "huge": [-1e199, 1e199],
    "not finite": [1.0, NAN, 3.0, 2.0, INF, -INF, 1e300],
}


XS = ((1, 2, 3, 4, 5, 6, 7), (1000,) * 7, (1e-30, 1e-7, 1, 1e7, 1e30, 1e60, 1e90))


@pytest.mark.parametrize("ys", list(SERIES.values()), ids=list(SERIES))
def test_every_chart_has_labels_that_are_told_apart(ys):
    bad = sum(not abs(y) < 1e200 for y in ys)
    for xs, log_x in zip(XS, (False, True, True), strict=True):
        marks = [Mark(x, y, y - 0.1 * abs(y), y + 0.1 * abs(y)) for x, y in zip(xs, ys, strict=False)]
        charts = [
            line_chart([("a", "red", marks)], x_label="x", y_label="y", log_x=log_x, points=True),
            scatter_chart([("a", "red", mark) for mark in marks], x_label="x", y_label="y", log_x=log_x),
            forest_chart([Row("a", "red", mark.y, mark.low, mark.high, "") for mark in marks], label="d"),
        ]
        for chart in charts:
            assert "nan" not in chart and "inf" not in chart
            for anchor in ("middle", "end"):
                labels = [text for text in texts_of(chart, anchor) if re.fullmatch("[-+.0-9e]+", text)]
                assert len(set(labels)) == len(labels) > (anchor == "middle") - 1
            assert (f"Left out: {bad} that" in chart) == (bad > 0)


def test_a_line_has_a_gap_where_it_is_not_finite():
    lines = [dict(step=i, loss=value) for i, value in enumerate([1.0, 2.0, NAN, 3.0, None, "4", True, 2.0, 1.0])]
    chart = line_chart([("loss", "red", points_of([*lines, dict(step="x", loss=1.0)], "loss"))], x_label="", y_label="")
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #ff0000', chart)
    assert path.count("L") == 2  # from one to two, twice
    assert len(places_of(chart)) == 1 and "Left out: 4 that are not finite" in chart


def test_charts_without_data_say_so():
    nothing = line_chart([], x_label="x", y_label="y")
    assert nothing == scatter_chart([], x_label="x", y_label="y") == forest_chart([], label="x") == line_of([NAN])
    assert "no data" in nothing and "no data" in heat_map(np.empty((0, 0)), [], [], (0, 0, 0), x_label="t")


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis():
    marks = [(1, 0.0, -1.0, 1.0), (10, 1.0), (100, 2.0)]
    chart = line_chart([("a", "red", marks)], x_label="x", y_label="y", log_x=True, points=True)
    (one, _), (ten, _), (hundred, _) = places_of(chart)
    assert ten - one == pytest.approx(hundred - ten, abs=0.2)


def test_names_of_a_scatter_do_not_lie_on_one_another():
    rng = np.random.default_rng(0)
    marks = [Mark(float(x), float(y)) for x, y in rng.normal(5, 0.2, (40, 2))]
    chart = scatter_chart([(f"method{i}", "red", mark) for i, mark in enumerate(marks)], x_label="", y_label="")
    assert sorted(texts_of(chart, "start")) == sorted(f"method{i}" for i in range(40))
    ys = sorted(map(float, re.findall(r'y="([^"]*)"[^>]*>method', chart)))
    assert min(np.diff(ys)) > 11 and ys[0] > 0 and ys[-1] < 700


def test_long_names_leave_the_differences_their_room():
    name = "magicfusion general=animals experts=('things', 'food') k=1.0 fuse_above=600 general_first=False"
    note = "+0.201 (+0.171 to +0.231) \u00b7 90 : 20 " * 2
    chart = forest_chart([Row(name, "red", value, None, None, note) for value in (-1.0, 0.0, 1.0)], label="difference")
    (low, _), (zero, _), (high, _) = places_of(chart)
    assert high - zero > 80 and zero - low > 80
    assert chart.count(f"<title>{html.escape(name, quote=False)}</title>") == 3
    assert texts_of(chart, "end") == [f"{name[:59]}…"] * 3


def test_a_difference_of_zero_is_at_the_line():
    rows = [Row("worse", "red", -1.0, -2.0, 0.0, ""), Row("same", "red", 0.0, None, None, "no interval")]
    chart = forest_chart(rows, label="difference")
    (zero,) = re.findall(r'<path d="M ([\d.]+) [^"]*" clip-path="[^"]*" style="[^"]*stroke: #555555', chart)
    assert places_of(chart)[1][0] == pytest.approx(float(zero), abs=0.1)
    assert chart.count("stroke-width: 2") == 1  # one of them has an interval


def test_a_heat_map_goes_from_white_to_the_colour():
    values = np.asarray([[0.0, 0.5, np.nan], [1.0, 2.0, np.inf]])
    chart = heat_map(values, ["a", "<b>"], ["t=1", "t=2", "t=3"], (255, 0, 0), x_label="t")
    assert re.findall("background:(#[0-9a-f]{6})", chart) == [
        *("#ffffff", "#ff8080", "#999999"),
        *("#ff0000", "#ff0000", "#999999"),
    ]
    assert 'title="&lt;b&gt;, t=1: 1.000"' in chart


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a" onload="x', "$\\frac{$", "\u202egpj", "日本語 🐙", "a\nb\x1b[0m"]
)
def test_any_name_is_shown_as_it_is(name):
    mark, more = Mark(1.0, 1.0), dict(x_label=name, y_label=name)
    for chart in (
        line_chart([(name, "red", [mark, Mark(2.0, 2.0)])], **more, points=True),
        scatter_chart([(name, "red", mark)], **more),
        forest_chart([Row(name, "red", 1.0, None, None, name)], label=name),
    ):
        svg = chart[chart.index("<svg") : chart.index("</svg>") + 6].replace("xlink:", "")
        shown = ElementTree.fromstring(svg)  # it is whole, with no element or attribute of the name's own
        assert {element.tag for element in shown.iter()} <= {
            *("svg", "g", "path", "use", "defs", "style", "text", "title", "clipPath", "rect")
        }
        assert not any(attribute.startswith("on") for element in shown.iter() for attribute in element.attrib)
        assert printable(name) in {element.text for element in shown.iter("text")}
        assert any(printable(name) in (element.text or "") for element in shown.iter("title"))


def test_a_chart_has_the_same_bytes_each_time_and_nothing_from_elsewhere():
    one = line_of([1.0, 2.0, NAN, 3.0], points=True)
    assert one == line_of([1.0, 2.0, NAN, 3.0], points=True)
    assert "http" not in one and "<script" not in one and not re.search(r'href="(?!#)', one)


def test_matplotlib_is_imported_by_the_first_chart_only():
    code = "import sys, afa_jax.report.comparison as c; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
