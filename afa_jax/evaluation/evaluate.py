"""A comparison of every method of a config: pictures, figures with intervals, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import afa_jax
from afa_jax.data.emoji.scenes import UNSEEN, SceneSource
from afa_jax.data.loader import loading
from afa_jax.data.pictures import read_png, save_picture, to_images, to_pixels
from afa_jax.data.sources import make_source
from afa_jax.errors import InputError
from afa_jax.evaluation.bootstrap import Resamples
from afa_jax.evaluation.comparison import (
    Entry,
    Measured,
    Protocol,
    at_equal_time_of,
    compare,
    curves,
    entries_of,
    measure,
    noise_of,
    with_seconds,
)
from afa_jax.evaluation.pairs import choose_pairs
from afa_jax.evaluation.picture_files import write_index
from afa_jax.evaluation.prompts import Item, fewer, load_items
from afa_jax.evaluation.scores import bounds_of, load_scorers
from afa_jax.files import check_folder, replace_text
from afa_jax.generate import Request, SampleOptions, generate
from afa_jax.method_specs import parse_method
from afa_jax.methods import Models, NotTrained, check_entry, make_method
from afa_jax.records import public_sentence, recorded
from afa_jax.report.comparison import write_comparison
from afa_jax.report.comparison_sheet import pictures_sheet
from afa_jax.report.maps import mean_maps

EXAMPLES = 8  # prompts that are shown
MAIN = 3  # metrics that stand out in the report: the first ones of the config's


def evaluate(
    config: ConfigDict,
    out: Path,
    *,
    workdir: Path | None = None,
    methods: Sequence[str] | None = None,
    prompts: int | None = None,
    pictures_only: bool = False,
) -> None:
    """Make, measure, compare, and write report.json and report.html.

    Args:
        out: folder of pictures and report; the report of a part goes to ``part`` within it.
        workdir: a trained run, a folder or a hub id, for methods that name none.
        methods: only these, of the config's list or KIND[,OPTION=VALUE]...
        prompts: only so many, of all groups alike.
        pictures_only: make pictures, no report.

    Raises:
        InputError: something of the config, its models, prompts or data cannot be used.
    """
    own = config.evaluation
    check_fields(own)
    for folder in (out, out / "pictures", out / "part"):
        check_folder(folder)
    recorded(config)  # which can be kept
    sampling = sample_options(config)
    known = entries_of(config)
    entries = chosen(known, methods)
    items = fewer(load_items(own.prompts), prompts)
    pairs = None if pictures_only else noise_pairs(config)
    models = Models(config, workdir, sampling.steps)
    sampling.check(models.experts)
    models.experts.tokenizer([item.prompt for item in items])  # words it does not know are found before the work
    reference = make_method(dict(kind="expert", expert=models.experts.names[0]), models)
    protocol = Protocol(
        items=items,
        seeds=tuple(own.seeds),
        options=sampling,
        scorers=[],
        main=own.get("main", ""),
        resamples=Resamples(prompts=len(items), count=own.resamples),
        pairs=pairs,
        root=out / "pictures",
    )
    place = out / "part" if methods or prompts else out
    index: dict[str, Any] = dict(
        methods=list(entries),
        prompts=[item.prompt for item in items],
        examples=example_prompts(protocol, own.get("examples", EXAMPLES)),
        seeds=protocol.seeds,
    )
    if pictures_only:
        check_methods(entries, ConfigDict(), models)
        write_index(protocol.root, **index)
        make_pictures(entries, models, protocol)
        write_sheet(out, place, list(entries))
        return
    weights = {key: path for key, path in own.get("weights", {}).items() if path}
    scorers, absent_metrics = load_scorers(own.metrics, items, weights, size=sampling.size, seeds=len(own.seeds))
    protocol = dataclasses.replace(protocol, scorers=scorers)
    for name, why in absent_metrics.items():
        print(f"without {name}: {why}", flush=True)
    if not scorers:
        check_methods(entries, ConfigDict(), models)
        write_index(protocol.root, **index)
        print("no metric is there: pictures are made, and not measured", flush=True)
        noise = make_pictures(entries, models, protocol)
        if noise:
            place.mkdir(parents=True, exist_ok=True)
            replace_text(place / "noise.json", json.dumps(noise, indent=1) + "\n")
        for name, found in noise.items():
            print(f"{name}: noise MSE {found['mean']:.4f}")
        write_sheet(out, place, list(entries))
        return
    protocol = dataclasses.replace(protocol, main=main_metric(protocol.main, protocol, absent_metrics))

    check_methods(entries, own.get("curves") or ConfigDict(), models)
    write_index(protocol.root, **index)
    measured: list[Measured] = []
    absent: dict[str, str] = {}
    for number, (name, entry) in enumerate(entries.items(), 1):
        print(f"{name} ({number} of {len(entries)})", flush=True)
        try:
            measured.append(measure(entry, models, protocol, reference))
        except NotTrained as error:
            absent[name] = str(error)
            print(f"  left out: {error}")
    if not measured:
        raise InputError("no method could be measured: " + "; ".join(f"{n}: {why}" for n, why in absent.items()))
    for one in at_equal_time_of(measured, own.get("equal_time", ())):
        print(one["name"], flush=True)
        measured.append(measure(one, models, protocol, reference))
    named = compare(measured, protocol)
    lines = curves(own.get("curves", ConfigDict()), entries, models, protocol, reference)
    with_seconds([*(one.row for one in measured), *(point for line in lines for point in line["points"])])
    report = assemble(config, protocol, measured, named, absent, absent_metrics, lines, bounds(models, items))
    trusted = example_maps(measured, named.get("afa"), models, protocol, report["examples"]["prompts"])
    write(place, report, measured, protocol, trusted, models.experts.names)
    print_table(report)
    write_sheet(out, place, list(entries))
    print(place / "report.html")


def check_methods(entries: Mapping[str, Entry], curves: ConfigDict, models: Models) -> None:
    """Raise InputError for a method that cannot be made of these models, before the first one's pictures are."""
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


