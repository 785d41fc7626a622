"""The tables that ``afa_jax.convert`` prints about checkpoints, at most 120 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from afa_jax.logs import LOGGER
from afa_jax.weights.compare import Difference

WIDTH = 120
_PAIRS = 5  # columns of a table


def log_components(components: Mapping[str, Mapping[str, Any]]) -> None:
    """Log a line for each network: tensors, bytes, dtypes, sha256."""
    for name, own in components.items():
        counts = f"{own['tensors']:6}  {size(own['bytes']):>9}  {dtypes(own):20}"
        LOGGER.info(f"  {name:13}{counts}  {own.get('sha256', '')}".rstrip())


def log_description(name: str, found: Mapping[str, Any]) -> None:
    """Log a checkpoint's description by ``weights.describe``."""
    LOGGER.info(shorten(name, WIDTH))
    rows = {"container": found["container"], "family": found.get("family", "no U-Net in it")}
    if unet := found.get("unet"):
        widths, heads = (" ".join(map(str, unet[field])) for field in ("block_out_channels", "heads"))
        rows["U-Net"] = (
            f"{unet['in_channels']} to {unet['out_channels']} channels, widths {widths}, "
            f"cross-attention {unet['cross_attention_dim']}, heads {heads}"
        )
    if not found["problem"]:
        rows["prediction"] = found.get("prediction_type", "not known")
    if "stored" in found:
        stored = found["stored"]
        rows["file"] = f"{stored['tensors']} tensors, {size(stored['bytes'])}, {dtypes(stored)}"
        rows["sha256"] = found["sha256"]
    if found.get("unused"):
        average = ", among them the moving average of the U-Net (--ema)" if found["ema"] else ""
        rows["not used"] = f"{found['unused']} tensors of the file{average}"
    if found["others"]:
        rows["also"] = ", ".join(found["others"])
    bad = found["nonfinite"]
    rows["not finite"] = f"{len(bad)} tensors: {', '.join(bad)}" if bad else "nothing"
    if "resembles" in found:
        rows["resembles"] = found["resembles"]["sentence"]
    if found["problem"]:
        rows["cannot be used"] = found["problem"]
    for head, value in rows.items():
        wrapped = head in ("cannot be used", "resembles", "not finite")
        lines = textwrap.wrap(printable(value), WIDTH - 20)[:4] if wrapped else [shorten(value, WIDTH - 20)]
        LOGGER.info(f"  {shorten(head, 80):<18}" + f"\n{'':20}".join(lines))
    if found["metadata"]:
        LOGGER.info("  metadata")
    for key, value in found["metadata"].items():
        LOGGER.info(shorten(f"    {key}: {value}", WIDTH))
    log_components(found["components"])


def log_pairs(pairs: Mapping[tuple[str, str], Difference], numbers: Mapping[str, int]) -> None:
    """Log the relative differences of inputs, a block a line and a pair a column, some columns at a time."""
    LOGGER.info("\nrelative L2 difference of the weights, ||a - b|| / ||(a + b) / 2||")
    for name, number in numbers.items():
        LOGGER.info(f"  {number:2}  {shorten(name, WIDTH - 6)}")
    keys = list(pairs)
    for first in range(0, len(keys), _PAIRS):
        chosen = keys[first : first + _PAIRS]
        LOGGER.info(f"\n  {'':28}" + "".join(f"{f'{numbers[a]} - {numbers[b]}':>16}" for a, b in chosen))
        cells = [{block: f"{value:.5f}" for block, value in pairs[key].blocks.items()} for key in chosen]
        for block in dict.fromkeys(block for own in cells for block in own):
            LOGGER.info(f"  {shorten(block, 28):28}" + "".join(f"{own.get(block, ''):>16}" for own in cells))
        LOGGER.info(f"  {'total':28}" + "".join(f"{pairs[key].total:16.5f}" for key in chosen))
        LOGGER.info(f"  {'':28}" + "".join(f"{pairs[key].kind:>16}" for key in chosen))


def resemblance(found: Mapping[str, Difference | None]) -> dict[str, Any]:
    """Return the nearest expert and all distances; None in ``found`` stands for another architecture."""
    apart = {name: own for name, own in found.items() if own is not None}
    totals = {name: apart[name].total for name in sorted(apart, key=lambda name: apart[name].total)}
    if not totals:
        return dict(nearest=None, totals={}, sentence="none of the config's experts: they have other architectures")
    nearest, *others = totals
    said = f"{nearest}: total relative difference {totals[nearest]:.5f}, {apart[nearest].kind}"
    rest = ", ".join(f"{name} {totals[name]:.5f}" for name in others)
    return dict(nearest=nearest, totals=totals, sentence=said + (f"; the others: {rest}" if rest else ""))


def duplicates(pairs: Mapping[tuple[str, str], Difference], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each pair of inputs that are the same file or have (nearly) the same weights."""
    lines = []
    for one, other in combinations(found, 2):
        apart = pairs.get((one, other))
        if "sha256" in found[one] and found[one]["sha256"] == found[other].get("sha256"):
            lines.append(f"duplicate: {one} and {other} are the same file")
        elif apart is not None and apart.kind == "identical":
            lines.append(f"duplicate: {one} and {other} have the same weights")
        elif apart is not None and apart.kind == "near-identical":
            lines.append(f"near-duplicate: {one} and {other} differ by {apart.total:.1e}, no more than rounding does")
    return lines


def log_table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Log rows of cells, the first on the left and the others on the right of their columns."""
    for first, *rest in rows:
        cells = "".join(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        LOGGER.info(f"  {shorten(first, widths[0]):{widths[0]}}{cells}".rstrip())


def size(count: int) -> str:
    """Format a number of bytes for people: 1.72 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def dtypes(component: Mapping[str, Any]) -> str:
    """Return a component's dtypes as text, with each one's number of tensors if there are several."""
    counts = component["dtypes"]
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def printable(text: str) -> str:
    """Return text from a file on one line, with a space for every character that a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(text: str, width: int) -> str:
    """Return text from a file, cut to a width."""
    text = printable(text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."
