"""A comparison of every method of a config: pictures, figures with intervals, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.emoji.scenes import UNSEEN, SceneSource
from afa_jax.data.held_out import choose_pairs
from afa_jax.data.loader import loading
from afa_jax.data.sources import make_source
from afa_jax.errors import InputError, NotFinite, printable, some
from afa_jax.evaluation.bootstrap import Resamples
from afa_jax.evaluation.comparison.comparison import (
    Measured,
    Protocol,
    at_equal_time_of,
    compare,
    curves,
    measure,
    with_seconds,
)
from afa_jax.evaluation.comparison.main_metric import given_weights, main_metric
from afa_jax.evaluation.comparison.picture_files import PICTURES, write_index
from afa_jax.evaluation.comparison.prompts import fewer, load_items
from afa_jax.evaluation.comparison.results import (
    assemble,
    bounds,
    example_maps,
    example_prompts,
    log_table,
    write,
    write_sheet,
)
from afa_jax.evaluation.comparison.scores import load_scorers
from afa_jax.files import check_folder
from afa_jax.logs import LOGGER
from afa_jax.methods.entries import Entry, entries_of
from afa_jax.methods.method import Models, NotTrained, check_entry, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.methods.specs import parse_method
from afa_jax.records import recorded


def evaluate(
    config: ConfigDict,
    out: Path,
    *,
    workdir: Path | None = None,
    methods: Sequence[str] | None = None,
    prompts: int | None = None,
    pictures_only: bool = False,
) -> dict[str, Any] | None:
    """Make pictures, measure and compare them, write report.json and report.html, and return the report.

    Args:
        out: the folder of pictures and report; the report of a part of the methods or prompts goes to ``part`` in it.
        workdir: a trained run, a folder or a hub id, for methods that name none.
        methods: the methods to compare, named in the config's list or given as KIND[,OPTION=VALUE]...; all by default.
        prompts: the number of prompts, taken evenly from the groups; all by default.
        pictures_only: make pictures, but no report.

    Raises:
        InputError: the config, its models, prompts or data cannot be used.
        NotFinite: a method computes no finite pictures; raised at the end, after all other methods.
    """
    own = config.evaluation
    check_fields(own)
    for folder in (out, out / PICTURES, out / "part"):
        check_folder(folder)
    recorded(config)  # raises if the config cannot be written as JSON
    sampling = sample_options(config)
    known = entries_of(config)
    entries = chosen(known, methods)
    items = fewer(load_items(own.prompts), prompts)
    pairs = None if pictures_only else noise_pairs(config)
    models = Models(config, workdir, sampling.steps)
    sampling.check(models.experts)
    if pairs is not None:
        models.experts.check_size(pairs[0].shape[1:3])
    models.experts.tokenizer([item.prompt for item in items])  # unknown words are found before the work
    reference = make_method(dict(kind="expert", expert=models.experts.names[0]), models)
    protocol = Protocol(
        items=items,
        seeds=tuple(own.seeds),
        options=sampling,
        scorers=[],
        main="",
        resamples=Resamples(prompts=len(items), count=own.resamples),
        pairs=pairs,
        root=out / PICTURES,
    )
    place = out / "part" if methods or prompts else out
    index: dict[str, Any] = dict(
        methods=list(dict.fromkeys([*known, *entries])),  # each process that shares the work names some of the methods
        prompts=[item.prompt for item in items],
        examples=example_prompts(protocol, config),
        seeds=protocol.seeds,
    )
    if pictures_only:
        check_methods(entries, ConfigDict(), models)
        write_index(protocol.root, **index)
        without = Absent()
        for number, (name, entry) in enumerate(entries.items(), 1):
            LOGGER.info(printable(f"{name} ({number} of {len(entries)})"))
            with without.noted(name):
                protocol.make(make_method(entry, models))
        write_sheet(out, place, list(entries))
        without.check()
        return None
    weights = given_weights(own)
    scorers, absent_metrics = load_scorers(own.metrics, items, weights, size=sampling.size, seeds=len(own.seeds))
    for name, why in absent_metrics.items():
        LOGGER.info(printable(f"without {name}: {why}"))
    if not scorers:
        LOGGER.info(f"no metric is there: pictures{', noise MSE' if pairs is not None else ''} and costs")
    infos = [info for scorer in scorers for info in scorer.infos]
    main = main_metric(own.get("main", ""), infos, noise=pairs is not None)
    protocol = dataclasses.replace(protocol, scorers=scorers, main=main)

    check_methods(entries, own.get("curves") or ConfigDict(), models)
    write_index(protocol.root, **index)
    measured: list[Measured] = []
    without = Absent()
    for number, (name, entry) in enumerate(entries.items(), 1):
        LOGGER.info(printable(f"{name} ({number} of {len(entries)})"))
        with without.noted(name):
            measured.append(measure(entry, models, protocol, reference))
    if not measured:
        raise InputError("no method could be measured: " + "; ".join(f"{n}: {why}" for n, why in without.why.items()))
    for one in at_equal_time_of(measured, own.get("equal_time", ())):
        LOGGER.info(printable(one["name"]))
        with without.noted(one["name"]):
            measured.append(measure(one, models, protocol, reference))
    named = compare(measured, protocol)
    lines = curves(own.get("curves") or ConfigDict(), entries, models, protocol, reference)
    with_seconds([*(one.row for one in measured), *(point for line in lines for point in line["points"])])
    report = assemble(config, protocol, measured, named, without.why, absent_metrics, lines, bounds(models, protocol))
    trusted = example_maps(measured, named.get("afa"), models, protocol, report["examples"]["prompts"])
    write(place, report, measured, protocol, trusted, models.experts.names)
    log_table(report)
    write_sheet(out, place, list(entries))
    LOGGER.info(place / "report.html")
    without.check()
    return report


class Absent:
    """The methods that a comparison leaves out.

    Attributes:
        why: the reason that the report gives, by method.
        broken: methods whose networks compute no finite picture; the others are only not trained yet.
    """

    def __init__(self) -> None:
        self.why: dict[str, str] = {}
        self.broken: list[str] = []

    @contextlib.contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Note a method that is not trained or not finite in this context, and continue without it."""
        try:
            yield
        except (NotTrained, NotFinite) as error:
            self.why[name] = str(error)
            LOGGER.info(f"  left out: {error}")
            if isinstance(error, NotFinite):
                self.broken.append(name)

    def check(self) -> None:
        """Raise NotFinite if a method is broken; called at the end, when all others are written."""
        if self.broken:
            raise NotFinite(
                f"{some(self.broken)}: left out, for {self.why[self.broken[0]]}; all the other methods are there"
            )


