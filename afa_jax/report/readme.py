"""Tables of a comparison inside Markdown files, written by ``python -m afa_jax.report --into README.md``.

The text between two such lines is replaced by the table of that report:

    <!-- table: docs/emoji/report.json metrics=subject,kid methods=main -->
    <!-- end table -->

The report's path is relative to the Markdown file, as a link's is. All options may be left out:

    metrics   names, or "all"; by default those that the report calls main
    methods   names and families (in quotes where they have a space), "all" (the default) or "main": the controls,
              what the others are compared with (best expert, best merge, AFA), and of every other family but the
              ablations the best by the table's first metric
    by        "family" puts a line above the methods of each family
    costs     "no" leaves out the columns of what a picture costs
    groups    "yes" adds a column for each group of prompts, of the first metric
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.files import replace_text
from afa_jax.report import figures
from afa_jax.report.figures import Measurement, Method, Metric, Report, measurement

_OPTIONS = ("metrics", "methods", "by", "costs", "groups")
_BEGIN, _END = re.compile(r"<!-- table: (?P<spec>.*?) ?-->"), "<!-- end table -->"


def update_tables(path: Path, report: Path | None = None, *, check: bool = False) -> bool:
    """Regenerate every table of a Markdown file.

    Args:
        report: only update tables of this report.
        check: leave the file unchanged.

    Returns:
        Whether the file was up to date.

    Raises:
        InputError: the file does not exist or has no table, or a marker has no end or asks for something missing.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a Markdown file") from error
    new = with_tables(text, path, report)
    if new != text and not check:
        replace_text(path, new)
    return new == text


def with_tables(text: str, path: Path, report: Path | None = None) -> str:
    """Return the text of the Markdown file at ``path`` with its tables regenerated, as update_tables does."""
    lines, done, found = text.splitlines(), [], 0
    rows = iter(enumerate(lines, 1))
    for number, line in rows:
        done.append(line)
        match = _BEGIN.fullmatch(line.strip())
        if match is None:
            continue
        begun = len(done)
        for _, inner in rows:
            done.append(inner)
            if inner.strip() == _END or _BEGIN.fullmatch(inner.strip()):
                break
        if done[-1].strip() != _END or len(done) == begun:
            raise InputError(f"{path}:{number}: a table without its end; add the line {_END}")
        name, options = _parse(match["spec"], f"{path}:{number}")
        source = path.parent / name
        if report is not None and source.resolve() != report.resolve():
            continue
        found += 1
        try:
            made = markdown(figures.read_report(source), **options)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        done[begun:] = ["", *made.splitlines(), "", _END]
    if not found:
        what = f"no table of {report}" if report else "no table"
        raise InputError(f"{path}: {what}; write the lines <!-- table: REPORT.json --> and {_END} where it is to be")
    return "\n".join(done) + ("\n" if text.endswith("\n") else "")


def _parse(spec: str, where: str) -> tuple[str, dict[str, str]]:
    try:
        source, *rest = shlex.split(spec)
        options = dict(option.split("=", 1) for option in rest)
    except ValueError as error:
        raise InputError(f"{where}: write <!-- table: REPORT.json option=value ... -->, values in quotes") from error
    for name in options:
        if name not in _OPTIONS:
            raise InputError(f"{where}: no option {name!r} of a table; there are {', '.join(_OPTIONS)}")
    return source, options


