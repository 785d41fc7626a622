"""A comparison of methods: the same prompts, seeds and sampler for all, from entries of a config to figures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.errors import NotFinite, printable
from afa_jax.evaluation.bootstrap import BootstrapEstimate, Resamples, wins, without_interval
from afa_jax.evaluation.comparison.cost import cost_of
from afa_jax.evaluation.comparison.infos import NOISE
from afa_jax.evaluation.comparison.pictures import PictureFolder, record_of
from afa_jax.evaluation.comparison.programs import release_programs
from afa_jax.evaluation.comparison.prompts import Item, fewer
from afa_jax.evaluation.comparison.scores import Scorer, Scores, scored
from afa_jax.logs import LOGGER
from afa_jax.methods.entries import Entry, is_permuted
from afa_jax.methods.method import Method, Models, NotTrained, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.records import recorded
from afa_jax.training.noise_error import bucket_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that all methods share.

    Attributes:
        items, seeds: the prompts and seeds; each prompt gets a picture with each seed.
        options: options of sampling; a method may have its own eta, steps and guidance.
        scorers: the metrics.
        main: the name of the metric that chooses the best expert and the best merge; empty if there is none.
        resamples: resamples of the prompts, for the intervals.
        pairs: pictures and captions for the noise MSE; None to leave it out.
        root: the folder of the pictures.
    """

    items: Sequence[Item]
    seeds: Sequence[int]
    options: SampleOptions
    scorers: Sequence[Scorer]
    main: str
    resamples: Resamples
    pairs: tuple[np.ndarray, Sequence[str]] | None
    root: Path

    @property
    def infos(self) -> list[Any]:
        """Return the MetricInfo of all metrics, including the noise MSE if it is the main one."""
        noise = [NOISE] if self.main == NOISE.name else []
        return [*noise, *(info for scorer in self.scorers for info in scorer.infos)]

    def options_of(self, method: Method) -> SampleOptions:
        """Return the options with which a method samples."""
        return method.sampled_with(self.options)

    def folder_of(self, method: Method) -> PictureFolder:
        """Return the folder of a method's pictures."""
        return PictureFolder(self.root, record_of(method, self.options_of(method)), method.name)

    def make(self, method: Method) -> PictureFolder:
        """Make a method's missing pictures."""
        release_programs()  # the names of the methods before it
        folder = self.folder_of(method)
        folder.make(method, self.options_of(method), self.items, self.seeds)
        return folder

    def groups(self) -> dict[str, list[int]]:
        """Return the prompts' positions by group."""
        names = dict.fromkeys(item.group for item in self.items)
        return {name: [i for i, item in enumerate(self.items) if item.group == name] for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's figures. The method itself is left out, because its networks must not stay in memory.

    Attributes:
        row: its row in report.json, without the comparisons to others.
        entry: the entry that the method was made from.
        scores: the scores of single pictures, by scorer.
        figures: the figures over all prompts, by metric.
        pictures: the folder of its pictures.
    """

    row: dict[str, Any]
    entry: Entry
    scores: Sequence[Scores]
    figures: Mapping[str, BootstrapEstimate]
    pictures: PictureFolder


def measure(entry: Entry, models: Models, protocol: Protocol, reference: Method) -> Measured:
    """Make a method's missing pictures, score them, and take its cost and noise MSE.

    Raises:
        NotTrained: its trained part is missing.
    """
    method = make_method(entry, models)
    options, folder = protocol.options_of(method), protocol.make(method)
    cost = cost_of(method, options, (reference, protocol.options), folder, [item.prompt for item in protocol.items])
    scores = scored(protocol.scorers, folder, protocol.items, protocol.seeds)
    figures, noise = figures_of(protocol, scores), noise_of(method, protocol, folder)
    if noise is not None and protocol.main == NOISE.name:
        figures[NOISE.name] = without_interval(noise["mean"], protocol.resamples)
    row = dict(
        name=method.name,
        kind=method.kind,
        family=method.family,
        what=method.what,
        options=recorded(method.options, "options"),
        steps=options.steps,
        eta=options.eta,
        guidance=options.guidance,
        **({} if options.guidance_interval == (0.0, 1.0) else dict(guidance_interval=list(options.guidance_interval))),
        # Of a method whose work depends on the picture, as it was counted.
        evaluations=round(cost["work"]["done"], 1) if "work" in cost else method.evaluations(options),
        **{key: value for key, value in cost.items() if key != "ratio_of"},
        pictures=len(protocol.items) * len(protocol.seeds),
        folder=folder.folder.name,
        metrics={name: figure.to_json() for name, figure in figures.items()},
        groups={
            group: {name: figure.to_json() for name, figure in figures_of(protocol, scores, rows).items()}
            for group, rows in protocol.groups().items()
        },
        noise_mse=noise,
        recipe=method.recipe,
        record=dict(method.record),
    )
    kept = [{name: values for name, values in own.items() if name in row["metrics"]} for own in scores]
    return Measured(row=row, entry=entry, scores=kept, figures=figures, pictures=folder)


def noise_of(method: Method, protocol: Protocol, folder: PictureFolder) -> dict[str, Any] | None:
    """Return a method's noise MSE on the protocol's pairs, kept beside its pictures; None without pairs.

    It is a property of the prediction, independent of the sampling: None also for a method with sampling options of its
    own, and for a PathDenoiser.
    """
    if protocol.pairs is None or method.on_path or method.sampling:
        return None
    pixels, captions = protocol.pairs
    condition = hashlib.sha256(pixels.tobytes() + "\n".join(captions).encode()).hexdigest()

    def noise() -> dict[str, Any]:
        denoiser: Any = method.denoiser
        buckets = bucket_errors(denoiser, method.experts, pixels, captions, batch=protocol.options_of(method).batch)
        return dict(mean=float(np.mean(buckets)), buckets=buckets)

    return folder.kept("noise", condition, noise)


def figures_of(
    protocol: Protocol, scores: Sequence[Scores], rows: Sequence[int] | None = None
) -> dict[str, BootstrapEstimate]:
    """Return the figures of all metrics, over all prompts or some."""
    result: dict[str, BootstrapEstimate] = {}
    for scorer, own in zip(protocol.scorers, scores, strict=True):
        result |= scorer.figures(own, protocol.resamples, rows)
    return result


def references(measured: Sequence[Measured], protocol: Protocol) -> dict[str, str]:
    """Return the names of the methods that the others are compared to: best expert, best merge and AFA, if present."""
    sign = next((-1 for info in protocol.infos if info.name == protocol.main and info.better == "lower"), 1)

    def best(rows: Sequence[Measured]) -> str | None:
        values = {m.row["name"]: sign * m.figures[protocol.main].value for m in rows if protocol.main in m.figures}
        values = {name: value for name, value in values.items() if np.isfinite(value)}
        return max(values, key=lambda name: values[name]) if values else None

    found = dict(
        # Only at the shared number of steps: a method with another number is listed to compare times.
        best=best([m for m in measured if m.row["kind"] == "expert" and m.row["steps"] == protocol.options.steps]),
        # A model from a file may be anything: a fine-tune is no merge.
        merge=best([m for m in measured if m.row["family"] == "parameter space" and m.row["kind"] != "checkpoint"]),
        afa=next((m.row["name"] for m in measured if m.row["kind"] == "afa" and m.row["family"] == "AFA"), None),
    )
    return {key: name for key, name in found.items() if name is not None}


def compare(measured: Sequence[Measured], protocol: Protocol) -> dict[str, str]:
    """Add to each row its paired differences to the references; return the references' names."""
    named, by_name = references(measured, protocol), {m.row["name"]: m for m in measured}
    for one in measured:
        one.row["against"] = {}
        for key, name in named.items():
            other = by_name[name]
            if other is one:
                continue
            one.row["against"][key] = {
                info.name: _difference(one, other, info)
                for info in protocol.infos
                if info.name in one.figures and info.name in other.figures
            }
    return named


def _difference(one: Measured, other: Measured, info: Any) -> dict[str, Any]:
    apart = one.figures[info.name].minus(other.figures[info.name]).to_json()
    result = dict(difference=apart["value"], low=apart["low"], high=apart["high"])
    for own, others in zip(one.scores, other.scores, strict=True):
        if info.level == "picture" and info.name in own:
            result |= wins(own[info.name], others[info.name], info.better == "higher")
    return result


def at_equal_time(measured: Measured) -> Entry | None:
    """Return a costlier method's entry with as many steps as fit in one expert's time; None if it is not costlier."""
    steps = measured.row["steps"]
    fewer = max(1, int(steps / measured.row["time_ratio"]))
    if fewer >= steps:
        return None
    name = f"{measured.row['name']} in one expert's time"
    return dict(measured.entry) | dict(
        name=name, steps=fewer, family="control", what=f"{fewer} steps instead of {steps}"
    )


def at_equal_time_of(measured: Sequence[Measured], wanted: Sequence[str]) -> list[Entry]:
    """Return ``at_equal_time`` of the methods in ``wanted``; for "all", of those at least 1.5 times as costly."""
    if "all" in wanted:
        # A method with its own steps already compares times, and an expert inside the ensemble is the expert alone.
        costly = [one for one in measured if one.row["time_ratio"] >= 1.5 and "steps" not in one.entry]
        chosen = [one for one in costly if one.row["kind"] != "inside" and not is_permuted(one.entry)]
    else:
        chosen = [one for one in measured if one.row["name"] in wanted]
    return [entry for one in chosen if (entry := at_equal_time(one)) is not None]


def curves(
    config: ConfigDict, entries: Mapping[str, Entry], models: Models, protocol: Protocol, reference: Method
) -> list[dict[str, Any]]:
    """Measure quality over steps and seconds for some methods, on ``prompts`` prompts, taken evenly from the groups.

    Args:
        config: ``evaluation.curves``: methods (names), steps, prompts, seeds.
        entries: the methods' entries by name.
        models, protocol: as in measure.
        reference: the method of one expert.
    """
    if not (config.get("methods") and protocol.scorers):  # the noise MSE is the same for any number of steps
        return []
    items = fewer(protocol.items, config.prompts)
    smaller = dataclasses.replace(
        protocol,
        items=items,
        seeds=tuple(config.seeds),
        pairs=None,
        resamples=Resamples(prompts=len(items), count=protocol.resamples.count),
        scorers=[scorer.of(items) for scorer in protocol.scorers],
    )
    result = []
    for name in (name for name in config.methods if name in entries):
        points = []
        for steps in config.steps:
            entry = dict(entries[name]) | dict(name=f"{name} {steps} steps", steps=steps)
            LOGGER.info(printable(f"curve: {entry['name']}"))
            try:
                row = measure(entry, models, smaller, reference).row
            except (NotTrained, NotFinite):  # the method's own row says so
                break
            wanted = ("steps", "evaluations", "reference_seconds", "time_ratio", "metrics")
            points.append({key: row[key] for key in wanted})
        if points:
            result.append(dict(method=name, prompts=len(items), seeds=list(smaller.seeds), points=points))
    return result


def with_seconds(rows: Sequence[dict[str, Any]]) -> None:
    """Add to rows and points of curves their seconds a picture: their ratio times the seconds of one expert.

    The seconds of one expert are the median over all measurements, one beside each method. Hours lie between the first
    and the last, and a shared machine's speed may double in between, which must not count as a difference of methods.
    """
    common = float(np.median([row["reference_seconds"] for row in rows]))
    for row in rows:
        row["seconds_per_image"] = row["time_ratio"] * common
