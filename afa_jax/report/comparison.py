"""The page of a comparison, from what ``afa_jax.evaluate`` measured: report.json -> report.html.

Tables that can be sorted, paired differences, quality against cost, curves, groups, and the pictures themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.files import replace_text
from afa_jax.report import figures
from afa_jax.report.comparison_charts import costs, curves, differences, of_which
from afa_jax.report.figures import FAMILIES, Measurement, Method, Metric, Report, measurement, number
from afa_jax.report.pages import Cell, Column, Embedded, image, render
from afa_jax.sampling.map_pictures import legend, paint

Pictures = Callable[[str, str], np.ndarray | None]
WIDEST = 256  # pixels of a picture in the grid


def write_comparison(
    out: Path, report: Report, pictures: Pictures, maps: Pictures | None = None, experts: Sequence[str] = ()
) -> None:
    """Write ``out/report.html``.

    Args:
        out: an existing folder.
        report: the contents of report.json.
        pictures: (method, prompt) -> uint8 ``[rows, columns, 3]``, or None if there is no such picture.
        maps: (method, prompt) -> ``[n, h, w]``, the mean of a picture's maps, or None; drawn below the picture.
        experts: names of the n experts, for the maps' legend.
    """
    replace_text(out / "report.html", comparison(report, pictures, maps, experts))


def comparison(report: Report, pictures: Pictures, maps: Pictures | None = None, experts: Sequence[str] = ()) -> str:
    """Return the page as text; see write_comparison."""
    name = (report.get("config") or {}).get("name", "")
    methods = figures.by_family(report)
    groups = _groups(report, methods)
    return render(
        "comparison.html",
        title=f"{len(methods)} methods compared" + (f": {name}" if name else ""),
        protocol=figures.protocol_sentence(report),
        version=report.get("afa_jax"),
        families=[(name, FAMILIES[name]) for name in FAMILIES if any(m["family"] == name for m in methods)],
        metrics=report["metrics"],
        **_methods(report, methods),
        differences=differences(report),
        costs=costs(report),
        curves=curves(report),
        of_which=of_which(report),
        groups=groups,
        alone=[group for group, count in (report["protocol"].get("groups") or {}).items() if count == 1],
        noise=_noise(methods),
        **_grid(report, methods, pictures, maps),
        legend=legend(experts),
        recipes=[(_named(m), m, _options(report, m)) for m in methods],
        absent=[
            (what, report[key])
            for key, what in (("absent_methods", "Methods"), ("absent_metrics", "Metrics"))
            if report.get(key)
        ],
    )


def _methods(report: Report, methods: Sequence[Method]) -> dict[str, Any]:
    """Return the table of all methods and metrics, with the bounds below."""
    metrics, absent = report["metrics"], report.get("absent_metrics") or {}
    prices: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("steps", "steps", "", str),
        ("evaluations", "evaluations", "of a U-Net, a picture", str),
        ("seconds_per_image", "s a picture", "", figures.seconds),
        ("time_ratio", "time ratio", "1: one expert", figures.seconds),
        ("memory_bytes", "memory", "of the program", figures.size),
    ]
    shown = [cost for cost in prices if any(method.get(cost[0]) is not None for method in methods)]
    columns = [
        Column("method", number=False, first="ascending"),
        *(Column(m["name"], f"{m['better']} is better", first=_first(m)) for m in metrics),
        *(Column(name, "absent") for name in absent),
        *(Column(name, note, first="ascending") for _, name, note, _ in shown),
    ]
    tops = {metric["name"]: figures.best(metric, methods) for metric in metrics}
    rows = []
    for method in methods:
        cells = [_named(method)]
        for metric in metrics:
            cells.append(_figure(measurement(method.get("metrics"), metric["name"]), metric, tops[metric["name"]]))
        cells += [Cell("absent", title=why) for why in absent.values()]
        for key, _, _, text in shown:
            value = method.get(key)
            cells.append(Cell() if value is None else Cell(text(value), value, _range(method, key)))
        rows.append(cells)
    bounds = [
        [
            Cell(name),
            *(_figure(measurement(bound, metric["name"]), metric)._replace(value=None) for metric in metrics),
            *[Cell()] * (len(absent) + len(shown)),
        ]
        for name, bound in (report.get("bounds") or {}).items()
    ]
    return dict(columns=columns, rows=rows, bounds=bounds)


def _groups(report: Report, methods: Sequence[Method]) -> list[tuple[Metric, bool, Any]]:
    """Return a table for each metric: the metric, whether it is open, columns and rows."""
    names = list(dict.fromkeys(group for method in methods for group in method.get("groups") or {}))
    tables: list[tuple[Metric, bool, Any]] = []
    for metric in report["metrics"]:
        found = {
            group: [measurement((m.get("groups") or {}).get(group), metric["name"]) for m in methods] for group in names
        }
        shown = [group for group in names if any(found[group])]
        if not shown:
            continue
        choose = max if metric["better"] == "higher" else min
        tops = {group: choose(f.value for f in found[group] if f is not None) for group in shown}
        columns = [
            Column("method", number=False, first="ascending"),
            *(Column(group, first=_first(metric)) for group in shown),
        ]
        rows = [
            [_named(method), *(_figure(found[group][index], metric, tops[group]) for group in shown)]
            for index, method in enumerate(methods)
            if any(found[group][index] is not None for group in shown)
        ]
        tables.append((metric, not tables and metric in figures.main_metrics(report), (columns, rows)))
    return tables


def _noise(methods: Sequence[Method]) -> tuple[list[Column], list[list[Cell]]] | None:
    """Return columns and rows of the noise errors, if there are any."""
    measured = [m for m in methods if m.get("noise_mse")]
    if not measured:
        return None
    count = max(len(method["noise_mse"].get("buckets") or []) for method in measured)
    columns = [Column("method", number=False, first="ascending")]
    columns += [Column(name, first="ascending") for name in ("mean", *(f"bucket {i}" for i in range(count)))]
    rows = []
    for method in measured:
        values = [method["noise_mse"].get("mean"), *(method["noise_mse"].get("buckets") or [None] * count)]
        rows.append([_named(method), *(Cell() if number(v) is None else Cell(f"{v:.4f}", v) for v in values)])
    return columns, rows


def _grid(report: Report, methods: Sequence[Method], pictures: Pictures, maps: Pictures | None) -> dict[str, Any]:
    """Return the examples: a row per method, a column per prompt, maps below the pictures."""
    examples = report.get("examples") or {}
    prompts = examples.get("prompts") or []
    known = {method["name"]: method for method in methods}
    rows, mapped = [], False
    for name in examples.get("methods") or list(known):
        cells = []
        for prompt in prompts:
            drawn: list[Embedded] = []
            pixels = pictures(name, prompt)
            own = None if maps is None or pixels is None else maps(name, prompt)
            if pixels is not None:
                drawn.append(_picture(pixels, f"{name}: {prompt}"))
            if pixels is not None and own is not None:
                mapped = True
                drawn.append(_picture(paint(own), f"whom {name} trusted: {prompt}", width=_width(pixels)))
            cells.append(Cell(pictures=drawn))
        if any(cell.pictures for cell in cells):
            rows.append([_named(known[name]) if name in known else Cell(name), *cells])
    return dict(grid=rows, mapped=mapped, prompts=list(prompts), seed=examples.get("seed"))


def _picture(pixels: np.ndarray, alt: str, *, width: int | None = None) -> Embedded:
    wide = pixels.shape[1]
    return image(pixels, alt, scale=max(1, (width or _width(pixels)) // wide), widest=WIDEST)


def _width(pixels: np.ndarray) -> int:
    """Return the width at which the grid shows a picture: small ones are shown twice as large."""
    return min(WIDEST, pixels.shape[1] * (2 if pixels.shape[1] <= WIDEST // 2 else 1))


def _options(report: Report, method: Method) -> str:
    options = dict(method.get("options") or {}) | figures.own_sampling(report, method)
    return json.dumps(options) if options else ""


def _named(method: Method) -> Cell:
    title = f"{method['family']}: {method.get('what') or ''}".rstrip(": ")
    return Cell(method["name"], method["name"], colour=figures.colour(method), title=title)


def _figure(found: Measurement | None, metric: Metric, top: float | None = None) -> Cell:
    """Return a figure with its interval; ``top`` is the best of its column."""
    if found is None:
        return Cell()
    written, interval = figures.written(found.value, metric), figures.interval(found, metric)
    return Cell(written, found.value, interval, best=found.value == top)


def _first(metric: Metric) -> str:
    """Return the sorting order that puts a column's best value at the top."""
    return "descending" if metric["better"] == "higher" else "ascending"


def _range(method: Method, key: str) -> str:
    """Return the least and the greatest measured value, if the method has them."""
    low, high = (number(method.get(f"{key}_{end}")) for end in ("low", "high"))
    return "" if low is None or high is None else f"{figures.seconds(low)} to {figures.seconds(high)}"
