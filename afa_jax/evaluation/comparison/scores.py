"""Scores of pictures, and from them a method's figures with intervals over prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import Protocol, runtime_checkable

from afa_jax.data.decode import MAX_PIXELS, decode, longest_file
from afa_jax.data.files import filesystem
from afa_jax.data.pictures import read_png
from afa_jax.data.sources import read_file
from afa_jax.errors import BadExample, InputError
from afa_jax.evaluation.bootstrap import BootstrapEstimate, Resamples, kernel, mean, without_interval
from afa_jax.evaluation.comparison.infos import EMOJI, EMOJI_INFOS, MetricInfo
from afa_jax.evaluation.comparison.pictures import PictureFolder
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.evaluation.emoji import scores as emoji
from afa_jax.evaluation.metrics.table import PictureMetric, SetMetric, load_metrics
from afa_jax.files import partial_file
from afa_jax.progress import progress

Scores = Mapping[str, np.ndarray]
"""Arrays ``[prompts, seeds, ...]`` by name: a score of each picture, or the features that a metric of sets needs."""

REAL = ("fid", "fid_clean", "kid", "clip_i")
"""Published metrics that compare pictures to the prompts' real pictures."""
LEAST: Mapping[str, int] = {"fid": 2, "fid_clean": 2, "kid": 3, "is": 10}
"""The fewest pictures for which each of these metrics is defined."""
CHUNK = 64  # pictures in memory at once


@runtime_checkable
class Scorer(Protocol):
    """One or several metrics that are computed together."""

    @property
    def name(self) -> str: ...

    @property
    def infos(self) -> tuple[MetricInfo, ...]: ...

    @property
    def weights(self) -> str:
        """Return the identity of the weights that it measures with: kept scores are used only with the same weights."""
        ...

    def of(self, items: Sequence[Item]) -> Scorer:
        """Return the same scorer for other prompts."""
        ...

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Score pictures, uint8 ``[k, rows, columns, 3]``, each with its item; return arrays ``[k, ...]``."""
        ...

    def figures(
        self, scores: Scores, resamples: Resamples, rows: Sequence[int] | None = None
    ) -> dict[str, BootstrapEstimate]:
        """Return a figure for each of ``infos``, over all prompts or some."""
        ...


class EmojiScorer:
    """The judge's accuracies and the kernel distance of emoji pictures; the items are those of ``kind="emoji"``."""

    name = EMOJI
    infos = EMOJI_INFOS

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.real = emoji.real_features(items).reshape(len(items), 2, -1)

    @property
    def weights(self) -> str:
        return emoji.weights()

    def of(self, items: Sequence[Item]) -> EmojiScorer:
        return EmojiScorer(items)

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> dict[str, np.ndarray]:
        return emoji.emoji_scores(pictures, [item.asked for item in items if item.asked is not None])

    def figures(
        self, scores: Scores, resamples: Resamples, rows: Sequence[int] | None = None
    ) -> dict[str, BootstrapEstimate]:
        figures = {i.name: mean(scores[i.name], resamples, rows) for i in self.infos if i.level == "picture"}
        features = scores["features"]
        places = features.reshape(len(features), -1, features.shape[-1])
        figures["kid"] = kernel(places, self.real, resamples, rows)
        return figures


