"""The charts of a comparison's page: paired differences, quality against cost, curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from afa_jax.report import figures
from afa_jax.report.charts import Mark, Row, forest_chart, line_chart, scatter_chart
from afa_jax.report.figures import Measurement, Method, Metric, Report, measurement, number

_LINES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c6bb1")
_COSTS = (("seconds_per_image", "seconds a picture"), ("evaluations", "U-Net evaluations a picture"))
Titled = tuple[str, Markup]
_REFERENCES = dict(best="Against the best single expert", merge="Against the best merge", afa="Against AFA")


def differences(report: Report) -> list[dict[str, Any]]:
    """Return a section for each reference: a chart for each metric, the main ones apart."""
    sections = []
    methods, main = figures.by_family(report), [m["name"] for m in figures.main_metrics(report)]
    for key, heading in _REFERENCES.items():
        reference = figures.reference_name(report, key)
        charts: dict[bool, list[Titled]] = {True: [], False: []}
        for metric in report["metrics"]:
            if chart := _forest([m for m in methods if m["name"] != reference], key, metric):
                charts[metric["name"] in main].append((metric["name"], chart))
        if not any(charts.values()):
            continue
        own = [apart for method in methods for apart in ((method.get("against") or {}).get(key) or {}).values()]
        section = dict(
            heading=f"{heading} ({reference})" if reference else heading,
            reference=reference or "the reference",
            interval=any(number(apart.get("low")) is not None for apart in own),
            chosen_by=report["metrics"][0]["name"] if key in ("best", "merge") else None,
            main=charts[True],
            rest=charts[False],
        )
        sections.append(section)
    return sections


def _forest(methods: Sequence[Method], key: str, metric: Metric) -> Markup | None:
    found = []
    for method in methods:
        own = ((method.get("against") or {}).get(key) or {}).get(metric["name"])
        value = number((own or {}).get("difference"))
        if own is None or value is None:
            continue
        low, high = number(own.get("low")), number(own.get("high"))
        note = figures.written(value, metric, sign=True)
        if low is not None and high is not None:
            note += f" ({figures.interval(Measurement(value, low, high), metric, sign=True)})"
        if own.get("wins") is not None:
            note += f" · {own['wins']} : {own['losses']}"
        found.append(Row(method["name"], figures.colour(method), value, low, high, note))
    found.sort(key=lambda row: row.value, reverse=metric["better"] == "higher")
    label = f"difference in {metric['name']} ({metric['better']} is better)"
    return forest_chart(found, label=label) if found else None


def costs(report: Report) -> list[Titled]:
    """Chart the main metrics against the cost of a picture; name the references and the Pareto front."""
    references = set((report.get("references") or {}).values())
    charts: list[Titled] = []
    for metric in figures.main_metrics(report):
        for key, label in _COSTS:
            named = []
            for method in figures.by_family(report):
                cost, found = number(method.get(key)), measurement(method.get("metrics"), metric["name"])
                if found is not None and cost is not None and cost > 0:
                    named.append((method["name"], figures.colour(method), Mark(cost, *found)))
            if named:
                y_label = f"{metric['name']} ({metric['better']} is better)"
                shown = references | _front(named, higher=metric["better"] == "higher")
                chart = scatter_chart(named, x_label=f"{label} (logarithmic)", y_label=y_label, log_x=True, shown=shown)
                charts.append((f"{metric['name']} against {label}", chart))
    return charts


def _front(named: Sequence[tuple[str, str, Mark]], *, higher: bool) -> set[str]:
    """Return the Pareto front: the names for which no other is at least as good and as cheap, and better in one."""
    points = [(name, mark.x, -mark.y if higher else mark.y) for name, _, mark in named]
    return {name for name, x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for _, a, b in points)}


def curves(report: Report) -> list[Titled]:
    """Chart the main metrics over steps and over seconds, for the methods that have curves."""
    charts: list[Titled] = []
    for metric in figures.main_metrics(report):
        for key, label in (("steps", "sampling steps"), ("seconds_per_image", "seconds a picture")):
            series = []
            for index, curve in enumerate(report.get("curves") or []):
                marks = []
                for point in curve["points"]:
                    x, found = number(point.get(key)), measurement(point.get("metrics"), metric["name"])
                    if found is not None and x is not None and x > 0:
                        marks.append(Mark(x, *found))
                if marks:
                    series.append((curve["method"], _LINES[index % len(_LINES)], sorted(marks)))
            if series:
                y_label = f"{metric['name']} ({metric['better']} is better)"
                chart = line_chart(
                    series, x_label=f"{label} (logarithmic)", y_label=y_label, log_x=True, points=True, size=(640, 300)
                )
                charts.append((f"{metric['name']} over {label}", chart))
    return charts


def of_which(report: Report) -> str:
    """Return a text on the data of the curves, if they differ from the tables'."""
    found = next((curve for curve in report.get("curves") or [] if curve.get("prompts")), None)
    if found is None:
        return ""
    prompts, seeds = found["prompts"], found.get("seeds")
    count = prompts if isinstance(prompts, int) else len(prompts)
    whole = report["protocol"]
    if count == whole["prompts"] and seeds in (None, whole.get("seeds")):
        return ""
    text = f"Measured on {count} of the {whole['prompts']} prompts"
    if seeds:
        text += f", {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    return text
