"""The page of a comparison, from a report whose figures are made up."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from afa_jax.report import charts
from afa_jax.report.comparison import comparison, write_comparison
from afa_jax.report.readme import markdown
from tests.report import example
from tests.report.test_charts import texts_of

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


@pytest.fixture
def no_charts(monkeypatch):
    """Leave the charts out, which take the time."""
    monkeypatch.setattr(charts, "_svg", lambda *_: "<svg></svg>")


def cells(page: str, table: int, first: str) -> list[str]:
    """The row of a table that begins with a method."""
    return next([c.strip() for c in row] for row in Outline(page).tables[table] if row[0].strip() == first)


def test_the_page_has_every_figure_and_needs_nothing_else(tmp_path):
    report = example.report()
    write_comparison(tmp_path, report, example.pictures, example.maps, ["animals", "food", "things"])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "http" not in page and "@import" not in page
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


@pytest.mark.usefixtures("no_charts")
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
    names = [texts_of(chart, "end") for chart in charts]
    assert names[0][:3] == ["afa", "afa:last", "average"] and names[0][-1] == "expert:animals"
    assert names[1][0] == "afa" and names[1][-1] == "maxfusion"  # lower is better
    assert not {"expert:things", "ties"} & {*names[0], *names[1]}
    assert "+0.201 (+0.171 to +0.231) · 90 : 20" in charts[0] and "-0.180" in texts_of(charts[1], "start")


@pytest.mark.usefixtures("no_charts")
def test_pictures_are_whole_and_missing_ones_leave_a_gap():
    page = comparison(example.report(), example.pictures, example.maps, ["animals", "food", "things"])
    table = page[page.index("<h2>Pictures</h2>") : page.index("<h2>What each method is</h2>")]
    # Four methods, three prompts, one picture is missing; the two ensembles have maps.
    assert table.count("<img") == table.count("data:image/png;base64,") == 11 + 6
    assert table.count("<td></td>") == 1 and 'width="128" height="64"' in table
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


@pytest.mark.usefixtures("no_charts")
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


@pytest.mark.usefixtures("no_charts")
def test_a_group_of_one_prompt_is_said_to_have_no_intervals():
    report = example.report()
    assert "Without intervals" not in comparison(report, example.pictures)
    report["protocol"]["groups"]["unseen pairs"] = 1
    assert "Without intervals, for they are of one prompt: unseen pairs." in comparison(report, example.pictures)


@pytest.mark.usefixtures("no_charts")
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
    assert "{&#34;workdir&#34;: &#34;runs/emoji&#34;, &#34;steps&#34;: 5, &#34;eta&#34;: 1.0}" in recipes
    assert recipes.count("eta") == 1


@pytest.mark.usefixtures("no_charts")
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
    labels = texts_of(subject, "start")
    # Of the cheapest the merge is the best; uniform and average are better, and so is AFA; things is the best expert.
    assert set(labels) == {"merge", "expert:things", "uniform", "average", "afa"}
    assert "<title>maxfusion: 0.351" in subject and "<title>ties: 0.379" in subject
