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
from afa_jax.report.escape import escape
from afa_jax.report.page import image, page, table
from afa_jax.report.readme import update_tables
from afa_jax.sampling.map_pictures import legend
from afa_jax.training.validation import read_validation
from afa_jax.training.workdir import read_metrics

GREYS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdae6b", "#e6550d", "#a63603", "#7f2704")
GRIDS = 6  # of samples, spread over the run


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
    """The page of a workdir with these lines of metrics."""
    path = workdir / "config.json"
    config = read_object(path, "restore it from another copy of the run") if path.is_file() else {}
    if "train" not in config or "experts" not in config:
        raise InputError(f"{workdir}: not a run of afa_jax.train")
    try:
        title, steps, batch = str(config["name"]), config["train"]["steps"], config["train"]["batch"]
        names = [str(expert["name"]) for expert in config["experts"]]
        prompts = "; ".join(config["validation"]["prompts"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not as afa_jax.train writes it ({error}); restore it from another copy") from error
    validation, curve = read_validation(workdir), functools.partial(points_of, lines)

    def chart(title: str, *series: tuple[str, str, Sequence[tuple[float, float]]]) -> tuple[str, str]:
        return title, line_chart([s for s in series if s[2]], x_label="step", y_label=title.split(",")[0])

    trained = [line for line in lines if {"loss", "data_wait", "seconds_per_step"} <= line.keys()]
    waited = float(np.mean([line["data_wait"] for line in trained]))
    intro = (
        f"<p>{escape(title)}: {trained[-1]['step']} of {steps} steps of "
        f"{batch}, {np.median([line['seconds_per_step'] for line in trained]):.2f} s a step "
        f"(median), {100 * waited:.2f} % of the time waiting for data. Loss {trained[-1]['loss']:.4f}.</p>"
    )
    buckets = list(validation[-1]["loss"]) if validation else []
    sections = [
        ("", intro),
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
    if validation:
        last = validation[-1]
        rows = [
            [
                escape(site),
                *(f"{' / '.join(f'{weight:.2f}' for weight in bucket)}" for bucket in last["weights"][site]),
                *(f"{entropy:.2f}" for entropy in last["entropy"][site]),
            ]
            for site in last["weights"]
        ]
        head = ["site", *buckets, *(f"entropy {bucket}" for bucket in buckets)]
        order = " / ".join(escape(name) for name in last["experts"])
        sections.append(
            (f"Whom each site trusts, step {last['step']}", f"<p>Mean weights of {order}.</p>" + table(head, rows))
        )
    samples = sorted((workdir / "samples").glob("step_*.png"))
    if samples:
        chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, GRIDS).round().astype(int))]
        sections.append(("Samples", f"<p>Rows: {escape(prompts)}</p>" + "".join(map(_sample, chosen))))
    return page(f"Run {workdir.name}", sections)


def _sample(path: Path) -> str:
    with opened(path) as picture:
        return f"<h3>{path.stem.replace('_', ' ')}</h3>" + image(picture, path.stem)
