"""The whole method on the embedded default: ``python -m afa_jax.demo --out runs/emoji`` (``make demo``).

Trains the aggregators on the shipped experts, samples the same prompts and seeds from every expert, from the uniform
average and from AFA, and writes a self-contained page with the pictures, the loss and the maps, and the pictures as one
(comparison.png).
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from afa_jax import train
from afa_jax.commands import Parser, load_config, run
from afa_jax.experts import Experts, load_experts
from afa_jax.files import replace_text
from afa_jax.generate import Picture, Request, SampleOptions, generate, make_denoiser
from afa_jax.report.maps import COLOURS, contact_sheet, legend, paint
from afa_jax.report.page import image, line_chart, page, table
from afa_jax.report.sheet import labelled_grid
from afa_jax.sample import recipe_of, save_png, slug
from afa_jax.training.workdir import read_metrics

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "octopus and pizza, noto style",
    "fox and cheese, twemoji style",
    "hamburger and sailboat, fluent style",
    "guitar and owl, noto style",
    "avocado and rocket, twemoji style",
    "tiger and penguin, noto style",
    "doughnut and banana, fluent style",
    "bus and umbrella, blob style",
)


def main(arguments: Sequence[str]) -> None:
    """Train, sample and write ``--out/index.html``."""
    parser = Parser(prog="python -m afa_jax.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args(list(arguments))
    if unknown := [argument for argument in overrides if not argument.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    spec = str(ROOT / "configs" / "emoji.py")
    started = time.perf_counter()
    flags = [f"--{flag}" for flag in ("resume", "overwrite") if getattr(options, flag)]
    train.main(["--config", spec, "--workdir", str(options.out), *flags, *overrides])
    trained = time.perf_counter()
    config = load_config(spec, [override.removeprefix("--config.") for override in overrides])
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    methods = [f"expert:{name}" for name in experts.names] + ["uniform", "afa"]
    pictures: dict[str, list[Picture]] = {}
    for method in methods:
        print(f"sampling {len(PROMPTS)} pictures: {method}")
        pictures[method] = _sample(method, experts, config, options.out, options.seed)
    sampled = time.perf_counter()
    write_comparison(options.out, pictures)
    write_page(options.out, pictures, experts, config, seconds=(trained - started, sampled - trained))
    print(f"open {options.out / 'index.html'}")


def _sample(method: str, experts: Experts, config: ConfigDict, out: Path, seed: int) -> list[Picture]:
    sampling = SampleOptions(
        size=tuple(config.sample.size),
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        batch=len(PROMPTS),
        maps=method == "afa",
    )
    denoiser = make_denoiser(method, experts, out)
    made = list(generate([Request(prompt=p) for p in PROMPTS], denoiser, experts, seed=seed, options=sampling))
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    for picture in made:
        name = f"{method.replace(':', '_')}_{slug(picture.request.prompt)}.png"
        save_png(
            folder / name, picture.pixels, recipe_of(picture.request, method, seed, sampling, experts, config, out)
        )
    return made


def write_comparison(out: Path, pictures: dict[str, list[Picture]]) -> None:
    """Write ``out/comparison.png``: a prompt a row, a method a column, and whom AFA's last site trusted where."""
    rows = [
        [*(made[i].pixels for made in pictures.values()), paint(_overall(pictures["afa"][i].maps[-1:]))]
        for i in range(len(PROMPTS))
    ]
    sheet = labelled_grid(rows, PROMPTS, [*pictures, "AFA's last maps"])
    partial = out / ".comparison.png.partial"
    sheet.save(partial, format="PNG", optimize=True)
    partial.replace(out / "comparison.png")


def write_page(
    out: Path, pictures: dict[str, list[Picture]], experts: Experts, config: ConfigDict, *, seconds: tuple[float, float]
) -> None:
    """Write ``out/index.html`` from the pictures of each method and the run's metrics."""
    metrics = read_metrics(out)
    afa = pictures["afa"]
    timesteps = [int(t) for t in experts.schedule.timesteps(config.sample.steps)]
    sites = [stage.name for stage in experts.unet.stages][-len(afa[0].maps) :]
    rows = []
    for i, prompt in enumerate(PROMPTS):
        trust = paint(_overall(afa[i].maps))
        cells = [image(made[i].pixels, f"{method}: {prompt}", scale=2) for method, made in pictures.items()]
        rows.append(
            [html.escape(prompt), *cells, image(trust, f"whom AFA trusted: {prompt}", scale=128 // trust.shape[1])]
        )
    colours = "".join(
        f'<span class="swatch" style="background:{colour}"></span>{html.escape(name)}'
        for name, colour in legend(experts.names)
    )

    def curve(key: str) -> list[tuple[float, float]]:
        return [(float(line["step"]), line[key]) for line in metrics if key in line]

    loss = [("loss", "#bbb", curve("loss")), ("mean of 20 steps", "#0072b2", _smooth(curve("loss")))]
    weights = [
        (name, "rgb({:.0f},{:.0f},{:.0f})".format(*COLOURS[k]), curve(f"weight_{k}"))
        for k, name in enumerate(experts.names)
    ]
    entropy = [("entropy over log N", "#0072b2", curve("entropy"))]
    sheets = "".join(
        f"<h3>{html.escape(p.request.prompt)}</h3>" + image(contact_sheet(p.maps, sites, timesteps), p.request.prompt)
        for p in afa[:3]
    )
    intro = (
        f"<p>{len(experts.names)} frozen experts ({html.escape(', '.join(experts.names))}), each fine-tuned on its own "
        f"topic from one base model. Aggregators trained for {metrics[-1]['step']} steps of {config.train.batch} in "
        f"{seconds[0]:.0f} s; {len(pictures)} x {len(PROMPTS)} pictures in {seconds[1]:.0f} s, both with compiling. "
        "Same prompts, same noise in every column.</p>"
    )
    content = page(
        "AFA: several emoji experts, one picture",
        [
            ("", intro),
            (
                "Pictures",
                table(["prompt", *pictures, "whom AFA trusted where"], rows)
                + f"<p>Trusted, mean over sites and timesteps: {colours}</p>",
            ),
            ("Training loss (MSE of the prediction)", line_chart(loss, x_label="step", y_label="loss")),
            (
                "Mean weight of each expert in training",
                line_chart(weights, x_label="step", y_label="weight"),
            ),
            (
                "How even the maps are: 1 trusts all experts alike, 0 one alone at each pixel",
                line_chart(entropy, x_label="step", y_label="entropy"),
            ),
            ("Maps over timesteps (columns) and sites (rows)", f"<p>{colours}</p>{sheets}"),
        ],
    )
    replace_text(out / "index.html", content)


def _overall(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over steps and sites of ``[steps, n, h, w]`` maps, at the size of the largest: ``[n, h, w]``."""
    rows, columns = max(site.shape[2] for site in maps), max(site.shape[3] for site in maps)
    enlarged = [
        site.mean(0).repeat(rows // site.shape[2], axis=1).repeat(columns // site.shape[3], axis=2) for site in maps
    ]
    return np.mean(enlarged, axis=0)


def _smooth(points: Sequence[tuple[float, float]], width: int = 20) -> list[tuple[float, float]]:
    values = [y for _, y in points]
    return [(x, float(np.mean(values[max(0, i - width + 1) : i + 1]))) for i, (x, _) in enumerate(points)]


if __name__ == "__main__":
    raise SystemExit(run(main))
