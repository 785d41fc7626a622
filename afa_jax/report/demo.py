"""The demo: the emoji ensemble trained and sampled, and a page with pictures, loss and maps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.pictures import save_picture, save_png
from afa_jax.errors import InputError, printable
from afa_jax.files import replace_text
from afa_jax.fusion.registry import kind_of
from afa_jax.methods.method import Method, Models, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.report.charts import line_chart, points_of
from afa_jax.report.pages import Cell, image, render
from afa_jax.report.sheet import labelled_grid
from afa_jax.sampling.generation import Picture, Request, generate
from afa_jax.sampling.map_pictures import contact_sheet, legend, mean_maps, paint
from afa_jax.sampling.pictures import file_name, recipe_of, slug
from afa_jax.training.run import configured_fusion, train
from afa_jax.training.workdir import check_workdir, read_metrics

PAGE, COMPARISON = "index.html", "comparison.png"  # an --overwrite removes them with the run (training/workdir.py)
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


def demo(
    config: ConfigDict,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    arguments: Sequence[str] = (),
) -> None:
    """Train, sample, and write ``out/index.html`` and ``out/comparison.png``.

    Args:
        seed: the pictures' seed.
        arguments: the arguments that made the config; they are recorded with the trained pair.
    """
    if (kind := kind_of(configured_fusion(config))) != "afa":
        raise InputError(f"fusion.kind={kind}: the demo shows AFA; train others by afa_jax.train")
    check_workdir(out, resume=resume, overwrite=overwrite, cache=config.cache.path)
    models = Models(config, out)
    # Check before the training that pictures can be sampled after it: the words are known, and the size fits.
    models.experts.tokenizer(PROMPTS)
    _sampling(config).check(models.experts)
    del models
    started = time.perf_counter()
    train(config, out, resume=resume, overwrite=overwrite, arguments=arguments)
    trained = time.perf_counter()
    models = Models(config, out)
    experts = models.experts
    entries = [*(dict(kind="expert", expert=name) for name in experts.names), dict(kind="uniform"), dict(kind="afa")]
    pictures: dict[str, list[Picture]] = {}
    for former in (PAGE, COMPARISON):  # of an earlier part of the run: they show pictures that are now replaced
        (out / former).unlink(missing_ok=True)
    for method in (make_method(entry, models) for entry in entries):
        print(printable(f"sampling {len(PROMPTS)} pictures: {method.name}"))
        pictures[method.name] = _sample(method, config, out, seed)
    sampled = time.perf_counter()
    write_comparison(out, pictures)
    timesteps = [int(t) for t in experts.schedule.timesteps(config.sample.steps)]
    stages = [stage.name for stage in experts.unet.stages]
    seconds = trained - started, sampled - trained
    write_page(out, pictures, experts.names, stages, timesteps, batch=config.train.batch, seconds=seconds)
    print(f"open {out / PAGE}")


def _sampling(config: ConfigDict, maps: bool = False) -> SampleOptions:
    own = config.sample
    return SampleOptions(
        size=tuple(own.size), steps=own.steps, guidance=float(own.guidance), batch=len(PROMPTS), maps=maps
    )


def _sample(method: Method, config: ConfigDict, out: Path, seed: int) -> list[Picture]:
    sampling = _sampling(config, maps=method.kind == "afa")
    requests = [Request(prompt=prompt) for prompt in PROMPTS]
    made = list(generate(requests, method.denoiser, method.experts, seed=seed, options=sampling))
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    for picture in made:
        name = f"{file_name(method)}_{slug(picture.request.prompt)}.png"
        save_png(folder / name, picture.pixels, recipe_of(picture.request, method, seed, sampling, config))
    return made


def write_comparison(out: Path, pictures: dict[str, list[Picture]]) -> None:
    """Write ``out/comparison.png``: a row per prompt, a column per method, and the maps of AFA's last site."""
    rows = [
        [*(made[i].pixels for made in pictures.values()), paint(mean_maps(pictures["afa"][i].maps[-1:]).mean(0))]
        for i in range(len(PROMPTS))
    ]
    sheet = labelled_grid(rows, PROMPTS, [*pictures, "AFA's last maps"])
    save_picture(out / COMPARISON, sheet)


def write_page(
    out: Path,
    pictures: dict[str, list[Picture]],
    experts: Sequence[str],
    stages: Sequence[str],
    timesteps: Sequence[int],
    *,
    batch: int,
    seconds: tuple[float, float],
) -> None:
    """Write ``out/index.html`` from the pictures of each method and the run's metrics.

    Args:
        out: the run's folder.
        pictures: the pictures by method; those of afa have maps.
        experts, stages: the names of the experts and stages.
        timesteps: the timesteps of the sampling steps.
        batch: the batch size of the training.
        seconds: the seconds of training and of sampling.
    """
    metrics = read_metrics(out)
    afa = pictures["afa"]
    sites = stages[-len(afa[0].maps) :]
    rows = []
    for i, prompt in enumerate(PROMPTS):
        trust = paint(mean_maps(afa[i].maps).mean(0))
        cells = [image(made[i].pixels, f"{method}: {prompt}", scale=2) for method, made in pictures.items()]
        cells.append(image(trust, f"whom AFA trusted: {prompt}", scale=128 // trust.shape[1]))
        rows.append([prompt, *(Cell(pictures=[cell]) for cell in cells)])
    losses = points_of(metrics, "loss")
    loss = [("loss", "#bbb", losses), ("mean of 20 steps", "#0072b2", _smooth(losses))]
    weights = [(*key, points_of(metrics, f"weight_{k}")) for k, key in enumerate(legend(experts))]
    entropy = [("entropy over log N", "#0072b2", points_of(metrics, "entropy"))]
    even = "How even the maps are: 1 trusts all experts alike, 0 one alone at each pixel"
    content = render(
        "demo.html",
        title="AFA: several emoji experts, one picture",
        experts=experts,
        legend=legend(experts),
        steps=metrics[-1]["step"],
        batch=batch,
        seconds=seconds,
        methods=list(pictures),
        rows=rows,
        charts=[
            ("Training loss (MSE of the prediction)", line_chart(loss, x_label="step", y_label="loss")),
            ("Mean weight of each expert in training", line_chart(weights, x_label="step", y_label="weight")),
            (even, line_chart(entropy, x_label="step", y_label="entropy")),
        ],
        sheets=[(p.request.prompt, image(contact_sheet(p.maps, sites, timesteps), p.request.prompt)) for p in afa[:3]],
    )
    replace_text(out / PAGE, content)


def _smooth(points: Sequence[tuple[float, float]], width: int = 20) -> list[tuple[float, float]]:
    values = [y for _, y in points]
    return [(x, float(np.mean(values[max(0, i - width + 1) : i + 1]))) for i, (x, _) in enumerate(points)]
