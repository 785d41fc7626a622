"""The page of a comparison, from what ``afa_jax.evaluate`` measured: report.json -> report.html.

Tables that can be sorted, paired differences, quality against cost, curves, groups, and the pictures themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.files import replace_text
from afa_jax.report import figures
from afa_jax.report.charts import legend_keys, swatch
from afa_jax.report.comparison_charts import costs, curves, differences
from afa_jax.report.escape import escape
from afa_jax.report.figures import FAMILIES, Figure, Method, Report, figure, number
from afa_jax.report.page import Cell, Column, image, page, sortable_table, table
from afa_jax.sampling.map_pictures import legend, paint

Pictures = Callable[[str, str], np.ndarray | None]
WIDEST = 256  # pixels of a picture in the grid


def write_comparison(
    out: Path, report: Report, pictures: Pictures, maps: Pictures | None = None, experts: Sequence[str] = ()
) -> None:
    """Write ``out/report.html``.

    Args:
        out: a folder that is there.
        report: report.json.
        pictures: (method, prompt) -> uint8 ``[rows, columns, 3]``, or None where there is no such picture.
        maps: (method, prompt) -> ``[n, h, w]``, the mean of a picture's maps, or None; drawn below the picture.
        experts: names of the n experts, for the maps' legend.
    """
    replace_text(out / "report.html", comparison(report, pictures, maps, experts))


def comparison(report: Report, pictures: Pictures, maps: Pictures | None = None, experts: Sequence[str] = ()) -> str:
    """The page as text; see write_comparison."""
    sections = [
        ("", _intro(report)),
        ("All methods", _methods(report)),
        *differences(report),
        ("Quality against cost", costs(report)),
        ("Quality over steps and over time", curves(report)),
        ("By group of prompts", _groups(report)),
        ("Error of the predicted noise", _noise(report)),
        ("Pictures", _grid(report, pictures, maps, experts)),
        ("What each method is", _recipes(report)),
        ("What is not here", _absent(report)),
    ]
    name = (report.get("config") or {}).get("name", "")
    title = f"{len(report['methods'])} methods compared" + (f": {name}" if name else "")
    return page(title, [(heading, content) for heading, content in sections if content])


def _intro(report: Report) -> str:
    whats = "".join(
        f"<dt>{escape(m['name'])} ({escape(m['better'])} is better)</dt><dd>{escape(m['what'])}</dd>"
        for m in report["metrics"]
    )
    own = f" Written by afa_jax {escape(str(report['afa_jax']))}." if report.get("afa_jax") else ""
    families = {name: FAMILIES[name] for name in FAMILIES if any(m["family"] == name for m in report["methods"])}
    text = f"<p>{escape(figures.protocol_sentence(report))}{own}</p>{legend_keys(families)}"
    return text + (f"<details><summary>What the metrics are</summary><dl>{whats}</dl></details>" if whats else "")


def _methods(report: Report) -> str:
    """All methods and metrics, with the bounds below."""
    methods, metrics = figures.by_family(report), report["metrics"]
    columns = [Column("method", number=False, first="ascending")]
    columns += [
        Column(m["name"], f"{m['better']} is better", first="descending" if m["better"] == "higher" else "ascending")
        for m in metrics
    ]
    prices: list[tuple[str, str, Callable[[Any], str]]] = [
        ("steps", "", str),
        ("evaluations", "of a U-Net, a picture", str),
        ("seconds_per_image", "", figures.seconds),
        ("time_ratio", "1: one expert", figures.seconds),
        ("memory_bytes", "of the program", figures.size),
    ]
    absent = report.get("absent_metrics") or {}
    columns += [Column(name, "absent") for name in absent]
    shown = [cost for cost in prices if any(method.get(cost[0]) is not None for method in methods)]
    columns += [Column(_spelled(key), note, first="ascending") for key, note, _ in shown]
    tops = {metric["name"]: figures.best(metric, methods) for metric in metrics}
    rows = []
    for method in methods:
        cells = [Cell(_named(method), method["name"])]
        for metric in metrics:
            found = figure(method.get("metrics"), metric["name"])
            top = found is not None and found.value == tops[metric["name"]]
            cells.append(Cell(_with_interval(found, metric), None if found is None else found.value, top))
        cells += [Cell(f'<span title="{escape(why)}">absent</span>') for why in absent.values()]
        for key, _, text in shown:
            value = method.get(key)
            cells.append(Cell("" if value is None else escape(text(value)) + _range(method, key), value))
        rows.append(cells)
    foot = []
    for name, bound in (report.get("bounds") or {}).items():
        cells = [Cell(escape(name))]
        cells += [Cell(_with_interval(figure(bound, metric["name"]), metric)) for metric in metrics]
        foot.append(cells + [Cell("")] * (len(absent) + len(shown)))
    note = "A click on a column's head sorts by it. The best value of a column is bold; small: 95 % intervals"
    note += ", of the time ratio the least and the greatest of its rounds. Seconds are the ratio times one expert's."
    if foot:
        note += " Below the line: what the measures say of real pictures, not methods."
    return f'<p class="note">{note}</p>' + sortable_table(columns, rows, foot)


def _groups(report: Report) -> str:
    methods = figures.by_family(report)
    names = list(dict.fromkeys(group for method in methods for group in method.get("groups") or {}))
    tables: list[str] = []
    for metric in report["metrics"]:
        columns, rows = [Column("method", number=False, first="ascending")], []
        first = "descending" if metric["better"] == "higher" else "ascending"
        found = {
            group: [figure((m.get("groups") or {}).get(group), metric["name"]) for m in methods] for group in names
        }
        shown = [group for group in names if any(found[group])]
        if not shown:
            continue
        columns += [Column(group, first=first) for group in shown]
        choose = max if metric["better"] == "higher" else min
        tops = {group: choose(f.value for f in found[group] if f is not None) for group in shown}
        for index, method in enumerate(methods):
            own = [(group, found[group][index]) for group in shown]
            if any(f is not None for _, f in own):
                cells = [
                    Cell(_with_interval(f, metric), *((f.value, f.value == tops[group]) if f is not None else ()))
                    for group, f in own
                ]
                rows.append([Cell(_named(method), method["name"]), *cells])
        main = metric in figures.main_metrics(report)
        head = f"{escape(metric['name'])} ({metric['better']} is better)"
        grid = sortable_table(columns, rows)
        tables.append(f"<details{' open' if main and not tables else ''}><summary>{head}</summary>{grid}</details>")
    alone = [group for group, count in (report["protocol"].get("groups") or {}).items() if count == 1]
    note = f"Without intervals, for they are of one prompt: {', '.join(alone)}." if alone and tables else ""
    return (f'<p class="note">{escape(note)}</p>' if note else "") + "".join(tables)


def _noise(report: Report) -> str:
    measured = [m for m in figures.by_family(report) if m.get("noise_mse")]
    if not measured:
        return ""
    count = max(len(method["noise_mse"].get("buckets") or []) for method in measured)
    columns = [Column("method", number=False, first="ascending"), Column("mean", first="ascending")]
    columns += [Column(f"bucket {i}", first="ascending") for i in range(count)]
    rows = []
    for method in measured:
        values = [method["noise_mse"].get("mean"), *(method["noise_mse"].get("buckets") or [None] * count)]
        cells = [Cell("", None) if number(v) is None else Cell(f"{v:.4f}", v) for v in values]
        rows.append([Cell(_named(method), method["name"]), *cells])
    note = (
        "Mean squared error on real pictures, by equal parts of the timesteps; bucket 0 has the least noise. "
        "No verdict: a method with a lower error can draw worse pictures."
    )
    return f"<p>{note}</p>" + sortable_table(columns, rows)


def _grid(report: Report, pictures: Pictures, maps: Pictures | None, experts: Sequence[str]) -> str:
    examples = report.get("examples") or {}
    prompts = examples.get("prompts") or []
    known = {method["name"]: method for method in figures.by_family(report)}
    chosen = examples.get("methods") or list(known)
    rows, mapped = [], False
    for name in chosen:
        cells = []
        for prompt in prompts:
            pixels = pictures(name, prompt)
            cell = "" if pixels is None else _picture(pixels, f"{name}: {prompt}")
            own = None if maps is None or pixels is None else maps(name, prompt)
            if own is not None and pixels is not None:
                mapped = True
                cell += _picture(paint(own), f"whom {name} trusted: {prompt}", width=_width(pixels))
            cells.append(cell)
        if any(cells):
            rows.append([_named(known[name]) if name in known else escape(name), *cells])
    if not rows:
        return ""
    seed = f"seed {examples['seed']}; " if examples.get("seed") is not None else ""
    text = f"<p>{seed}every picture of a column from the same starting noise. They are examples, not a measurement.</p>"
    if mapped:
        text += (
            f"<p>Below a picture: whom the maps trusted where. {''.join(swatch(*key) for key in legend(experts))}</p>"
        )
    return text + table(["method", *prompts], rows)


def _picture(pixels: np.ndarray, alt: str, *, width: int | None = None) -> str:
    wide = pixels.shape[1]
    return image(pixels, alt, scale=max(1, (width or _width(pixels)) // wide), widest=WIDEST)


def _width(pixels: np.ndarray) -> int:
    """Of a picture in the grid: small ones twice as large."""
    return min(WIDEST, pixels.shape[1] * (2 if pixels.shape[1] <= WIDEST // 2 else 1))


def _recipes(report: Report) -> str:
    rows = []
    for method in figures.by_family(report):
        options = dict(method.get("options") or {}) | figures.own_sampling(report, method)
        recipe = f"<code>{escape(method['recipe'])}</code>" if method.get("recipe") else ""
        own = f"<code>{escape(json.dumps(options))}</code>" if options else ""
        kind = escape(str(method.get("kind") or ""))
        rows.append([_named(method), escape(method.get("what") or ""), kind, own, recipe])
    return table(["method", "what it does", "kind", "options of its own", "made or trained by"], rows)


def _absent(report: Report) -> str:
    content = ""
    for key, what in (("absent_methods", "Methods"), ("absent_metrics", "Metrics")):
        if reasons := report.get(key):
            lines = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in reasons.items())
            content += f"<h3>{what}</h3><ul>{lines}</ul>"
    return content


def _named(method: Method) -> str:
    title = escape(f"{method['family']}: {method.get('what') or ''}".rstrip(": "))
    mark = f'<span class="swatch" style="background:{figures.colour(method)}"></span>'
    return f'<span title="{title}">{mark}{escape(method["name"])}</span>'


def _with_interval(found: Figure | None, metric: Mapping[str, Any]) -> str:
    if found is None:
        return ""
    between = figures.interval(found, metric)
    return figures.written(found.value, metric) + (f"<small>{between}</small>" if between else "")


def _range(method: Method, key: str) -> str:
    """The least and the greatest of what was measured, where the method says them."""
    low, high = (number(method.get(f"{key}_{end}")) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"<small>{figures.seconds(low)} to {figures.seconds(high)}</small>"


def _spelled(key: str) -> str:
    return dict(
        evaluations="evaluations", seconds_per_image="s a picture", time_ratio="time ratio", memory_bytes="memory"
    ).get(key, key)