def check_methods(entries: Mapping[str, Entry], curves: ConfigDict, models: Models) -> None:
    """Raise InputError for a method that cannot be built from these models, before any pictures are made."""
    if curves.get("methods"):
        for field in ("steps", "prompts", "seeds"):
            if not curves.get(field):
                raise InputError(f"evaluation.curves.{field} is missing; configs/emoji.py shows what it says")
        for name in curves.methods:
            for steps in curves.steps:
                check_entry(dict(entries.get(name, dict(kind="uniform"))) | dict(steps=steps))
    for entry in entries.values():
        with contextlib.suppress(NotTrained):
            make_method(entry, models)


def check_fields(own: ConfigDict) -> None:
    """Raise InputError if ``evaluation`` lacks a required field."""
    for field in ("prompts", "seeds", "metrics", "resamples", "methods"):
        if field not in own:
            raise InputError(f"evaluation.{field} is missing; configs/emoji.py shows what it says")
    if not own.seeds:
        raise InputError("evaluation.seeds has none; choose one or more, such as (0,)")


def sample_options(config: ConfigDict) -> SampleOptions:
    """Return the sampling options of ``evaluation``; those that it lacks come from ``sample``."""
    own, shared = config.evaluation, config.sample
    return SampleOptions(
        size=tuple(own.get("size", shared.size)),
        steps=own.get("steps", shared.steps),
        guidance=float(own.get("guidance", shared.guidance)),
        eta=float(own.get("eta", 0.0)),
        batch=own.get("batch", shared.batch),
        one_by_one=own.get("one_by_one", None),
    )


def chosen(entries: Mapping[str, Entry], names: Sequence[str] | None) -> dict[str, Entry]:
    """Return the methods that ``--method`` names, from the config's list or by kind; without names, the whole list."""
    if not names:
        return dict(entries)
    result: dict[str, Entry] = {}
    for name in names:
        if name in entries:
            result[name] = entries[name]
        else:
            entry = parse_method(name)
            check_entry(entry)
            result[str(entry.setdefault("name", name))] = entry
    return result


def noise_pairs(config: ConfigDict) -> tuple[np.ndarray, list[str]] | None:
    """Return pairs that nothing was trained on, for the noise MSE: emoji scenes, or ``evaluation.noise.data``."""
    own = config.evaluation.get("noise", ConfigDict())
    count = int(own.get("pairs", 0))
    if not count:
        return None
    if own.get("data"):
        source: Any = make_source(own.data)
        if len(source) < count:
            raise InputError(f"evaluation.noise.pairs={count}: evaluation.noise.data has only {len(source)} examples")
        return choose_pairs(source, loading(own.data)["crop"], count, 0)
    if config.evaluation.prompts.get("kind") != "emoji":
        raise InputError("evaluation.noise.data is missing: pictures with captions; or evaluation.noise.pairs=0")
    scenes = SceneSource(seed=UNSEEN, mixed=True, single=0.0)
    rows = [scenes[i] for i in range(count)]
    return np.stack([row["image"] for row in rows]), [row["caption"] for row in rows]