class PublishedScorer:
    """One metric of evaluation/metrics/, or several that share a network.

    A figure of a set of pictures is computed from all of them and needs thousands: it has none by group. Among such
    figures only the kernel distance has an interval.

    Args:
        metric: the metric.
        items: the prompts, optionally with real pictures.
        size: (rows, columns) of the pictures, to which real ones are cut.
        weights: identifies the metric's weights.
    """

    def __init__(
        self, metric: PictureMetric | SetMetric, items: Sequence[Item], size: tuple[int, int], weights: str = ""
    ):
        self.metric, self.infos, self.size, self.weights = metric, metric.infos, size, weights
        self.name = "-".join(info.name for info in self.infos)
        self.real: np.ndarray | None = None
        if isinstance(metric, SetMetric) and all(item.reference is not None for item in items):
            parts = [metric.features(references_of(chunk, size)) for chunk in chunks(items, f"real, {self.name}")]
            self.real = np.concatenate(parts)

    def of(self, items: Sequence[Item]) -> PublishedScorer:
        return PublishedScorer(self.metric, items, self.size, self.weights)

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> dict[str, np.ndarray]:
        if isinstance(self.metric, SetMetric):
            return dict(features=self.metric.features(list(pictures)))
        wanted = any(info.name in REAL for info in self.infos)
        references = references_of(items, self.size) if wanted else []
        return self.metric(list(pictures), [item.prompt for item in items], references or None)

    def figures(
        self, scores: Scores, resamples: Resamples, rows: Sequence[int] | None = None
    ) -> dict[str, BootstrapEstimate]:
        if not isinstance(self.metric, SetMetric):
            return {name: mean(values, resamples, rows) for name, values in scores.items()}
        if rows is not None:
            return {}
        features = scores["features"].reshape(-1, scores["features"].shape[-1])
        try:
            # Without real pictures only metrics that need none are computed, such as the inception score.
            values = self.metric.distance(features, features if self.real is None else self.real)
        except ValueError:  # too few pictures
            return {}
        figures = {name: without_interval(value, resamples) for name, value in values.items()}
        if "kid" in figures and self.real is not None:
            figures["kid"] = kernel(scores["features"], self.real[:, None], resamples)
        return figures


def references_of(items: Sequence[Item], size: tuple[int, int]) -> list[np.ndarray]:
    """Return the items' real pictures, uint8, resized (bicubic) to just cover ``size`` and cropped to its centre.

    Raises:
        InputError: a picture cannot be read.
    """
    return [cut(item.reference, size) for item in items if item.reference is not None]


def check_references(items: Sequence[Item], size: tuple[int, int]) -> None:
    """Raise InputError for a real picture that is missing or cannot be read, before any pictures are made."""
    for item in items:
        if item.reference is not None and not item.reference.is_file():
            raise InputError(
                f"{item.reference}: the reference picture of {item.prompt[:200]!r} is not there; mend the prompts"
            )
    for chunk in chunks(items, "real pictures"):  # read to the end: a file may be cut off there
        references_of(chunk, size)