def markdown(
    report: Report, metrics: str = "", methods: str = "all", by: str = "", costs: str = "yes", groups: str = "no"
) -> str:
    """Return a report's Markdown table, its bounds, and a line on how it was measured; options as above.

    Raises:
        InputError: the report lacks a metric, method or family, or an option has an unknown value.
    """
    if by not in ("", "family") or not {costs, groups} <= {"yes", "no"}:
        raise InputError(f"by={by}, costs={costs}, groups={groups}: choose by=family or none, the others yes or no")
    if metrics == "all":
        columns = list(report["metrics"])
    elif metrics:
        columns = [figures.metric_named(report, name.strip()) for name in metrics.split(",")]
    else:
        columns = figures.main_metrics(report)
    chosen = _chosen(report, methods, columns[0] if columns else None)
    # For each column: its head, its metric, and where a method has its figures.
    measured: list[tuple[str, Metric, Callable[[Any], Any]]] = [
        (metric["name"], metric, lambda method: method.get("metrics")) for metric in columns
    ]
    for group in (report["protocol"].get("groups") or {}) if groups == "yes" and columns else ():
        measured.append((group, columns[0], functools.partial(_of_group, group)))
    tops = [figures.best(metric, [dict(metrics=of(method)) for method in chosen]) for _, metric, of in measured]
    price: list[tuple[str, str, Callable[[Any], str]]] = [
        ("evaluations", "U-Net evaluations", str),
        ("time_ratio", "time", lambda ratio: f"{ratio:.1f}"),
        ("seconds_per_image", "s a picture", figures.seconds),
        ("memory_bytes", "memory", figures.size),
    ]
    shown = [cost for cost in price if costs == "yes" and any(method.get(cost[0]) is not None for method in chosen)]
    arrows = dict(higher="&uarr;", lower="&darr;")
    heads = [f"{head} {arrows[metric['better']]}" for head, metric, _ in measured]
    heads = ["method", *heads, *(head for _, head, _ in shown)]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    family = None
    for method in chosen:
        if by == "family" and method["family"] != family:
            family = method["family"]
            lines.append(_line([f"*{family}*", *[""] * (len(heads) - 1)]))
        cells = []
        for (_, metric, of), top in zip(measured, tops, strict=True):
            found = measurement(of(method), metric["name"])
            cells.append(_cell(found, metric, bold=found is not None and found.value == top))
        cells += ["" if method.get(key) is None else text(method[key]) for key, _, text in shown]
        lines.append(_line([method["name"], *cells]))
    for name, bound in (report.get("bounds") or {}).items():
        values = [measurement(bound, metric["name"]) for metric in columns]
        if any(values):
            cells = [figures.written(v.value, m) if v else "" for v, m in zip(values, columns, strict=True)]
            lines.append(_line([f"*{name}*", *cells, *[""] * (len(measured) - len(columns) + len(shown))]))
    bold = " Bold: the best value of a column." if columns else ""
    explained = (
        " Time: of a picture, over one expert's; in seconds, that times one expert's."
        if any(cost[0] == "time_ratio" for cost in shown)
        else ""
    )
    return "\n".join(lines) + f"\n\n{figures.protocol_sentence(report)}{bold}{explained}"


def _of_group(group: str, method: Method) -> Any:
    return (method.get("groups") or {}).get(group)


def _chosen(report: Report, methods: str, metric: Metric | None) -> list[Method]:
    ordered = figures.by_family(report)
    if methods == "all" or (methods == "main" and metric is None):  # without a metric none is better than another
        return ordered
    if methods == "main" and metric is not None:
        kept, references = [], {*(report.get("references") or {}).values()}
        for method in ordered:
            family = [other for other in ordered if other["family"] == method["family"]]
            found = measurement(method.get("metrics"), metric["name"])
            best = found is not None and found.value == figures.best(metric, family)
            always = method["family"] in ("control", "AFA") or method["name"] in references
            if always or (best and method["family"] != "ablation"):
                kept.append(method)
        return kept
    wanted = [name.strip() for name in methods.split(",")]
    known = {method[key] for method in ordered for key in ("name", "family")}
    for name in wanted:
        if name not in known:
            raise InputError(f"the report has no method or family {name!r}; it has {figures.names_of(ordered)}")
    return [method for method in ordered if {method["name"], method["family"]} & set(wanted)]


def _cell(found: Measurement | None, metric: Metric, *, bold: bool) -> str:
    if found is None:
        return ""
    text, between = figures.written(found.value, metric), figures.interval(found, metric)
    return (f"**{text}**" if bold else text) + (f" ({between})" if between else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
