"""The page of a run, and the tables of Markdown files."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.data.pictures import opened
from afa_jax.errors import InputError
from afa_jax.files import PAGE, write_output
from afa_jax.json_files import read_object
from afa_jax.report.charts import line_chart, points_of
from afa_jax.report.pages import Embedded, image, render
from afa_jax.report.readme import update_tables
from afa_jax.sampling.map_pictures import legend
from afa_jax.training.validation import read_validation
from afa_jax.training.workdir import read_metrics

GREYS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdae6b", "#e6550d", "#a63603", "#7f2704")
GRIDS = 6  # the most sample grids, spread over the run


def write_run_page(workdir: Path, out: Path) -> None:
    """Write the page of a workdir of ``afa_jax.train``.

    Raises:
        InputError: there is no run, or it has not logged a step.
    """
    PAGE.check(out)
    if not (workdir / "metrics.jsonl").is_file():
        raise InputError(f"{workdir}: no run there (no metrics.jsonl)")
    lines = read_metrics(workdir)
    if not any({"loss", "data_wait", "seconds_per_step"} <= line.keys() for line in lines):
        raise InputError(f"{workdir}: the run has not logged a step yet")
    write_output(out, report(workdir, lines).encode())


def write_tables(files: Sequence[Path], only: Path | None, check: bool) -> int:
    """Write the tables into Markdown files, of one report or of all; 1 if ``check`` finds one out of date."""
    same = [update_tables(path, only, check=check) for path in files]
    for path, is_same in zip(files, same, strict=True):
        said = "is out of date; run this without --check" if check else "written"
        print(f"{path} {'as it should be' if is_same else said}")
    return 1 if check and not all(same) else 0


def report(workdir: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of a workdir with these lines of metrics."""
    path = workdir / "config.json"
    config = read_object(path, "restore it from another copy of the run") if path.is_file() else {}
    if "train" not in config or "experts" not in config:
        raise InputError(f"{workdir}: not a run of afa_jax.train")
    try:
        name, steps, batch = str(config["name"]), config["train"]["steps"], config["train"]["batch"]
        names = [str(expert["name"]) for expert in config["experts"]]
        prompts = list(map(str, config["validation"]["prompts"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not as afa_jax.train writes it ({error}); restore it from another copy") from error
    validation, curve = read_validation(workdir), functools.partial(points_of, lines)

    def chart(title: str, *series: tuple[str, str, Sequence[tuple[float, float]]]) -> tuple[str, str]:
        return title, line_chart([s for s in series if s[2]], x_label="step", y_label=title.split(",")[0])

    trained = [line for line in lines if {"loss", "data_wait", "seconds_per_step"} <= line.keys()]
    waited = float(np.mean([line["data_wait"] for line in trained]))
    buckets = list(validation[-1]["loss"]) if validation else []
    charts = [
        chart(
            "loss",
            ("training", "#bbb", curve("loss")),
            ("validation", "#0072b2", curve("val_loss")),
        ),
        chart(
            "validation loss, by timestep",
            *((bucket, GREYS[i % len(GREYS)], curve(f"val_loss_{bucket}")) for i, bucket in enumerate(buckets)),
        ),
        chart(
            "entropy, 1 trusts all experts alike, 0 one alone at each pixel",
            ("training", "#bbb", curve("entropy")),
            ("validation", "#0072b2", curve("val_entropy")),
        ),
        chart(
            "weight, mean over sites and pixels",
            *((name, colour, curve(f"weight_{i}")) for i, (name, colour) in enumerate(legend(names))),
        ),
        chart(
            "norm, of the gradient and of the update",
            ("gradient", "#d55e00", curve("gradient_norm")),
            ("update", "#0072b2", curve("update_norm")),
        ),
    ]
    trust = None
    if validation:
        last = validation[-1]
        rows = [
            [
                site,
                *(" / ".join(f"{weight:.2f}" for weight in bucket) for bucket in last["weights"][site]),
                *(f"{entropy:.2f}" for entropy in last["entropy"][site]),
            ]
            for site in last["weights"]
        ]
        head = ["site", *buckets, *(f"entropy {bucket}" for bucket in buckets)]
        trust = dict(step=last["step"], experts=last["experts"], head=head, rows=rows)
    samples = sorted((workdir / "samples").glob("step_*.png"))
    chosen = np.unique(np.linspace(0, len(samples) - 1, GRIDS).round().astype(int)) if samples else ()
    return render(
        "run.html",
        title=f"Run {workdir.name}",
        name=name,
        last=trained[-1],
        steps=steps,
        batch=batch,
        seconds=np.median([line["seconds_per_step"] for line in trained]),
        waited=waited,
        charts=charts,
        trust=trust,
        prompts=prompts,
        samples=[(samples[i].stem.replace("_", " "), _sample(samples[i])) for i in chosen],
    )


def _sample(path: Path) -> Embedded:
    with opened(path) as picture:
        return image(picture, path.stem)
