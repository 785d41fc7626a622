"""How a run is doing: ``python -m afa_jax.report --workdir runs/emoji --out run.html``.

A self-contained page of what a workdir of ``afa_jax.train`` holds, while it runs or afterwards: loss, validation by
timestep, norms, speed, how even the maps are, whom each site trusts at which timesteps, and the sampled grids.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afa_jax.commands import Parser, run
from afa_jax.errors import InputError
from afa_jax.files import replace_text
from afa_jax.report.maps import legend
from afa_jax.report.page import image, line_chart, page, table
from afa_jax.training.validation import read_validation
from afa_jax.training.workdir import read_metrics

GREYS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdae6b", "#e6550d", "#a63603", "#7f2704")
GRIDS = 6  # of samples, spread over the run


def main(arguments: Sequence[str]) -> None:
    """Write the page."""
    parser = Parser(prog="python -m afa_jax.report", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run of afa_jax.train")
    parser.add_argument("--out", type=Path, required=True, help="the page to write; replaced if it is there")
    options = parser.parse_args(list(arguments))
    if not (options.workdir / "metrics.jsonl").is_file():
        raise InputError(f"{options.workdir}: no run there (no metrics.jsonl)")
    lines = read_metrics(options.workdir)
    if not any("loss" in line for line in lines):
        raise InputError(f"{options.workdir}: the run has not logged a step yet")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, report(options.workdir, lines))
    print(options.out)


def report(workdir: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """The page of a workdir with these lines of metrics."""
    config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").is_file() else {}
    if "train" not in config or "experts" not in config:
        raise InputError(f"{workdir}: not a run of afa_jax.train")
    names = [expert["name"] for expert in config["experts"]]
    validation = read_validation(workdir)

    def curve(key: str) -> list[tuple[float, float]]:
        return [(float(line["step"]), line[key]) for line in lines if key in line]

    def chart(title: str, *series: tuple[str, str, Sequence[tuple[float, float]]]) -> tuple[str, str]:
        return title, line_chart([s for s in series if s[2]], x_label="step", y_label=title.split(",")[0])

    trained = [line for line in lines if "loss" in line]
    waited = float(np.mean([line["data_wait"] for line in trained]))
    intro = (
        f"<p>{html.escape(config['name'])}: {trained[-1]['step']} of {config['train']['steps']} steps of "
        f"{config['train']['batch']}, {np.median([line['seconds_per_step'] for line in trained]):.2f} s a step "
        f"(median), {100 * waited:.2f} % of the time waiting for data. Loss {trained[-1]['loss']:.4f}.</p>"
    )
    buckets = list(validation[-1]["loss"]) if validation else []
    sections = [
        ("", intro),
        chart("loss", ("training", "#bbb", curve("loss")), ("validation", "#0072b2", curve("val_loss"))),
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
                html.escape(site),
                *(f"{' / '.join(f'{weight:.2f}' for weight in bucket)}" for bucket in last["weights"][site]),
                *(f"{entropy:.2f}" for entropy in last["entropy"][site]),
            ]
            for site in last["weights"]
        ]
        head = ["site", *buckets, *(f"entropy {bucket}" for bucket in buckets)]
        order = " / ".join(html.escape(name) for name in last["experts"])
        sections.append(
            (f"Whom each site trusts, step {last['step']}", f"<p>Mean weights of {order}.</p>" + table(head, rows))
        )
    samples = sorted((workdir / "samples").glob("step_*.png"))
    if samples:
        chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, GRIDS).round().astype(int))]
        prompts = html.escape("; ".join(config["validation"]["prompts"]))
        sections.append(("Samples", f"<p>Rows: {prompts}</p>" + "".join(map(_sample, chosen))))
    return page(f"Run {workdir.name}", sections)


def _sample(path: Path) -> str:
    with Image.open(path) as picture:
        return f"<h3>{path.stem.replace('_', ' ')}</h3>" + image(picture, path.stem)


if __name__ == "__main__":
    raise SystemExit(run(main))
