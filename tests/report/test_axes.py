"""The axes of charts, whatever the numbers: labels that are true and told apart, all inside the drawing."""

import itertools
import math
import re

import numpy as np
import pytest

from afa_jax.report.axes import round_numbers, round_powers, tick_labels
from afa_jax.report.charts import Mark, Row, forest_chart, heat_map, line_chart, points_of, scatter_chart

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (1, 200, [50, 100, 150, 200]),
        (0.2577, 0.5133, [0.3, 0.4, 0.5]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 1, [-3, -2, -1, 0, 1]),
        (0.0, 1e-9, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9]),
    ],
)
def test_axes_have_round_numbers(low, high, numbers):
    assert round_numbers(low, high) == pytest.approx(numbers, abs=1e-15)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (1, 1000, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]),
        (20, 60, [20, 30, 40, 50, 60]),
        (0.07, 0.31, [0.07, 0.08, 0.09, 0.1, 0.2, 0.3]),
        (1000, 1500, [1000, 1100, 1200, 1300, 1400, 1500]),
        (1e-9, 1e9, [10.0**power for power in range(-9, 10, 3)]),
    ],
)
def test_logarithmic_axes_have_round_numbers(low, high, found):
    assert round_powers(low, high) == pytest.approx(found)


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ([0.9999, 0.99995, 1.0], ["0.9999", "0.99995", "1"]),
        ([-0.1, 0.0, 0.1, 0.2, 0.1 * 3], ["-0.1", "0", "0.1", "0.2", "0.3"]),
        ([0.0, 5000.0, 10000.0, 15000.0], ["0", "5000", "10000", "15000"]),
        ([1e6, 1e6 + 0.001], ["1000000", "1000000.001"]),
        ([0.0, 2e-10, 4e-10], ["0", "2e-10", "4e-10"]),
        ([-1e9, -5e8, 0.0, 1.5e9], ["-1e9", "-5e8", "0", "1.5e9"]),
        ([0.001, 1.0, 1000.0], ["0.001", "1", "1000"]),
        ([0.25], ["0.25"]),
    ],
)
def test_labels_are_true_and_told_apart(numbers, labels):
    assert tick_labels(numbers) == labels
    signed = [label if label == "0" or label[0] == "-" else f"+{label}" for label in labels]
    assert tick_labels(numbers, sign=True) == signed


def labels_of(chart: str, anchor: str) -> list[str]:
    return re.findall(rf'text-anchor="{anchor}">([-+.0-9e]+)<', chart)


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
def test_every_chart_is_within_its_frame(ys):
    bad = sum(not abs(y) < 1e200 for y in ys)
    for xs, log_x, points in itertools.product(XS, (False, True), (False, True)):
        marks = [Mark(x, y, y - 0.1 * abs(y), y + 0.1 * abs(y)) for x, y in zip(xs, ys, strict=False)]
        charts = [
            line_chart([("a", "red", marks)], x_label="x", y_label="y", log_x=log_x, points=points),
            scatter_chart([("a", "red", mark) for mark in marks], x_label="x", y_label="y", log_x=log_x),
            forest_chart([Row("a", "red", mark.y, mark.low, mark.high, "") for mark in marks], label="d"),
        ]
        for chart in charts:
            match = re.search(r'viewBox="0 0 (\d+) (\d+)"', chart)
            assert match is not None and "nan" not in chart and "inf" not in chart
            width, height = map(int, match.groups())
            for axis, value in re.findall(r'\b([xy]|[xy][12]|c[xy])="([^"]+)"', chart):
                assert -0.1 <= float(value) <= (height if "y" in axis else width) + 0.1
            for x, y in re.findall(r"[ \"]([-\d.]+),([-\d.]+)", " ".join(re.findall('points="[^"]*"', chart))):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height
            for labels in (labels_of(chart, "end"), labels_of(chart, "middle")):
                assert len(set(labels)) == len(labels)
            assert labels_of(chart, "middle")
            assert (f"Left out: {bad} that" in chart) == (bad > 0)
        assert len(labels_of(charts[0], "end")) > 1


def test_a_line_has_a_gap_where_it_is_not_finite():
    lines = [dict(step=i, loss=value) for i, value in enumerate([1.0, 2.0, NAN, 3.0, None, "4", True, 2.0, 1.0])]
    chart = line_chart([("loss", "red", points_of([*lines, dict(step="x", loss=1.0)], "loss"))], x_label="", y_label="")
    assert [len(path.split()) for path in re.findall('points="([^"]*)"', chart)] == [2, 2]
    assert chart.count("<circle") == 1 and "Left out: 4 that are not finite" in chart
    assert line_chart([("a", "red", [(1, NAN)])], x_label="", y_label="") == heat_map(
        np.empty((0, 0)), [], [], (0, 0, 0), x_label="t"
    )
