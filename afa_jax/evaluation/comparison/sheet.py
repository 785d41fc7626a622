"""A comparison's pictures as one picture for a README: a row for each method, a column for each prompt."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from afa_jax.data.pictures import read_png
from afa_jax.errors import InputError
from afa_jax.evaluation.comparison.picture_files import PICTURES, find_picture, folders_by_name, read_index
from afa_jax.files import SHEET, write_output
from afa_jax.report import figures
from afa_jax.report.sheet import labelled_grid
from afa_jax.sampling.map_pictures import paint, with_legend

_REPORT = "report.json"
_WIDTH = 128  # the size in pixels to which small pictures are enlarged
_WIDEST = 256  # the size in pixels to which large pictures are reduced


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Comparison:
    """The contents of a sheet.

    Attributes:
        source: the file or folder that describes them.
        folders: the folders of the methods' pictures, by name; None for a folder that the source does not state.
        methods: the names of the rows, in their order.
        prompts, seed: the examples' prompts and seed.
        experts: the experts' names, for the maps' legend.
        whole: whether the source states that all of these pictures were made.
    """

    source: Path
    folders: Mapping[str, Path | None]
    methods: Sequence[str]
    prompts: Sequence[str]
    seed: int
    experts: Sequence[str] = ()
    whole: bool = True


def comparison_sheet(folder: Path, methods: Sequence[str] = (), prompts: int | None = None) -> Image.Image:
    """Draw the pictures of a folder of ``afa_jax.evaluate``, which has report.json and pictures/, or only the latter.

    A method's maps are drawn below its pictures if they were kept. Without a report and without ``methods``, all
    existing pictures are drawn.

    Args:
        folder: the folder; the report of a selection uses the pictures of its parent folder.
        methods: names in the order of the rows; those of the comparison if empty.
        prompts: the number of columns; None for all examples.

    Raises:
        InputError: there is neither a report nor pictures, or a method or its pictures are missing.
    """
    found = _read(folder)
    if prompts is not None and prompts < 1:
        raise InputError(f"--prompts {prompts}; choose 1 or more")
    asked, chosen = found.prompts[:prompts], list(methods or found.methods)
    if not asked or not chosen:
        raise InputError(f"{found.source}: no examples in it; make it again with afa_jax.evaluate")
    drawn: list[list[np.ndarray | None]] = []
    labels: list[str] = []
    mapped = False
    for name in chosen:
        own = _folder_of(name, found)
        files = [find_picture(own, prompt, found.seed) for prompt in asked]
        missing = [prompt for prompt, file in zip(asked, files, strict=True) if not file.is_file()]
        if missing and (methods or found.whole):
            said = f"no picture of {missing[0][:200]!r} with seed {found.seed}"
            raise InputError(f"{own}: {said}; make it with afa_jax.evaluate")
        if len(missing) == len(asked):
            continue
        drawn.append([_sized(read_png(file)) if file.is_file() else None for file in files])
        labels.append(name)
        maps = _maps(own)
        if any(prompt in maps for prompt in asked):
            mapped = True
            tiles = [paint(maps[prompt]) if prompt in maps else None for prompt in asked]
            drawn.append([*tiles])
            labels.append(f"whom {name} trusted where")
    first = next((pixels for row in drawn for pixels in row if pixels is not None), None)
    if first is None:
        raise InputError(f"{found.source}: no pictures in it; make them with afa_jax.evaluate")
    sheet = labelled_grid(drawn, labels, asked, scale=max(1, _WIDTH // first.shape[1]))
    return with_legend(sheet, found.experts) if mapped else sheet


def pictures_sheet(root: Path, methods: Sequence[str]) -> Image.Image:
    """Draw the example pictures below ``root`` by its index: a row for each method that has pictures.

    Raises:
        InputError: there is no index, or there are no pictures.
    """
    index, folders = read_index(root), folders_by_name(root)
    prompts, seed = index["examples"], index["seeds"][0]
    rows = {
        name: [find_picture(folders[name], prompt, seed) for prompt in prompts] for name in methods if name in folders
    }
    drawn = {
        name: [_sized(read_png(file)) if file.is_file() else None for file in files] for name, files in rows.items()
    }
    drawn = {name: row for name, row in drawn.items() if any(picture is not None for picture in row)}
    first = next((picture for row in drawn.values() for picture in row if picture is not None), None)
    if first is None:
        raise InputError(f"{root}: no pictures of {', '.join(methods)[:200]}; make them with afa_jax.evaluate")
    return labelled_grid(list(drawn.values()), list(drawn), prompts, scale=max(1, _WIDTH // first.shape[1]))


def _folder_of(name: str, found: _Comparison) -> Path:
    if name not in found.folders:
        raise InputError(f"{found.source}: no method {name!r}; it has {', '.join(found.folders)}")
    own = found.folders[name]
    if own is None:
        raise InputError(f"{found.source}: it does not say where the pictures are; make it again with afa_jax.evaluate")
    return own


def _read(folder: Path) -> _Comparison:
    """Read the report in a folder, or if there is none the index of its pictures."""
    roots = (folder / PICTURES, folder.parent / PICTURES)
    root = next((root for root in roots if root.is_dir()), roots[0])
    path, named = folder / _REPORT, folders_by_name(root)
    if root.is_dir() and not path.exists():
        index = read_index(root)
        names = [name for name in index["methods"] if name in named]
        prompts, seed = index["examples"], index["seeds"][0]
        return _Comparison(source=root, folders=named, methods=names, prompts=prompts, seed=seed, whole=False)
    report = figures.read_report(path)
    examples, rows = report.get("examples") or {}, {row["name"]: row for row in report["methods"]}
    folders = {name: root / str(row["folder"]) if row.get("folder") else None for name, row in rows.items()}
    return _Comparison(
        source=path,
        folders=folders | {name: own for name, own in named.items() if name not in folders},
        methods=examples.get("methods") or [*rows],
        prompts=examples.get("prompts") or [],
        seed=examples.get("seed", 0),
        experts=[expert["name"] for expert in (report.get("config") or {}).get("experts") or []],
    )


def write_sheet(folder: Path, methods: Sequence[str], prompts: int | None, out: Path) -> None:
    """Write the pictures of a comparison, a row for each method and a column for each prompt."""
    SHEET.check(out)
    data, made_by = io.BytesIO(), PngImagePlugin.PngInfo()
    made_by.add_text("Software", "afa_jax")
    comparison_sheet(folder, methods, prompts).save(data, format="PNG", optimize=True, pnginfo=made_by)
    write_output(out, data.getvalue())


def _maps(folder: Path) -> Mapping[str, np.ndarray]:
    """Read the mean maps ``[n, h, w]`` that were kept beside a method's pictures, by prompt; empty if unreadable."""
    try:
        kept = json.loads((folder / "maps.json").read_bytes())["measured"]
        found = {prompt: np.asarray(maps, np.float32) for prompt, maps in kept.items()}
        return {prompt: maps for prompt, maps in found.items() if maps.ndim == 3 and maps.size}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _sized(pixels: np.ndarray) -> np.ndarray:
    """Shrink a picture to _WIDEST if it is wider."""
    rows, columns = pixels.shape[:2]
    if columns <= _WIDEST:
        return pixels
    size = (_WIDEST, max(1, round(rows * _WIDEST / columns)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
