"""The results of a comparison: report.json, report.html, the grid of pictures, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import afa_jax
from afa_jax.data.pictures import read_png, save_picture
from afa_jax.errors import printable
from afa_jax.evaluation.comparison.comparison import Measured, Protocol
from afa_jax.evaluation.comparison.picture_files import PICTURES, read_index
from afa_jax.evaluation.comparison.scores import bounds_of
from afa_jax.evaluation.comparison.sheet import pictures_sheet
from afa_jax.files import replace_text
from afa_jax.logs import LOGGER
from afa_jax.methods.method import Models, make_method
from afa_jax.models.vae import to_images, to_pixels
from afa_jax.records import public_sentence, recorded
from afa_jax.report.comparison import write_comparison
from afa_jax.sampling.generation import Request, generate
from afa_jax.sampling.map_pictures import mean_maps

EXAMPLES = 8  # prompts that are shown
MAIN = 3  # metrics that the report highlights: the config's first ones


def bounds(models: Models, protocol: Protocol) -> dict[str, Any]:
    """Return the metrics' ceiling and floor, as far as they are known."""
    roundtrip = jax.jit(lambda vae, pixels: to_pixels(vae.decode(vae.encode(to_images(pixels)))))

    def reconstruct(pictures: np.ndarray) -> np.ndarray:
        parts = [roundtrip(models.experts.vae, pictures[first : first + 32]) for first in range(0, len(pictures), 32)]
        return np.concatenate([np.asarray(part) for part in parts])

    return bounds_of(protocol.scorers, protocol.items, reconstruct)


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
    """Assemble the contents of report.json."""
    options, infos = protocol.options, protocol.infos
    order = [protocol.main, *(info.name for info in infos if info.name != protocol.main)]
    stands_out = {protocol.main, *config.evaluation.get("stand_out", order[:MAIN])}
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
            prompts=example_prompts(protocol, config),
            seed=protocol.seeds[0],
            methods=[one.row["name"] for one in measured],
        ),
    )


def example_maps(
    measured: Sequence[Measured], name: str | None, models: Models, protocol: Protocol, prompts: Sequence[str]
) -> dict[tuple[str, str], np.ndarray]:
    """Return AFA's maps of the example pictures by (method, prompt): ``[n, h, w]``, the mean over sites and steps.

    The maps are kept beside AFA's pictures.
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
    """Write report.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    folders = {one.row["name"]: one.pictures for one in measured}
    items = {item.prompt: item for item in protocol.items}

    def picture(method: str, prompt: str) -> np.ndarray | None:
        return read_png(folders[method].path(items[prompt], protocol.seeds[0]))

    write_comparison(out, dict(report), picture, lambda method, prompt: trusted.get((method, prompt)), experts)


def log_table(report: Mapping[str, Any]) -> None:
    """Log the main figures, one line per method."""
    metrics = [metric["name"] for metric in report["metrics"]]
    names = [printable(row["name"], 80) for row in report["methods"]]
    width = max(map(len, names)) + 2
    LOGGER.info(" " * width + "".join(f"{head:>14}" for head in [*metrics, "evaluations", "time ratio"]))
    for name, row in zip(names, report["methods"], strict=True):
        values = [row["metrics"].get(metric, {}).get("value") for metric in metrics]
        cells = ["" if value is None else f"{value:.4g}" for value in [*values, row["evaluations"], row["time_ratio"]]]
        LOGGER.info(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))


def example_prompts(protocol: Protocol, config: ConfigDict) -> list[str]:
    """Return the example prompts, as many as ``evaluation.examples``, from each group in turn."""
    groups, count = protocol.groups(), config.evaluation.get("examples", EXAMPLES)
    rows = [rows[i] for i in range(max(map(len, groups.values()))) for rows in groups.values() if i < len(rows)]
    return [protocol.items[row].prompt for row in rows[:count]]


def write_sheet(out: Path, place: Path, methods: Sequence[str]) -> None:
    """Write the grid of the example pictures, a row for each method with pictures, into ``place``.

    Nothing is written if the comparison has no examples.
    """
    if not read_index(out / PICTURES)["examples"]:
        return
    place.mkdir(parents=True, exist_ok=True)
    save_picture(place / "grid.png", pictures_sheet(out / PICTURES, methods))
    LOGGER.info(place / "grid.png")
