"""Tables of a comparison in Markdown files, which cannot drift from report.json."""

import functools
import json
from pathlib import Path

import pytest

from afa_jax.cli.commands import run
from afa_jax.report.__main__ import main
from afa_jax.report.readme import markdown, with_tables
from tests.report import example

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "report.json").write_text(json.dumps(example.report()))
    readme = tmp_path / "README.md"
    readme.write_text(
        "# Title\n\n<!-- table: docs/report.json methods=afa,merge -->\nold\n<!-- end table -->\n\nlast\n"
    )
    return readme


def test_the_tables_of_this_repository_are_those_of_its_reports():
    files = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]
    assert files
    for path in files:
        text = path.read_text()
        if any(line.strip().startswith("<!-- table:") for line in text.splitlines()):
            assert with_tables(text, path) == text, f"run python -m afa_jax.report --into {path.relative_to(ROOT)}"


def test_a_table_is_written_between_its_markers_and_checked(readme, capsys):
    assert run(main, ["--into", str(readme), "--check"]) == 1
    assert "\nold\n" in readme.read_text() and "out of date" in capsys.readouterr().out
    assert run(main, ["--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- table: docs/report.json methods=afa,merge -->\n\n| method | subject")
    assert text.endswith("\n\n<!-- end table -->\n\nlast\n") and "\nold\n" not in text
    assert "| merge | 0.388 (0.358 to 0.418) | 0.350 (0.310 to 0.390) | 20 | 1.0 | 0.07 | 118 MiB |" in text
    assert "| afa | **0.531** (0.501 to 0.561) | **0.280** (0.240 to 0.320) | 60 | 4.4 | 0.31 | 118 MiB |" in text
    assert run(main, ["--into", str(readme), "--check"]) == 0
    # A figure that changed makes it out of date.
    report = example.report()
    report["methods"][0]["metrics"]["subject"]["value"] = 0.5312
    report["protocol"]["prompts"] = 199
    (readme.parent / "docs" / "report.json").write_text(json.dumps(report))
    assert run(main, ["--into", str(readme), "--check"]) == 1


def test_only_the_tables_of_one_report(readme, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(example.report()))
    assert run(main, ["--table", str(other), "--into", str(readme)]) == 2
    assert "no table of" in capsys.readouterr().err and "\nold\n" in readme.read_text()
    assert run(main, ["--table", str(readme.parent / "docs" / "report.json"), "--into", str(readme)]) == 0
    assert "\nold\n" not in readme.read_text()


def names(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:] if line.startswith("|")]


def test_main_methods_are_controls_afa_and_the_best_of_each_family():
    bounds = ["*real scenes (ceiling)*", "*other captions (floor)*", "*reconstructions*"]
    controls = ["expert:animals", "expert:things", "uniform"]
    made = markdown(example.report(), methods="main")
    assert names(made) == [*controls, "merge", "average", "maxfusion", "alternate", "afa", *bounds]
    # What the others are compared with stays, be it the best of its family or not.
    report = example.report()
    report["references"]["merge"] = "ties"
    assert names(markdown(report, methods="main"))[3:6] == ["merge", "ties", "average"]
    # By kid, the first metric named, lower is better.
    made = markdown(example.report(), methods="main", metrics="kid,subject")
    assert names(made)[3:5] == ["merge", "average"] and made.startswith("| method | kid &darr; | subject &uarr; |")
    made = markdown(example.report(), methods="output space,AFA", costs="no", metrics="style")
    assert names(made) == ["average", "magicfusion", "afa", *bounds[:2]]
    assert "| magicfusion |  |" in made and " time " not in made


def test_groups_have_columns_of_the_first_metric():
    made = markdown(example.report(), methods="afa,ties", metrics="subject", costs="no", groups="yes").splitlines()
    assert made[0] == "| method | subject &uarr; | two topics &uarr; | unseen pairs &uarr; |"
    assert "| ties | 0.379 (0.349 to 0.409) |  |  |" in made  # it has no groups
    assert "| **0.531** (0.501 to 0.561) | **0.478** (0.428 to 0.528) | **0.372** (0.292 to 0.452) |" in made[3]
    assert made[4] == "| *real scenes (ceiling)* | 0.890 |  |  |"


def test_by_family_every_method_and_metric_is_there():
    made = markdown(example.report(), metrics="all", by="family")
    found = names(made)
    assert [name for name in found if name.startswith("*")][:3] == ["*control*", "*parameter space*", "*output space*"]
    assert {method["name"] for method in example.report()["methods"]} <= set(found)
    assert len({line.count("|") for line in made.splitlines() if line.startswith("|")}) == 1
    assert (
        made.endswith("Time: of a picture, over one expert's; in seconds, that times one expert's.")
        and "Not measured, being absent: pickscore." in made
        and "200 prompts (two topics 104, unseen pairs 96)" in made
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no marker\n", "no table; write the lines"),
        ("<!-- table: docs/report.json -->\nrest\n", "README.md:1: a table without its end"),
        ("\n<!-- table: docs/report.json -->", "README.md:2: a table without its end"),
        (
            "<!-- table: a.json -->\n<!-- table: b.json -->\n<!-- end table -->\n",
            "README.md:1: a table without its end",
        ),
        ("<!-- table: none.json -->\n<!-- end table -->\n", "none.json: No such file"),
        (
            "<!-- table: docs/report.json metrics=fid -->\n<!-- end table -->\n",
            "no metric 'fid'; it has subject, style",
        ),
        ("<!-- table: docs/report.json methods=x -->\n<!-- end table -->\n", "no method or family 'x'"),
        ("<!-- table: docs/report.json columns=x -->\n<!-- end table -->\n", "no option 'columns'"),
        ("<!-- table: docs/report.json main -->\n<!-- end table -->\n", "option=value"),
        ("<!-- table: docs/report.json by=name -->\n<!-- end table -->\n", "choose by=family"),
        ("<!-- table: README.md -->\n<!-- end table -->\n", "not JSON"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(readme, text, said, capsys):
    readme.write_text(text)
    assert run(main, ["--into", str(readme)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("content", "said"), [("{}", "not a report of"), ('{"version": 2', "not JSON"), ("[]", "not a")]
)
def test_other_files_are_no_reports(readme, content, said, capsys):
    (readme.parent / "docs" / "report.json").write_text(content)
    assert run(main, ["--into", str(readme)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("protocol",), {}),
        (("protocol", "guidance"), "high"),
        (("protocol", "size"), [1]),
        (("methods", 0), None),
        (("methods", 0, "name"), 1),
        (("methods", 0, "groups", "two topics"), 1.5),
        (("methods", 0, "memory_bytes"), -1),
        (("metrics", 0, "digits"), "x"),
        (("bounds",), []),
        (("examples", "prompts"), [1]),
        (("version",), [None]),
    ],
)
def test_a_field_of_another_kind_is_named(readme, path, value, capsys):
    """In the table and in the sheet alike; null is an absent figure."""
    report = example.report()
    place = functools.reduce(lambda part, key: part[key], path[:-1], report)
    place[path[-1]] = value
    file = readme.parent / "docs" / "report.json"
    file.write_text(json.dumps(report))
    for line in (["--into", str(readme)], ["--sheet", str(file.parent), "--out", str(readme.parent / "sheet.png")]):
        assert run(main, line) == 2
        said = capsys.readouterr().err
        assert "report.json" in said and path[0] in said and said.count("\n") == 1


def test_neither_a_run_nor_a_table_is_refused(capsys):
    assert run(main, []) == 2
    assert "--workdir and --out" in capsys.readouterr().err
