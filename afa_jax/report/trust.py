"""Whom the sites of an ensemble trust at which timestep, over one picture or many: figures and the page maps.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from afa_jax.data.decode import open_image
from afa_jax.fusion.afa import routing_of as sums_of
from afa_jax.report.charts import heat_map, legend_keys, line_chart
from afa_jax.report.escape import escape
from afa_jax.report.page import page, stored_image
from afa_jax.sampling.map_pictures import COLOURS, legend

_DARK = (60, 60, 60)  # of an entropy of 1


class Mean:
    """Mean and standard deviation over pictures, one at a time; nothing of a picture is kept."""

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
        """Mean over the pictures."""
        return self._mean[name]

    def deviation(self, name: str) -> np.ndarray:
        """Standard deviation over the pictures, of their own number."""
        return np.sqrt(self._squares[name] / self.count)


class Drawn(NamedTuple):
    """A picture of the page: its prompt, and its animation (WebP) and sheet (PNG) as files."""

    prompt: str
    animation: bytes
    sheet: bytes


def routing_of(maps: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What kept maps ``[steps, n, h, w]`` by site say: ``fusion.routing.routing_of`` with the steps as its rows."""
    found = sums_of(tuple(jnp.asarray(site).swapaxes(0, 1) for site in maps))
    return {name: np.asarray(values) for name, values in found.items()}


def rounded(routing: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """As JSON values with four decimals."""
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
    """The page: an animation and a sheet for each picture, and heat maps of the statistics."""
    keys = legend_keys(dict(legend(experts)))
    intro = (
        f"<p>{len(sites)} sites of the U-Net, {len(timesteps)} timesteps, from noise (t = {timesteps[0]}) to picture "
        f"(t = {timesteps[-1]}). A pixel's colour is the mixture of the experts' colours by the weights they have "
        f"there: a pure colour is one expert alone.</p>{keys}"
    )
    if drawn:
        intro += (
            '<p class="note">In the animations: the clean picture that each step implies and the mean of all maps; '
            "below them the first, the middle and the last site, and the one whose maps differ most from place to "
            "place. The percentages are mean weights over sites and pixels.</p>"
        )
    sections = [("", intro)]
    for picture in drawn:
        content = _file(picture.animation, "webp", f"animation: {picture.prompt}")
        sheet = _file(picture.sheet, "png", f"maps by site and timestep: {picture.prompt}")
        sections.append((picture.prompt, f'{content}<h3>Every site</h3><div class="wide">{sheet}</div>'))
    if statistics is not None:
        sections.append((f"Over {statistics.count} prompts", _statistics(statistics, sites, timesteps, experts)))
    return page(title, sections)


def _statistics(found: Mean, sites: Sequence[str], timesteps: Sequence[int], experts: Sequence[str]) -> str:
    """Heat maps: sites from the U-Net's input (top) to its output, timesteps from noise to picture."""
    weights, entropy = found.mean("weights"), found.mean("entropy")
    columns = [f"t={t}" for t in timesteps]
    cell = (max(8, min(18, 420 // len(timesteps))), 15)
    label = "training timestep: left noise, right picture"
    panels = []
    for index, name in enumerate(experts):
        colour = COLOURS[index % len(COLOURS)].tolist()
        chart = heat_map(weights[:, :, index].T, sites, columns, colour, x_label=label, size=cell)
        panels.append(f"<h3>{escape(name)}: {weights[:, :, index].mean():.2f} on average</h3>{chart}")
    chart = heat_map(entropy.T, sites, columns, _DARK, x_label=label, size=cell)
    panels.append(f"<h3>Entropy: {entropy.mean():.2f} on average</h3>{chart}")
    times = [float(t) for t in timesteps]
    curves = [
        (name, colour, list(zip(times, weights[:, :, i].mean(1).tolist(), strict=True)))
        for i, (name, colour) in enumerate(legend(experts))
    ]
    lines = line_chart(
        curves, x_label="training timestep: right noise, left picture", y_label="mean weight", size=(640, 260)
    )
    spread = found.deviation("weights").mean()
    return (
        "<p>Means over pixels and prompts, one picture a prompt. Weights: white is 0, the full colour is 1. Entropy: "
        "white is 0, one expert alone at each pixel; dark is 1, all alike. From prompt to prompt a site's mean weight "
        f"at a timestep has a standard deviation of {spread:.3f} on average.</p>"
        f'<div class="pair">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>'
        f"<h3>Mean over the sites</h3>{lines}"
    )


def _file(data: bytes, kind: str, alt: str) -> str:
    with open_image(data) as picture:
        return stored_image(data, kind, alt, picture.size)