def cut(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a real picture, resize it and crop its centre; see references_of."""
    rows, columns = size
    fs, inner = filesystem(str(path))
    try:
        picture = Image.fromarray(decode(read_file(fs, inner, str(path), longest_file(MAX_PIXELS)), str(path)))
    except BadExample as error:
        raise InputError(f"{path}: a reference picture that cannot be read ({error.reason}); mend it") from error
    scale = max(rows / picture.height, columns / picture.width)
    height, width = max(rows, round(picture.height * scale)), max(columns, round(picture.width * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(resized[top : top + rows, left : left + columns])


def load_scorers(
    names: Sequence[str],
    items: Sequence[Item],
    weights: Mapping[str, str],
    *,
    size: tuple[int, int],
    seeds: int = 1,
) -> tuple[list[Scorer], dict[str, str]]:
    """Load the scorers of metrics (``emoji`` or published ones); return also why some are absent, by name.

    Args:
        names: the metrics' names.
        items: the prompts.
        weights: ``evaluation.weights``, see load_metrics.
        size: (rows, columns) of the pictures.
        seeds: the number of pictures of each prompt.

    Raises:
        InputError: a name is unknown, or a real picture cannot be read.
    """
    scorers: list[Scorer] = []
    absent: dict[str, str] = {}
    if EMOJI in names:
        if any(item.asked is None for item in items):
            absent[EMOJI] = "it judges the prompts of evaluation.prompts.kind=emoji only"
        elif tuple(size) != emoji.SIZE:
            absent[EMOJI] = f"it judges pictures of {emoji.SIZE[0]}x{emoji.SIZE[1]} pixels only"
        else:
            try:
                scorers.append(EmojiScorer(items))
            except InputError as error:  # the judge's own files
                absent[EMOJI] = str(error)
    others = [name for name in names if name != EMOJI]
    count = len(items) * seeds
    for name in others:
        if name in REAL and any(item.reference is None for item in items):
            absent[name] = "it compares to real pictures, and the prompts have none"
        elif count < LEAST.get(name, 0) or (name == "kid" and len(items) < LEAST[name]):
            absent[name] = f"{count} pictures of {len(items)} prompts are too few for it"
    metrics, missing = load_metrics([name for name in others if name not in absent], weights)
    if any(info.name in REAL for metric in metrics for info in metric.infos):
        check_references(items, size)
    which = hashlib.sha256(json.dumps({key: identity(Path(path)) for key, path in weights.items()}).encode())
    published = [PublishedScorer(metric, items, size, which.hexdigest()) for metric in metrics]
    return [*scorers, *published], absent | missing


def scored(
    scorers: Sequence[Scorer], folder: PictureFolder, items: Sequence[Item], seeds: Sequence[int]
) -> list[Scores]:
    """Return the scores of a method's pictures by each scorer, computed a few pictures at a time.

    They are kept beside the pictures for a continued comparison, and used while pictures, real pictures and the
    scorer's weights are the same files.
    """
    jobs = [(item, seed) for item in items for seed in seeds]
    stamps = {folder.path(*job).name: identity(folder.path(*job)) + identity(job[0].reference) for job in jobs}
    found = [_Kept(folder.folder / f"scores-{scorer.name}.npz", scorer.weights, stamps) for scorer in scorers]
    kept = [own.read() for own in found]
    wanted = [i for i, scores in enumerate(kept) if scores is None]
    parts: dict[int, list[dict[str, np.ndarray]]] = {i: [] for i in wanted}
    for chunk in chunks(jobs, "scores") if wanted else ():
        pictures = np.stack([read_png(folder.path(item, seed)) for item, seed in chunk])
        for i in wanted:
            parts[i].append(scorers[i].score(pictures, [item for item, _ in chunk]))
    for i in wanted:
        whole = {key: np.concatenate([part[key] for part in parts[i]]) for key in parts[i][0]}
        found[i].write(whole)
        kept[i] = whole
    shape = (len(items), len(seeds))
    return [{key: array.reshape(*shape, *array.shape[1:]) for key, array in (own or {}).items()} for own in kept]


def chunks(jobs: Sequence[Any], what: str) -> Any:
    """Return an iterator over the jobs, CHUNK at a time, that shows progress."""
    parts = [jobs[first : first + CHUNK] for first in range(0, len(jobs), CHUNK)]
    return progress(parts, desc=what, unit=f"{CHUNK} image", leave=False)


def identity(path: Path | None) -> list[int]:
    """Return a file's size and time of last change, for a folder their sums over its files: both detect a change."""
    if path is None:
        return [0, 0]
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = [file.stat() for file in files]
    return [sum(stat.st_size for stat in found), sum(stat.st_mtime_ns for stat in found) % 2**62]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Scores in a file by picture, with the identities of the picture and of the scorer's weights.

    Attributes:
        path: the path of the file.
        weights: the identity of the scorer's weights.
        stamps: the ``identity`` of each picture and of its real picture, by the picture's name.
    """

    path: Path
    weights: str
    stamps: Mapping[str, Sequence[int]]

    def read(self) -> dict[str, np.ndarray] | None:
        """Return these pictures' scores in order; None unless all are there and were computed from the same files."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                rows = {str(name): row for row, name in enumerate(file["names"])}
                own = [rows[name] for name in self.stamps]
                if str(file["weights"]) != self.weights or file["stamps"][own].tolist() != [*self.stamps.values()]:
                    return None
                return {key[1:]: file[key][own] for key in file.files if key.startswith("_")}
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
            return None

    def write(self, scores: Mapping[str, np.ndarray]) -> None:
        """Write the scores atomically."""
        names, stamps = np.asarray([*self.stamps]), np.asarray([*self.stamps.values()], np.int64)
        own: Any = {f"_{key}": array for key, array in scores.items()}
        with partial_file(self.path) as partial, open(partial, "wb") as file:
            np.savez(file, names=names, stamps=stamps, weights=np.asarray(self.weights), **own)


def bounds_of(
    scorers: Sequence[Scorer], items: Sequence[Item], reconstruct: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """Return the best and the worst values to expect, by the emoji judge; empty without it."""
    return emoji.bounds(items, reconstruct) if any(scorer.name == EMOJI for scorer in scorers) else {}
