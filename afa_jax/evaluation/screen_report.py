"""The routing screen's report, as printed lines and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afa_jax.errors import printable
from afa_jax.evaluation.screen import GainEstimate, RoutingGain
from afa_jax.experts.checks import Mismatch
from afa_jax.logs import LOGGER
from afa_jax.weights.compare import Difference

NAME = 80  # the most letters of a printed name


def log_mismatches(names: Sequence[str], found: Sequence[Mismatch]) -> None:
    """Log whether each expert fits the base model and the first expert; if not, every reason on its own line."""
    LOGGER.info("prediction type, noise schedule and architecture")
    for name in names:
        for message in [mismatch.message for mismatch in found if mismatch.expert == name] or ["fits"]:
            LOGGER.info(f"  {printable(name, NAME):22}{printable(message)}")


def log_weights(pairs: Mapping[tuple[str, str], Difference]) -> None:
    """Log the relative differences of the weights, with one line per block and one column per pair."""
    heads = [f"{printable(one, NAME)} - {printable(other, NAME)}" for one, other in pairs]
    found = list(pairs.values())
    widths = [max(16, len(head) + 2) for head in heads]

    def line(head: str, cells: Sequence[str]) -> None:
        LOGGER.info(f"  {head:28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

    LOGGER.info("\nrelative L2 difference of the weights")
    line("", heads)
    for block in found[0].blocks:
        line(block, [f"{pair.blocks[block]:.5f}" for pair in found])
    line("least", [f"{pair.blocks[pair.least]:.5f}" for pair in found])
    line("most", [f"{pair.blocks[pair.most]:.5f}" for pair in found])
    line("total", [f"{pair.total:.5f}" for pair in found])
    line("", [pair.kind for pair in found])


def log_gain(names: Sequence[str], gain: RoutingGain, conditions: str) -> None:
    """Log gains, errors and shares, one line per bucket of timesteps; bucket 0 has the least noise."""
    names = [printable(name, NAME) for name in names]
    width = max(9, *(len(name) + 2 for name in names))

    def line(head: str, first: Sequence[str], errors: Sequence[str], shares: Sequence[str]) -> None:
        cells = [f"{cell:>{size}}" for cell, size in zip(first, (6, 16), strict=True)]
        groups = ("".join(f"{cell:>{width}}" for cell in group) for group in (errors, shares))
        LOGGER.info(f"  {head:10}" + "".join(cells) + "  |" + "  |".join(groups))

    def figures(head: str, estimate: GainEstimate, routed: float, single: np.ndarray, share: np.ndarray) -> None:
        interval = f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
        errors = [f"{error:.4f}" for error in (routed, *single)]
        line(head, (f"{100 * estimate.gain:.1f}", interval), errors, [f"{part:.2f}" for part in share])

    LOGGER.info(f"\ncross-noise routing gain in percent, noise MSE, and share of the elements; {conditions}")
    line("", ("gain", "95 % interval"), ("routed", *names), names)
    for number, estimate in enumerate(gain.buckets):
        figures(f"bucket {number}", estimate, gain.routed[number], gain.single[:, number], gain.share[:, number])
    figures("all", gain.total, gain.routed.mean(), gain.single.mean(1), gain.share.mean(1))
    LOGGER.info(f"  best single expert: {names[gain.best]}; bucket 0 has the least noise")


def record(names: Sequence[str], gain: RoutingGain) -> dict[str, Any]:
    """Return the measurement as JSON values, with the experts by name."""

    def figures(estimate: GainEstimate, routed: Any, single: np.ndarray, share: np.ndarray) -> dict[str, Any]:
        mse = dict(routed=float(routed), single=dict(zip(names, single.tolist(), strict=True)))
        return estimate._asdict() | dict(mse=mse, share=dict(zip(names, share.tolist(), strict=True)))

    rows = zip(gain.buckets, gain.routed, gain.single.T, gain.share.T, strict=True)
    return dict(
        best_single=names[gain.best],
        total=figures(gain.total, gain.routed.mean(), gain.single.mean(1), gain.share.mean(1)),
        buckets=[figures(*row) for row in rows],
    )
