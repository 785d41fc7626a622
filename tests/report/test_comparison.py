"""The page of a comparison, from a report whose figures are made up."""

import html
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from afa_jax.report.charts import Mark, Row, forest_chart, heat_map, line_chart, scatter_chart
from afa_jax.report.comparison import comparison, write_comparison
from afa_jax.report.readme import markdown
from tests.report import example

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """The rows of every table as text, and whether every element is closed where it should be."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data + " "


def cells(page: str, table: int, first: str) -> list[str]:
    """The row of a table that begins with a method."""
    return next([c.strip() for c in row] for row in Outline(page).tables[table] if row[0].strip() == first)


def test_the_page_has_every_figure_and_needs_nothing_else(tmp_path):
    report = example.report()
    write_comparison(tmp_path, report, example.pictures, example.maps, ["animals", "food", "things"])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "@import" not in page
    head, *rows = Outline(page).tables[0]
    assert [name.split()[0] for name in head[:4]] == ["method", "subject", "style", "kid"]
    families = [row[0].strip() for row in rows]
    # Family by family, and the bounds below.
    assert families[:3] == ["expert:animals", "expert:things", "uniform"]
    assert families[-5:-3] == ["afa", "afa:last"] and families[-3] == "real scenes (ceiling)"
    assert cells(page, 0, "afa")[1:6] == [
        "0.531 0.501 to 0.561",
        "0.600 0.580 to 0.620",
        "0.280 0.240 to 0.320",
        "absent",
        "10",
    ]
    # A metric that could not be had has a column, which says so and why.
    assert head[4].split() == ["pickscore", "absent"]
    assert page.count('<span title="its weights are not here; pip install &lt;them&gt;">absent</span>') == 11
    assert cells(page, 0, "afa:last")[1:4] == ["", "", "0.300 0.260 to 0.340"]
    assert cells(page, 0, "reconstructions")[1:3] == ["0.810", ""]
    assert cells(page, 0, "alternate")[6:9] == ["20", "", ""]
    assert cells(page, 0, "uniform")[8] == "3.43 3.1 to 3.9"
    for text in (
        "pip install &lt;them&gt;",
        "not trained; python -m afa_jax.train",
        "make &lt;demo&gt;",
        "104, unseen",
    ):
        assert text in page
    for method in report["methods"]:
        assert page.count(method["what"]) >= 2


def test_the_best_of_a_column_is_marked_and_cells_can_be_sorted():
    page = comparison(example.report(), example.pictures)
    table = page[page.index("<tbody>") : page.index("<tfoot>")]
    marked = re.findall(r'<td class="number best" data-value="([^"]*)">', table)
    assert [value for value in marked if value != "0.6"] == ["0.531", "0.28"]  # kid: the lowest
    # What was not measured has no value, and so comes last in either order.
    assert re.search(r"alternate</span></th>(<td[^>]*>[^t]*?</td>)*", table)
    row = next(row for row in table.split("<tr>") if ">alternate<" in row)
    assert re.findall(r'data-value="([^"]*)"', row) == [
        "alternate",
        "0.342",
        "0.6",
        "0.4",
        "",  # absent
        "10",
        "20",
        "",
        "",
        "123456789",
    ]
    assert page.count("<script>") == 1 and 'data-first="ascending"' in page


def test_differences_are_sorted_and_leave_out_the_reference():
    page = comparison(example.report(), example.pictures)
    best = page[page.index("Against the best single expert (expert:things)") : page.index("Against AFA (afa)")]
    charts = re.findall(r"<svg.*?</svg>", best, re.S)
    assert len(charts) == 2  # subject, kid
    names = [re.findall(r'text-anchor="end">([^<]*)', chart) for chart in charts]
    assert names[0][:3] == ["afa", "afa:last", "average"] and names[0][-1] == "expert:animals"
    assert names[1][0] == "afa" and names[1][-1] == "maxfusion"  # lower is better
    assert not {"expert:things", "ties"} & {*names[0], *names[1]}
    assert "+0.201 (+0.171 to +0.231) · 90 : 20" in charts[0] and "-0.180</text>" in charts[1]


def test_pictures_are_whole_and_missing_ones_leave_a_gap():
    page = comparison(example.report(), example.pictures, example.maps, ["animals", "food", "things"])
    table = page[page.index("<h2>Pictures</h2>") : page.index("<h2>What each method is</h2>")]
    # Four methods, three prompts, one picture is missing; the two ensembles have maps.
    assert table.count("<img") == table.count("data:image/png;base64,") == 11 + 6
    assert table.count('<td class=""></td>') == 1 and 'width="128" height="64"' in table
    large = np.zeros((512, 512, 3), np.uint8)
    page = comparison(example.report(), lambda method, prompt: large)
    assert page.count('width="256" height="256" src="data:image/webp') == 12
    page = comparison(example.report(), lambda method, prompt: large[:256, :256])  # as large as a cell: with loss, too
    assert page.count('width="256" height="256" src="data:image/webp') == 12 and "data:image/png" not in page


def test_a_report_with_hardly_anything_has_a_page():
    report = example.report()
    for key in ("curves", "examples", "bounds", "absent_methods", "absent_metrics", "references", "config", "device"):
        del report[key]
    for method in report["methods"]:
        for key in ("against", "groups", "noise_mse", "seconds_per_image", "evaluations", "recipe"):
            method.pop(key, None)
        method["metrics"] = None
    page = comparison(report, example.pictures)
    outline = Outline(page)
    assert len(outline.tables) == 2 and "<svg" not in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["All methods", "What each method is"]
    report |= dict(metrics=[])
    report["protocol"] |= dict(prompts=1, groups=dict(all=1))
    page = comparison(report, example.pictures)
    assert "memory" in page and "nterval" not in page.split("<h2>")[0] and len(Outline(page).tables) == 2
    assert "1 prompt (" in page
    table = markdown(report, methods="main", groups="yes")
    assert "| method | time | memory |" in table and "| magicfusion |" in table


def test_of_one_prompt_the_page_says_that_it_has_no_intervals():
    report = example.report()
    report["protocol"] |= dict(prompts=1)
    for method in report["methods"]:
        found = [*(method["metrics"] or {}).values()]
        for group in (method["against"] or {}).values():
            found += group.values()
        for one in found:
            if one is not None:
                one |= dict(low=None, high=None)
        method["groups"] = None
    report["curves"] = []
    page = comparison(report, example.pictures)
    assert "Without intervals, which one prompt cannot have." in page
    assert "95 % interval of that difference" not in page and "95 % interval of that difference" in comparison(
        example.report(), example.pictures
    )


def test_a_group_of_one_prompt_is_said_to_have_no_intervals():
    report = example.report()
    assert "Without intervals" not in comparison(report, example.pictures)
    report["protocol"]["groups"]["unseen pairs"] = 1
    assert "Without intervals, for they are of one prompt: unseen pairs." in comparison(report, example.pictures)


def test_sampling_of_its_own_and_figures_without_intervals_are_named():
    report = example.report()
    assert "(2,000 resamples)." in comparison(report, example.pictures)
    report["methods"][0] |= dict(eta=1.0, guidance=3.0, steps=5)
    for method in report["methods"]:
        if (method["metrics"] or {}).get("kid"):
            method["metrics"]["kid"] = dict(value=0.3, low=None, high=None)
    page = comparison(report, example.pictures)
    assert "10 steps, guidance 3, eta 0 where a method has none of its own" in page
    assert "(2,000 resamples); without: kid." in page
    recipes = page[page.index("<h2>What each method is</h2>") :]
    assert "{&quot;workdir&quot;: &quot;runs/emoji&quot;, &quot;steps&quot;: 5, &quot;eta&quot;: 1.0}" in recipes
    assert recipes.count("eta") == 1


def test_curves_say_what_they_are_measured_on():
    report = example.report()
    note = "compare the points with one another"
    assert note not in comparison(report, example.pictures)
    for curve in report["curves"]:
        curve |= dict(prompts=200, seeds=[0, 1, 2])
    assert note not in comparison(report, example.pictures)
    for curve in report["curves"]:
        curve |= dict(prompts=32, seeds=[0])
    assert f"Measured on 32 of the 200 prompts, seed 0: {note}" in comparison(report, example.pictures)


def test_in_the_charts_of_costs_only_references_and_the_best_at_their_cost_are_named():
    page = comparison(example.report(), example.pictures)
    charts = page[page.index("<h2>Quality against cost</h2>") : page.index("<h2>Quality over steps")]
    subject, *_ = re.findall(r"<svg.*?</svg>", charts, re.S)
    labels = [name for name in re.findall('text-anchor="middle">([^<]*)', subject) if re.match("[a-z]+(:|$)", name)]
    # Of the cheapest the merge is the best; uniform and average are better, and so is AFA; things is the best expert.
    assert set(labels) == {"merge", "expert:things", "uniform", "average", "afa"}
    assert "<title>maxfusion: 0.351" in subject and "<title>ties: 0.379" in subject


def test_long_names_leave_the_differences_their_room():
    name = "magicfusion general=animals experts=('things', 'food') k=1.0 fuse_above=600 general_first=False"
    note = "+0.201 (+0.171 to +0.231) \u00b7 90 : 20 " * 2
    rows = [Row(name, "red", value, None, None, note) for value in (-1.0, 0.0, 1.0)]
    chart = forest_chart(rows, label="difference")
    low, zero, high = numbers('cx="([^"]*)"', chart)
    assert high - zero > 80 and zero - low > 80 and high < numbers('<svg viewBox="0 0 ([0-9]+)', chart)[0]
    assert chart.count(f"<title>{html.escape(name)}</title>") == 3 and f">{html.escape(name[:59])}…<" in chart


def numbers(pattern: str, chart: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, chart)]


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis():
    chart = line_chart(
        [("a", "red", [(1, 0.0, -1.0, 1.0), (10, 1.0), (100, 2.0)])], x_label="x", y_label="y", log_x=True, points=True
    )
    x = numbers('circle cx="([^"]*)"', chart)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    y = numbers('circle cx="[^"]*" cy="([^"]*)"', chart)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    (low,) = numbers(r'y1="([^"]*)" y2="[^"]*" stroke="red"', chart)
    (high,) = numbers(r'y2="([^"]*)" stroke="red"', chart)
    assert low - y[0] == pytest.approx(y[0] - high, abs=0.2) and low > y[0]


def test_labels_of_a_scatter_do_not_lie_on_one_another():
    rng = np.random.default_rng(0)
    names = [f"method{i}" for i in range(16)]
    named = [
        (name, "red", Mark(float(x), float(y))) for name, (x, y) in zip(names, rng.normal(5, 0.2, (16, 2)), strict=True)
    ]
    chart = scatter_chart(named, x_label="x", y_label="y", log_x=True)
    found = {
        n: (float(x), float(y)) for x, y, n in re.findall(r'<text x="([^"]*)" y="([^"]*)"[^>]*>(method\d+)<', chart)
    }
    assert len(found) == 16
    places = list(found.values())
    for i, (x, y) in enumerate(places):
        assert all(abs(x - a) > 40 or abs(y - b) > 9 for a, b in places[:i])


def test_the_line_at_zero_is_where_a_difference_of_zero_is():
    rows = [Row("worse", "red", -1.0, -2.0, 0.0, ""), Row("same", "blue", 0.0, None, None, "no interval")]
    chart = forest_chart(rows, label="difference")
    zero = re.search(r'<line x1="([^"]*)"[^>]*stroke="#555"', chart)
    assert zero is not None
    assert numbers('cx="([^"]*)"', chart)[1] == float(zero[1])
    assert numbers(r'x2="([^"]*)" y1="[^"]*" y2="[^"]*" stroke="red"', chart) == [float(zero[1])]
    assert chart.count('stroke-width="2"') == 1


def test_a_heat_map_goes_from_white_to_the_colour():
    values = np.asarray([[0.0, 0.5, np.nan], [1.0, 2.0, np.inf]])
    chart = heat_map(values, ["a", "b"], ["t=1", "t=2", "t=3"], (255, 0, 0), x_label="t")
    assert re.findall('fill="(#[0-9a-f]{6})"', chart) == [
        *("#ffffff", "#ff8080", "#999999"),
        *("#ff0000", "#ff0000", "#999999"),
    ]
    assert "b, t=1: 1.000" in chart


def test_charts_without_data_say_so():
    nothing: dict[str, Any] = dict(x_label="x", y_label="y")
    assert line_chart([], **nothing) == scatter_chart([], **nothing) == forest_chart([], label="x")
    assert "no data" in line_chart([("a", "red", [])], **nothing)
