"""Each expert's weight by site and timestep, for one picture or many: figures and the page maps.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from afa_jax.data.decode import open_image
from afa_jax.fusion.afa import routing_of as sums_of
from afa_jax.report.charts import line_chart
from afa_jax.report.pages import Embedded, heat_map, render, stored_image
from afa_jax.sampling.map_pictures import COLOURS, legend

_DARK = (60, 60, 60)  # the colour of an entropy of 1


class Mean:
    """A running mean and standard deviation over pictures; no picture's own values are kept."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: dict[str, np.ndarray] = {}
        self._squares: dict[str, np.ndarray] = {}

    def add(self, routing: Mapping[str, np.ndarray]) -> None:
        """Add a picture's ``weights`` ``[steps, sites, n]`` and ``entropy`` ``[steps, sites]`` (Welford's sums)."""
        self.count += 1
        for name, values in routing.items():
            values = np.asarray(values, np.float64)
            old = self._mean.setdefault(name, np.zeros_like(values))
            new = old + (values - old) / self.count
            self._squares[name] = self._squares.get(name, np.zeros_like(values)) + (values - old) * (values - new)
            self._mean[name] = new

    def mean(self, name: str) -> np.ndarray:
        """Return the mean over the pictures."""
        return self._mean[name]

    def deviation(self, name: str) -> np.ndarray:
        """Return the population standard deviation over the pictures (divided by their number)."""
        return np.sqrt(self._squares[name] / self.count)


class Drawn(NamedTuple):
    """A picture of the page: its prompt, and its animation (WebP) and sheet (PNG) as files."""

    prompt: str
    animation: bytes
    sheet: bytes


def routing_of(maps: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Summarise kept maps ``[steps, n, h, w]`` by site: ``fusion.routing.routing_of`` with the steps as its rows."""
    found = sums_of(tuple(jnp.asarray(site).swapaxes(0, 1) for site in maps))
    return {name: np.asarray(values) for name, values in found.items()}


def rounded(routing: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the routing as JSON values with four decimals."""
    return {name: np.asarray(values, np.float64).round(4).tolist() for name, values in routing.items()}


def maps_page(
    title: str,
    drawn: Sequence[Drawn],
    statistics: Mean | None,
    *,
    sites: Sequence[str],
    timesteps: Sequence[int],
    experts: Sequence[str],
) -> str:
    """Return the page: an animation and a sheet for each picture, and heat maps of the statistics."""
    return render(
        "maps.html",
        title=title,
        sites=len(sites),
        timesteps=timesteps,
        legend=legend(experts),
        drawn=[
            (
                own.prompt,
                _file(own.animation, "webp", f"animation: {own.prompt}"),
                _file(own.sheet, "png", f"maps by site and timestep: {own.prompt}"),
            )
            for own in drawn
        ],
        statistics=None if statistics is None else _statistics(statistics, sites, timesteps, experts),
    )


def _statistics(found: Mean, sites: Sequence[str], timesteps: Sequence[int], experts: Sequence[str]) -> dict[str, Any]:
    """Draw heat maps: sites from the U-Net's input (top) to its output, timesteps from noise to picture."""
    weights, entropy = found.mean("weights"), found.mean("entropy")
    names = [*((name, COLOURS[i % len(COLOURS)].tolist()) for i, name in enumerate(experts)), ("Entropy", _DARK)]
    labels: dict[str, Any] = dict(rows=sites, columns=[f"t={t}" for t in timesteps])
    panels = []
    for (name, colour), values in zip(names, [*np.moveaxis(weights, -1, 0), entropy], strict=True):
        chart = heat_map(values.T, colour=colour, x_label="training timestep: left noise, right picture", **labels)
        panels.append((f"{name}: {values.mean():.2f} on average", chart))
    times = [float(t) for t in timesteps]
    curves = [
        (name, colour, list(zip(times, weights[:, :, i].mean(1).tolist(), strict=True)))
        for i, (name, colour) in enumerate(legend(experts))
    ]
    x_label = "training timestep: right noise, left picture"
    lines = line_chart(curves, x_label=x_label, y_label="mean weight", size=(640, 260))
    return dict(count=found.count, spread=found.deviation("weights").mean(), panels=panels, lines=lines)


def _file(data: bytes, kind: str, alt: str) -> Embedded:
    with open_image(data) as picture:
        return stored_image(data, kind, alt, picture.size)
