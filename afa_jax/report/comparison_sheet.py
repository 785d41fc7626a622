"""Pictures of a comparison as one picture, for a README: a row for each method, a column for each prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from afa_jax.data.pictures import read_png, read_recipe
from afa_jax.errors import InputError
from afa_jax.report import figures
from afa_jax.report.maps import paint, with_legend
from afa_jax.report.sheet import labelled_grid

_WIDTH = 128  # pixels that small pictures are enlarged to
_WIDEST = 256  # and that large ones are made smaller to


def comparison_sheet(folder: Path, methods: Sequence[str] = (), prompts: int | None = None) -> Image.Image:
    """Draw what ``afa_jax.evaluate`` left in a folder, report.json and pictures/.

    Below the pictures of a method is whom its maps trusted where, if they were kept.

    Args:
        folder: with both.
        methods: names, in the order of the rows; the report's examples if there are none.
        prompts: how many columns; all of the report's examples for None.

    Raises:
        InputError: no such report, a method that it does not have, or pictures that are not there.
    """
    path = folder / "report.json"
    report = figures.read_report(path)
    examples, rows = report.get("examples") or {}, {row["name"]: row for row in report["methods"]}
    if prompts is not None and prompts < 1:
        raise InputError(f"--prompts {prompts}; choose 1 or more")
    asked, seed = (examples.get("prompts") or [])[:prompts], examples.get("seed", 0)
    chosen = list(methods or examples.get("methods") or rows)
    if not asked or not chosen:
        raise InputError(f"{path}: no examples in it; make it again with afa_jax.evaluate")
    for name in chosen:
        if name not in rows:
            raise InputError(f"{path}: no method {name!r}; it has {figures.names_of(report['methods'])}")
        if not rows[name].get("folder"):
            raise InputError(f"{path}: it does not say where the pictures are; make it again with afa_jax.evaluate")
    folders = [folder / "pictures" / rows[name]["folder"] for name in chosen]
    files = _files(folders[0], seed)
    drawn: list[list[np.ndarray | None]] = []
    labels: list[str] = []
    mapped = False
    for name, own in zip(chosen, folders, strict=True):
        for prompt in asked:
            if prompt not in files or not (own / files[prompt]).is_file():
                raise InputError(f"{own}: no picture of {prompt!r} with seed {seed}; make it with afa_jax.evaluate")
        pictures = [_sized(read_png(own / files[prompt])) for prompt in asked]
        drawn.append([*pictures])
        labels.append(name)
        maps = _maps(own)
        if any(prompt in maps for prompt in asked):
            mapped = True
            tiles = [paint(maps[prompt]) if prompt in maps else None for prompt in asked]
            drawn.append([*tiles])
            labels.append(f"whom {name} trusted where")
    sheet = labelled_grid(drawn, labels, asked, scale=max(1, _WIDTH // drawn[0][0].shape[1]))  # type: ignore[union-attr]
    names = [expert["name"] for expert in (report.get("config") or {}).get("experts") or []]
    return with_legend(sheet, names) if mapped else sheet


def _files(folder: Path, seed: int) -> dict[str, str]:
    """The names of one seed's pictures by prompt, as their recipes say; they are the same in every method's folder."""
    found = {}
    for path in sorted(folder.glob(f"*_{seed}.png")):
        prompt = read_recipe(path).get("prompt")
        if isinstance(prompt, str):
            found[prompt] = path.name
    return found


def _maps(folder: Path) -> Mapping[str, np.ndarray]:
    """The mean maps ``[n, h, w]`` that were kept beside a method's pictures, by prompt."""
    try:
        kept = json.loads((folder / "maps.json").read_bytes())["measured"]
        return {prompt: np.asarray(maps, np.float32) for prompt, maps in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _sized(pixels: np.ndarray) -> np.ndarray:
    """A picture, made smaller if it is wider than _WIDEST."""
    rows, columns = pixels.shape[:2]
    if columns <= _WIDEST:
        return pixels
    size = (_WIDEST, max(1, round(rows * _WIDEST / columns)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
