"""Checks of the metrics that a config asks for, and the choice of the main one."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.evaluation.comparison.infos import EMOJI, EMOJI_INFOS, NOISE, MetricInfo
from afa_jax.evaluation.metrics.table import METRICS, check_weights


def figures_of_metric(name: str) -> list[str]:
    """Return the names of a metric's figures: the judge has several, any other metric one."""
    return [info.name for info in EMOJI_INFOS] if name == EMOJI else [name]


def check_metrics(own: ConfigDict) -> None:
    """Check the names in ``evaluation``: ``metrics``, ``weights``, ``main`` and ``stand_out``.

    Raises:
        InputError: a name is unknown, the main metric is not among ``metrics``, or weights do not exist.
    """
    for name in own.metrics:
        if name not in (EMOJI, *METRICS):
            raise InputError(
                f"evaluation.metrics: metric {name!r} is not known; take of {', '.join((EMOJI, *METRICS))}"
            )
    check_weights(given_weights(own))
    asked = [figure for name in own.metrics for figure in figures_of_metric(name)]
    known = dict.fromkeys(figure for name in (EMOJI, *METRICS) for figure in figures_of_metric(name))
    main = own.get("main", "")
    # Without any metric, the config's main one may name a metric that was switched off.
    _check_figure("main", [main] if main else [], [NOISE.name, *(asked or known)])
    _check_figure("stand_out", own.get("stand_out", ()), [NOISE.name, *known])
    if main == NOISE.name and not (own.get("noise") or {}).get("pairs"):
        raise InputError(f"evaluation.main={main!r}: evaluation.noise.pairs is 0; say how many to measure it on")


def _check_figure(field: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"evaluation.{field}={name!r}: it is none of the metrics: {', '.join(known)}")


def given_weights(own: ConfigDict) -> dict[str, str]:
    """Return ``evaluation.weights`` without the empty ones."""
    return {key: path for key, path in (own.get("weights") or {}).items() if path}


def main_metric(name: str, infos: Sequence[MetricInfo], *, noise: bool) -> str:
    """Return the metric that chooses the best methods: ``name``, or the first available one if that is absent.

    Args:
        name: ``evaluation.main``, as check_metrics has checked it, or empty.
        infos: the infos of the available metrics.
        noise: whether the noise MSE is measured, which is the metric if there is no other.

    Returns:
        The metric's name; empty if there is no metric.
    """
    there = [info.name for info in infos]
    if name in there or (name == NOISE.name and noise):
        return name
    instead = there[0] if there else NOISE.name if noise else ""
    if name:
        chosen = f"the best ones are chosen by {instead!r}" if instead else "no best ones are chosen"
        warnings.warn(f"evaluation.main={name!r} is absent; {chosen}", stacklevel=2)
    return instead
