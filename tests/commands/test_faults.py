"""The comparison and the demo on a disk that fills up, and killed, at every touch of a file; networks stand aside."""

import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from afa_jax.cli.commands import load_config
from afa_jax.demo import CONFIG
from afa_jax.evaluation.bootstrap import mean
from afa_jax.evaluation.comparison import comparison, pictures, results, scores
from afa_jax.evaluation.comparison import evaluate as evaluating
from afa_jax.files import replace_text
from afa_jax.methods.method import Models, method_name
from afa_jax.report import demo as demonstrating
from afa_jax.sampling.generation import Picture
from afa_jax.training.workdir import begin_run, open_workdir
from tests.faults import every_fault

WHOLE = (".png", ".json", ".html")
EVALUATION = """
        evaluation=dict(
            prompts=dict(kind="emoji", seed=1, groups={"two topics": 1}),
            seeds=(0,), steps=2, guidance=2.0, batch=4, metrics=("emoji",), main="subject", resamples=50,
            noise=dict(pairs=18), equal_time=(), examples=1, controls=False,
            methods=[dict(kind="expert", expert="a"), dict(kind="afa")],
        ),
    ))
"""


def drawn(requests: Any, *_: Any, **options: Any) -> Any:
    maps = (np.full((2, 3, 4, 8), 1 / 3),) * 2
    pixels = np.zeros((32, 64, 3), np.uint8)
    return (Picture(request=request, pixels=pixels + np.uint8(len(request.prompt)), maps=maps) for request in requests)


class Brightness(scores.EmojiScorer):
    """In the judge's place, for it takes seconds."""

    infos = tuple(info for info in scores.EmojiScorer.infos if info.level == "picture")

    def __init__(self, items: Any):
        self.items = items

    @property
    def weights(self) -> str:
        return "none"

    def of(self, items: Any) -> Any:
        return Brightness(items)

    def score(self, pictures: np.ndarray, items: Any) -> dict[str, np.ndarray]:
        return {info.name: pictures.mean((1, 2, 3)) / 255 for info in self.infos}

    def figures(self, found: Any, resamples: Any, rows: Any = None) -> Any:
        return {info.name: mean(found[info.name], resamples, rows) for info in self.infos}


def unloaded(entry: Any, _: Any) -> Any:
    """A method without networks."""
    return SimpleNamespace(name=method_name(entry), kind=entry["kind"], denoiser=None, experts=None)


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder; of kept scores (.npz) the name alone, for they hold the pictures' times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix in WHOLE else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on(root, tmp_path, monkeypatch):
    head = (root / "config.py").read_text().rstrip().removesuffix("))")
    (tmp_path / "config.py").write_text(head + EVALUATION)
    config = load_config(str(tmp_path / "config.py"))
    models = Models(config, None, 2)
    cost = dict(reference_seconds=1.0, time_ratio=2.0, time_ratio_low=2.0, time_ratio_high=2.0, memory_bytes=1)
    monkeypatch.setattr(evaluating, "Models", lambda *_: models)
    monkeypatch.setattr(pictures, "generate", drawn)
    monkeypatch.setattr(results, "generate", drawn)
    monkeypatch.setattr(comparison, "cost_of", lambda *a: a[3].kept("cost", {}, lambda: cost))
    monkeypatch.setattr(comparison, "bucket_errors", lambda *_, **__: [0.5, 0.5])
    monkeypatch.setattr(evaluating, "bounds", lambda *_: {})

    def act(folder: Path) -> None:
        evaluating.evaluate(config, folder / "out")

    monkeypatch.setattr(scores, "EmojiScorer", Brightness)
    new, folder = tmp_path / "new", tmp_path / "run"
    new.mkdir()
    act(new)
    expected, count = tree(new), itertools.count()
    for _ in every_fault("killed", folder, Path.mkdir, act):
        act(folder)
        assert tree(folder) == expected
        next(count)
    assert next(count) >= 25  # what is not met is not tested


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("full", "resume"), ("killed", "overwrite")])
def test_the_demo_never_shows_another_run(kind, how, tmp_path, monkeypatch):
    config = load_config(str(CONFIG))
    tint = 0

    def trained(config: Any, out: Path, *, resume: bool, overwrite: bool, arguments: Any) -> None:
        open_workdir(out, resume=resume, overwrite=overwrite)
        begin_run(out, '{"train": {}}')
        line = '{"step": 1, "loss": 1.0, "entropy": 0.5, "weight_0": 0.5, "weight_1": 0.25, "weight_2": 0.25}\n'
        replace_text(out / "metrics.jsonl", line)

    def coloured(requests: Any, *_: Any, **__: Any) -> Any:
        return (Picture(request=p.request, pixels=p.pixels + np.uint8(tint), maps=p.maps) for p in drawn(requests))

    stages = [SimpleNamespace(name=name) for name in ("one", "two")]
    experts: Any = SimpleNamespace(
        names=("animals",), tokenizer=lambda _: None, unet=SimpleNamespace(stages=stages),
        schedule=SimpleNamespace(timesteps=lambda steps: [500, 1]),
    )  # fmt: skip
    monkeypatch.setattr(demonstrating, "train", trained)
    monkeypatch.setattr(demonstrating, "PROMPTS", demonstrating.PROMPTS[:1])
    monkeypatch.setattr(demonstrating, "Models", lambda *_: SimpleNamespace(experts=experts))
    monkeypatch.setattr(demonstrating.SampleOptions, "check", lambda *_: None)
    monkeypatch.setattr(demonstrating, "generate", coloured)
    monkeypatch.setattr(demonstrating, "recipe_of", lambda *_: {})
    monkeypatch.setattr(demonstrating, "make_method", unloaded)
    monkeypatch.setattr(demonstrating, "time", SimpleNamespace(perf_counter=lambda: 0.0))

    def prepare(folder: Path) -> None:
        nonlocal tint
        tint = 0
        demonstrating.demo(config, folder)
        tint = 100

    def act(folder: Path) -> None:
        holds = (folder / "config.json").exists()
        demonstrating.demo(config, folder, resume=how == "resume" and holds, overwrite=how == "overwrite")

    def shown(folder: Path) -> dict[str, str]:
        return {name: own for name, own in tree(folder).items() if name.endswith((".png", ".html"))}

    old, new, folder = (tmp_path / name for name in ("old", "new", "run"))
    prepare(old)
    prepare(new)
    act(new)
    count = itertools.count()
    for found in every_fault(kind, folder, prepare, act):
        for page in ("index.html", "comparison.png"):
            if (found / page).exists():
                assert shown(found)[page] in (shown(old)[page], shown(new)[page])
                if shown(found)[page] == shown(old)[page]:  # then nothing of the new one is beside it
                    assert shown(found).items() <= shown(old).items()
        act(found)
        assert shown(found) == shown(new)
        next(count)
    assert next(count) >= 15
