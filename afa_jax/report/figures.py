"""Readers of report.json for tables and charts: methods in order, values as text, and the best value.

Any value may be null or absent. It is then None here, and an empty cell in every table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from afa_jax.errors import InputError, why
from afa_jax.report.shape import check_report

FAMILIES = {
    "control": "#777777",
    "parameter space": "#e69f00",
    "output space": "#0072b2",
    "feature space": "#cc79a7",
    "time axis": "#009e73",
    "AFA": "#d55e00",
    "ablation": "#8c6bb1",
}
"""The families of methods in the order of every table, with their colours."""

VERSION = 1
Report = Mapping[str, Any]
Method = Mapping[str, Any]
Metric = Mapping[str, Any]


class Measurement(NamedTuple):
    """A figure and its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of ``afa_jax.evaluate`` from a file.

    Raises:
        InputError: the file does not exist, is no JSON, or is no such report.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the report.json that afa_jax.evaluate wrote") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({why(error)}); make it again with afa_jax.evaluate") from error
    if isinstance(report, dict) and report.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: a report of version {report['version']!r:.20}, this is for version {VERSION}")
    check_report(report, str(path))
    return report


def by_family(report: Report) -> list[Method]:
    """Return the methods sorted by family, within a family in the report's order."""
    order = list(FAMILIES)
    return sorted(report["methods"], key=lambda m: order.index(m["family"]) if m["family"] in order else len(order))


def colour(method: Method) -> str:
    """Return the colour of a method's family."""
    return FAMILIES.get(method["family"], "#333333")


def main_metrics(report: Report) -> list[Metric]:
    """Return the metrics that the report marks as main; if it marks none, the first one."""
    return [metric for metric in report["metrics"] if metric.get("main")] or list(report["metrics"][:1])


def metric_named(report: Report, name: str) -> Metric:
    """Return the report's metric of this name.

    Raises:
        InputError: the report has no such metric; the error lists its metrics.
    """
    for metric in report["metrics"]:
        if metric["name"] == name:
            return metric
    known = ", ".join(metric["name"] for metric in report["metrics"])
    raise InputError(f"the report has no metric {name!r}; it has {known}")


def measurement(figures: Mapping[str, Any] | None, name: str) -> Measurement | None:
    """Return the figure of this name, from a dict with value, low and high or from a plain number; None if missing."""
    found = (figures or {}).get(name)
    if isinstance(found, Mapping):
        value = number(found.get("value"))
        return None if value is None else Measurement(value, number(found.get("low")), number(found.get("high")))
    value = number(found)
    return None if value is None else Measurement(value)


def number(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def best(metric: Metric, methods: Iterable[Method]) -> float | None:
    """Return the best value of a metric among some methods; None if none has it."""
    found = [
        f.value for f in (measurement(method.get("metrics"), metric["name"]) for method in methods) if f is not None
    ]
    if not found:
        return None
    return max(found) if metric["better"] == "higher" else min(found)


def written(value: float | None, metric: Metric, *, sign: bool = False) -> str:
    """Return a value as text with the metric's digits; "" for None."""
    if value is None:
        return ""
    digits = 3 if metric.get("digits") is None else metric["digits"]
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if not float(text) and not sign else text


def interval(found: Any, metric: Metric, *, sign: bool = False) -> str:
    """Return a measurement's 95 % interval as text; "" if it has none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{written(found.low, metric, sign=sign)} to {written(found.high, metric, sign=sign)}"


def size(value: float | int | None) -> str:
    """Format a number of bytes for people; "" for None."""
    if value is None:
        return ""
    power = min(3, max(0, int(math.log2(value) // 10))) if value else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def seconds(value: float | None) -> str:
    """Format seconds with three significant digits, from 100 on as whole seconds; "" for None."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def protocol_sentence(report: Report) -> str:
    """Return one paragraph of plain text on how the pictures were made and the intervals computed."""
    p = report["protocol"]
    seeds, resamples = p.get("seeds") or [], p.get("resamples")
    parts = [f"{p['prompts']} {'prompt' if p['prompts'] == 1 else 'prompts'}"]
    if groups := p.get("groups"):
        parts[0] += f" ({', '.join(f'{name} {count}' for name, count in groups.items())})"
    if seeds:
        parts.append(f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))})")
    text = (
        f"{' and '.join(parts)}, the same for every method, each picture from the same starting noise. "
        f"{str(p.get('sampler', 'ddim')).upper()}, {p['steps']} steps, guidance {p['guidance']:g}, "
        f"eta {p.get('eta') or 0:g} where a method has none of its own"
    )
    if shape := p.get("size"):
        text += f", {shape[0]} x {shape[1]} pixels (rows x columns)"
    text += f"; measured on {report['device']}." if report.get("device") else "."
    if resamples:
        has = {metric["name"]: _has_intervals(report, metric["name"]) for metric in report["metrics"]}
        without = [name for name, found in has.items() if found is False]
        if True in has.values():
            text += f" Intervals: 95 %, bootstrap over prompts ({resamples:,} resamples)"
            text += f"; without: {', '.join(without)}." if without else "."
        elif without:
            text += " Without intervals" + (", which one prompt cannot have." if p["prompts"] == 1 else ".")
    if absent := report.get("absent_metrics"):
        text += f" Not measured, being absent: {', '.join(absent)}."
    return text


def _has_intervals(report: Report, metric: str) -> bool | None:
    """Return whether a metric's figures have intervals; None if it has no figures."""
    found = [own for method in report["methods"] if (own := measurement(method.get("metrics"), metric)) is not None]
    return any(own.low is not None for own in found) if found else None


def own_sampling(report: Report, method: Method) -> dict[str, Any]:
    """Return a method's steps, guidance, its part of the path and eta as far as they differ from the shared ones."""
    shared = report["protocol"]
    return {
        field: method[field]
        for field in ("steps", "guidance", "guidance_interval", "eta")
        if method.get(field) is not None and method[field] != shared.get(field)
    }


def reference_name(report: Report, key: str) -> str | None:
    """Return the name of the method that ``against[key]`` compares with; None if there is none."""
    return (report.get("references") or {}).get(key)


def names_of(items: Sequence[Mapping[str, Any]]) -> str:
    """Return the items' names, joined by commas."""
    return ", ".join(str(item["name"]) for item in items)
