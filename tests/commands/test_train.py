"""The trainer as a user runs it: with cache and validation, resumed, its files."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from afa_jax import sample
from afa_jax import train as command
from afa_jax.cli.commands import run
from afa_jax.fusion.pair_record import aggregators_hash
from afa_jax.training.workdir import read_metrics
from afa_jax.weights.tensors import read_tensors, write_tensors

TIMINGS = {"images_per_second", "seconds_per_step", "data_wait"}
VALIDATION = ("--config.validation.every=2", "--config.train.steps=4", "--config.train.log_every=1")


def train(root, workdir, *options, config="config.py"):
    where = ["--config", str(root / config), "--workdir", str(workdir)]
    return run(command.main, [*where, "--quiet", "--config.sabw.sites=last", *options])


def lines_of(workdir):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]


def files(cache):
    """When each was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def cached(root, tmp_path_factory):
    """A run of four steps from the cache, with validation, an average and accumulation."""
    folder = tmp_path_factory.mktemp("cached")
    options = [*VALIDATION, f"--config.cache.path={folder / 'cache'}", "--config.train.ema=0.9"]
    options += ["--config.train.accumulate=2", '--config.train.writers=("tensorboard",)']
    assert train(root, folder / "run", *options) == 0
    return folder, options


def test_a_run_writes_what_it_says(cached):
    folder, _ = cached
    workdir = folder / "run"
    names = {path.name for path in workdir.iterdir()}
    assert {
        "aggregators.safetensors", "ensemble.json", "config.json", "metrics.jsonl", "validation.jsonl", "samples",
        "checkpoints", "tensorboard",
    } <= names  # fmt: skip
    lines = lines_of(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    assert {"entropy", "gradient_norm", "parameter_norm", "update_norm", "weight_2"} <= lines[0].keys()
    assert read_metrics(workdir)[0].keys() >= TIMINGS
    assert [path.name for path in sorted((workdir / "samples").iterdir())] == ["step_00000002.png", "step_00000004.png"]
    with Image.open(workdir / "samples" / "step_00000004.png") as picture:
        assert picture.size == (64, 32)
    # The two steps' checkpoints; the best is one of them, and published too.
    assert {"2", "4"} <= {path.name for path in (workdir / "checkpoints").iterdir()}
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])["step"]
    assert json.loads((workdir / "best" / "ensemble.json").read_text())["training"]["steps"] == best
    same = aggregators_hash(workdir / "best") == aggregators_hash(workdir)
    assert same == (best == 4)


def test_a_resumed_run_is_the_same_run(cached, root):
    """And the cache is made once."""
    folder, options = cached
    workdir, cache = folder / "parts", files(folder / "cache")
    assert len(cache) == 3  # 64 scenes in shards of 32, and the empty caption
    assert train(root, workdir, *options, "--config.train.steps=3") == 0
    assert train(root, workdir, *options, "--resume") == 0
    one, other = (read_tensors(path / "aggregators.safetensors") for path in (folder / "run", workdir))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    assert lines_of(workdir) == lines_of(folder / "run")
    assert (workdir / "validation.jsonl").read_text() == (folder / "run" / "validation.jsonl").read_text()
    assert files(folder / "cache") == cache


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("--config.data.seed=1", "source, held_out"),
        ("--config.train.batch=4", "batch"),
        ("--config.train.seed=1", "seed"),
        ("--config.validation.pairs=4", "held_out, examples"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(option, changed, cached, root, tmp_path, capsys):
    folder, options = cached
    shutil.copytree(folder / "run", tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    assert train(root, tmp_path / "run", *options, "--config.train.steps=6", "--resume", option) == 2
    assert f"was trained on other data ({changed} changed)" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.train.accumulate=3", "train.accumulate=3 does not divide train.batch=2"),
        ("--config.train.remat=all", "train.remat='all': expected one of"),
        ("--config.train.ema=1.0", "train.ema=1.0: expected a finite number"),
        ('--config.train.writers=("excel",)', "excel"),
        ("--config.validation.pairs=64", "validation.pairs=64, but there are 64 examples in all"),
        ('--config.validation.prompts=("octopus riding a unicorn",)', "unicorn"),
    ],
)
def test_wrong_options_stop_before_anything_is_written(option, message, root, tmp_path, capsys):
    assert train(root, tmp_path / "run", "--config.validation.every=2", option) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_data_may_be_another_source(root, tmp_path):
    config = (root / "config.py").read_text().replace("data=None", 'data=dict(kind="emoji", seed=9, length=8)')
    (root / "other.py").write_text(config)
    options = (*VALIDATION, "--config.train.steps=2", "--config.validation.prompts=()")  # pictures have their test
    assert train(root, tmp_path / "run", *options, config="other.py") == 0
    assert json.loads((tmp_path / "run" / "validation.jsonl").read_text())["step"] == 2


def test_weights_of_another_run_are_noticed(cached, root, tmp_path, capsys):
    folder, _ = cached
    tensors = read_tensors(folder / "run" / "aggregators.safetensors")
    write_tensors(tmp_path / "aggregators.safetensors", {name: array + 1 for name, array in tensors.items()})
    shutil.copy(folder / "run" / "ensemble.json", tmp_path)
    arguments = ["--config", str(root / "config.py"), "--prompt", "octopus, noto style", "--out", str(tmp_path / "out")]
    assert run(sample.main, [*arguments, "--workdir", str(tmp_path)]) == 2
    assert "is not the file that ensemble.json beside it describes" in capsys.readouterr().err


def test_a_published_run_is_read_by_its_hub_id(cached, root, tmp_path, monkeypatch):
    folder, _ = cached
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder / "run")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    arguments = ["--config", str(root / "config.py"), "--prompt", "octopus, noto style", "--out", str(tmp_path)]
    assert run(sample.main, [*arguments, "--workdir", "owner/afa-emoji"]) == 0
    assert asked == [("owner/afa-emoji", ["aggregators.safetensors", "ensemble.json"])]
    with Image.open(tmp_path / "afa_000_000_octopus-noto-style.png") as picture:
        recipe = json.loads(picture.info["afa_jax"])
    assert recipe["made_by"]["aggregators_sha256"] == aggregators_hash(folder / "run")