def make_pictures(entries: Mapping[str, Entry], models: Models, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Make the methods' missing pictures; returns the noise MSE of those that have one, if the protocol has pairs."""
    noise = {}
    for number, (name, entry) in enumerate(entries.items(), 1):
        print(f"{name} ({number} of {len(entries)})", flush=True)
        try:
            method = make_method(entry, models)
        except NotTrained as error:
            print(f"  left out: {error}")
            continue
        folder = protocol.make(method)
        if (found := noise_of(method, protocol, folder)) is not None:
            noise[name] = found
    return noise


def example_prompts(protocol: Protocol, count: int) -> list[str]:
    """The prompts that are shown: of each group in turn."""
    groups = protocol.groups()
    rows = [rows[i] for i in range(max(map(len, groups.values()))) for rows in groups.values() if i < len(rows)]
    return [protocol.items[row].prompt for row in rows[:count]]


def write_sheet(out: Path, place: Path, methods: Sequence[str]) -> None:
    """Write the grid of the example pictures, a row for each method whose pictures are there, into ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    save_picture(place / "grid.png", pictures_sheet(out / "pictures", methods))
    print(place / "grid.png")


def check_fields(own: ConfigDict) -> None:
    """Raise InputError for a field that every ``evaluation`` must have and this one has not."""
    for field in ("prompts", "seeds", "metrics", "resamples", "methods"):
        if field not in own:
            raise InputError(f"evaluation.{field} is missing; configs/emoji.py shows what it says")
    if not own.seeds:
        raise InputError("evaluation.seeds has none; choose one or more, such as (0,)")


def main_metric(name: str, protocol: Protocol, absent: Mapping[str, str]) -> str:
    """``evaluation.main``, or where that is absent the first metric that is there.

    Raises:
        InputError: it is no metric of this comparison.
    """
    there = [info.name for info in protocol.infos]
    if name in there:
        return name
    if not name:
        return there[0]
    if name not in absent:
        raise InputError(f"evaluation.main={name!r}: it is none of the metrics: {', '.join([*there, *absent])}")
    warnings.warn(f"evaluation.main={name!r} is absent; the best ones are chosen by {there[0]!r}", stacklevel=2)
    return there[0]


def sample_options(config: ConfigDict) -> SampleOptions:
    """How ``evaluation`` samples; what it does not say is as in ``sample``."""
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
    """The methods that ``--method`` names, of the config's list or by their kinds; all of the list without."""
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
    """Pairs that nothing was trained on, for the noise MSE: emoji scenes, or ``evaluation.noise.data``."""
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


def bounds(models: Models, items: Sequence[Item]) -> dict[str, Any]:
    """The ceiling and the floor of the metrics, as far as they are known."""
    roundtrip = jax.jit(lambda vae, pixels: to_pixels(vae.decode(vae.encode(to_images(pixels)))))

    def reconstruct(pictures: np.ndarray) -> np.ndarray:
        parts = [roundtrip(models.experts.vae, pictures[first : first + 32]) for first in range(0, len(pictures), 32)]
        return np.concatenate([np.asarray(part) for part in parts])

    return bounds_of(items, reconstruct)


def assemble(
    config: ConfigDict,
    protocol: Protocol,
    measured: Sequence[Measured],
    named: Mapping[str, str],
    absent: Mapping[str, str],
    absent_metrics: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """report.json."""
    options, infos = protocol.options, protocol.infos
    order = [protocol.main, *(info.name for info in infos if info.name != protocol.main)]
    stands_out = set(config.evaluation.get("stand_out", order[:MAIN]))
    groups = protocol.groups()
    return dict(
        version=1,
        afa_jax=afa_jax.__version__,
        device=jax.devices()[0].device_kind,
        config=recorded(config),
        protocol=dict(
            prompts=len(protocol.items),
            seeds=list(protocol.seeds),
            steps=options.steps,
            guidance=options.guidance,
            eta=options.eta,
            sampler="ddim",
            size=list(options.size),
            groups={group: len(rows) for group, rows in groups.items()},
            resamples=protocol.resamples.count,
        ),
        metrics=[
            dict(name=i.name, better=i.better, what=i.what, level=i.level, digits=i.digits, main=i.name in stands_out)
            for i in sorted(infos, key=lambda info: order.index(info.name))
        ],
        absent_metrics={name: public_sentence(why) for name, why in absent_metrics.items()},
        absent_methods={name: public_sentence(why) for name, why in absent.items()},
        references=dict(named),
        bounds=dict(found),
        methods=[one.row for one in measured],
        curves=list(lines),
        examples=dict(
            prompts=example_prompts(protocol, config.evaluation.get("examples", EXAMPLES)),
            seed=protocol.seeds[0],
            methods=[one.row["name"] for one in measured],
        ),
    )


def example_maps(
    measured: Sequence[Measured], name: str | None, models: Models, protocol: Protocol, prompts: Sequence[str]
) -> dict[tuple[str, str], np.ndarray]:
    """Whom AFA trusted where in the example pictures: by (method, prompt), ``[n, h, w]``, mean over sites and steps.

    They are kept beside AFA's pictures.
    """
    chosen = [one for one in measured if one.row["name"] == name]
    if not chosen:
        return {}
    items, seed = {item.prompt: item for item in protocol.items}, protocol.seeds[0]

    def measure() -> dict[str, Any]:
        method = make_method(chosen[0].entry, models)
        options = dataclasses.replace(protocol.options_of(method), maps=True, batch=1)  # maps of one picture at a time
        requests = [Request(prompt=prompt, number=items[prompt].number(seed)) for prompt in prompts]
        made = generate(requests, method.denoiser, method.experts, seed=0, options=options)
        return {p.request.prompt: np.round(mean_maps(p.maps).mean(0), 4).tolist() for p in made}

    maps = chosen[0].pictures.kept("maps", dict(prompts=list(prompts), seed=seed), measure)
    return {(chosen[0].row["name"], prompt): np.asarray(own, np.float32) for prompt, own in maps.items()}


def write(
    out: Path,
    report: Mapping[str, Any],
    measured: Sequence[Measured],
    protocol: Protocol,
    trusted: Mapping[tuple[str, str], np.ndarray],
    experts: Sequence[str],
) -> None:
    """report.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    folders = {one.row["name"]: one.pictures for one in measured}
    items = {item.prompt: item for item in protocol.items}

    def picture(method: str, prompt: str) -> np.ndarray | None:
        return read_png(folders[method].path(items[prompt], protocol.seeds[0]))

    write_comparison(out, dict(report), picture, lambda method, prompt: trusted.get((method, prompt)), experts)


def print_table(report: Mapping[str, Any]) -> None:
    """Print the main figures, a method a line."""
    metrics = [metric["name"] for metric in report["metrics"]]
    width = max(len(row["name"]) for row in report["methods"]) + 2
    print(" " * width + "".join(f"{name:>14}" for name in [*metrics, "evaluations", "time ratio"]))
    for row in report["methods"]:
        values = [row["metrics"].get(name, {}).get("value") for name in metrics]
        cells = ["" if value is None else f"{value:.4g}" for value in [*values, row["evaluations"], row["time_ratio"]]]
        print(f"{row['name']:{width}}" + "".join(f"{cell:>14}" for cell in cells))
