"""The search for merge weights: its spaces, its merge in memory, that it goes on as it was, and the command."""

import contextlib
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from afa_jax import search as command
from afa_jax.cli.commands import load_config, run
from afa_jax.errors import InputError, Stopped
from afa_jax.evaluation import search as searching
from afa_jax.evaluation import trials
from afa_jax.evaluation.comparison import scores
from afa_jax.evaluation.comparison.prompts import Item, load_items
from afa_jax.evaluation.metrics import table as metrics
from afa_jax.evaluation.search import (
    LIMIT,
    SPACE_KINDS,
    Space,
    emoji_score,
    full_scale_score,
    merge_stacks,
    score_weights,
)
from afa_jax.evaluation.trials import search, summary
from afa_jax.experts.frozen import load_experts
from afa_jax.methods.options import SampleOptions
from afa_jax.names import SEARCHERS
from afa_jax.trees import flatten, stack, take
from afa_jax.weights.load import load_text_encoder, load_unet
from tests import tiny
from tests.commands.conftest import says_nothing_of

STAGES = tuple(stage.name for stage in tiny.unet(0, tiny.MICRO_UNET).stages)
NAMES = ("a", "b", "c")


def space(kind, points=3):
    return Space(kind=kind, experts=NAMES, stages=STAGES, points=points)


@pytest.mark.parametrize("kind", SPACE_KINDS)
def test_weights_of_a_space(kind):
    own = space(kind)
    assert own.blocks == ("IN00", "IN01", "M00", "OUT00", "OUT01", "BASE")
    np.testing.assert_allclose(own.weights(own.average), 1 / 3, rtol=1e-15)
    rng = np.random.default_rng(0)
    parameters = {name: float(rng.uniform(-LIMIT, LIMIT)) for name in own.average}
    weights = own.weights(parameters)
    assert weights.shape == (6, 3)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-15)
    exponentials = {knot: np.exp([parameters[f"{knot}/{name}"] for name in NAMES]) for knot in own.knots}
    knots = {knot: values / values.sum() for knot, values in exponentials.items()}
    expected = {
        "blocks": dict(enumerate(own.blocks)),
        "experts": dict.fromkeys(range(6), "all"),
        "curve": {0: "point0", 2: "point1", 4: "point2", 5: "BASE"},
    }[kind]
    for row, knot in expected.items():
        np.testing.assert_allclose(weights[row], knots[knot], rtol=1e-12)
    if kind == "curve":  # half-way between two control points it is their geometric mean, normalised
        between = np.sqrt(knots["point0"] * knots["point1"])
        np.testing.assert_allclose(weights[1], between / between.sum(), rtol=1e-12)
    assert own.by_block(weights)["M00"] == dict(zip(NAMES, weights[2].tolist(), strict=True))


def test_what_no_space_can_be():
    with pytest.raises(InputError, match="two experts or more"):
        Space(kind="blocks", experts=("a",), stages=STAGES)
    for points in (1, 6):
        with pytest.raises(InputError, match="choose 2 to 5"):
            space("curve", points)


def test_the_merge_in_memory():
    unets, encoders = [tiny.unet(i, tiny.MICRO_UNET) for i in range(3)], [tiny.text_encoder(i) for i in range(3)]
    stacks = stack(unets), stack(encoders)
    one_hot = jnp.asarray(np.eye(3)[[0, 1, 2, 0, 1, 2]], jnp.float32)
    unet, encoder = merge_stacks(*stacks, one_hot)
    owners = dict(enumerate((0, 1, 2, 0, 1))) | {-1: 2}
    own = [flatten(unet) for unet in unets]
    for path, leaf in flatten(unet).items():
        head, index, *_ = path.split(".")
        owner = owners[int(index)] if head == "stages" else 2  # the time embedding is of BASE
        np.testing.assert_array_equal(leaf[0], own[owner][path], err_msg=path)
    for ours, theirs in zip(jax.tree.leaves(encoder), jax.tree.leaves(encoders[2]), strict=True):
        np.testing.assert_array_equal(ours[0], theirs)
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    unet, _ = merge_stacks(*stacks, jnp.asarray(rows, jnp.float32))
    for path, leaf in flatten(unet).items():
        head, index, *_ = path.split(".")
        row = rows[int(index)] if head == "stages" else rows[-1]
        expected = sum(row[n] * np.asarray(own[n][path], np.float64) for n in range(3))
        np.testing.assert_allclose(leaf[0], expected, atol=1e-6, err_msg=path)


def bowl(parameters: Mapping[str, float]) -> float:
    """A score that is best where every expert's logit is its number."""
    return -sum((value - "abc".index(name[-1])) ** 2 for name, value in parameters.items())


def trials_of(study: Any) -> list[tuple[Any, ...]]:
    return [(t.number, t.value, t.params) for t in study.get_trials(deepcopy=False) if t.value is not None]


@pytest.mark.parametrize("sampler", SEARCHERS)
def test_a_search_goes_on_as_if_it_had_never_stopped(sampler, tmp_path):
    """After a stop between trials, a crash within one, and SIGTERM; also the first trial is the average."""
    own = space("experts")

    def go(name, trials, evaluate=bowl):
        kwargs = dict(better="higher", sampler=sampler, seed=3, trials=trials)
        return search(tmp_path / name, evaluate, own, **kwargs)

    whole = go("whole", 25)
    assert trials_of(whole)[0] == (0, bowl(own.average), own.average)
    assert whole.best_value > bowl(own.average)
    go("parts", 4)
    calls = []

    def crash(parameters):
        calls.append(parameters)
        if len(calls) == 9:
            raise RuntimeError("a power cut")
        return bowl(parameters)

    with pytest.raises(RuntimeError, match="a power cut"):
        go("parts", 25, crash)
    stopped = threading.Event()

    def signalled(parameters):
        calls.append(parameters)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
            stopped.wait(30)
        return bowl(parameters)

    with pytest.raises(Stopped, match="stopped by SIGTERM at step 17; continue with --resume"):
        go("parts", 25, signalled)
    stopped.set()
    assert trials_of(go("parts", 25)) == trials_of(whole)


def test_a_search_goes_on_from_the_whole_records_of_a_damaged_log(tmp_path):
    """As a full disk or a power cut leaves it; optuna itself never reads such a log again."""
    own = space("experts")

    def go(log: Path, trials: int) -> list[tuple[Any, ...]]:
        study = search(log, bowl, own, better="higher", sampler="tpe", seed=3, trials=trials)
        return [trial[1:] for trial in trials_of(study)]  # one that was being written has a number, too

    expected = go(tmp_path / "whole", 6)
    go(tmp_path / "log", 4)
    log = (tmp_path / "log").read_bytes()
    lines = log.splitlines(keepends=True)
    damaged = {
        "unfinished": log[:-30],
        "first": lines[0][:-9],
        "torn": b"".join([*lines[:-1], lines[-1][:40], *lines[:1], lines[-1]]),  # and then appended to
        "bytes": b"".join([*lines[:9], b"\xff" + lines[9], *lines[10:]]),
        "zeros": log[:-100] + bytes(4096),
        "nested": log + b"[" * 100_000 + b"\n" + lines[-1],
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        path.with_name(f"{name}.lock").symlink_to(path)  # of a process that was killed
        with pytest.warns(UserWarning, match=rf"^{path}: line \d+ is no whole record; the search goes on from the \d+"):
            assert go(path, 6) == expected
        kept = path.with_name(f"{name}.damaged")
        assert kept.exists() == (name not in ("unfinished", "first", "zeros"))
        assert not kept.exists() or kept.read_bytes() == content

    records = {
        "text": b"some text\nof something else\n",
        "types": lines[0] + b'{"op_code":4,"worker_id":7,"study_id":0,"datetime_start":[1]}\n',
        "codes": lines[0] + b'{"op_code":99}\n',
        "other": lines[0] + b"".join(line.replace(b"all/a", b"all/z") for line in lines[1:]),
    }
    for name, content in records.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"^{tmp_path / name}: .*; restore the file, or start again with --over"):
            go(tmp_path / name, 6)
        assert (tmp_path / name).read_bytes() == content


def test_records_are_appended_whole_or_not_at_all(tmp_path):
    log = tmp_path / "log"
    kwargs: dict[str, Any] = dict(better="higher", sampler="tpe", seed=3)
    search(log, bowl, space("experts"), trials=2, **kwargs)
    before = log.read_bytes()
    with file_size_limit(len(before) + 30), pytest.raises(InputError, match=rf"^{log}: No space .*--resume"):
        search(log, bowl, space("experts"), trials=3, **kwargs)
    assert log.read_bytes() == before
    assert len(trials_of(search(log, bowl, space("experts"), trials=3, **kwargs))) == 3


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As a full disk: no file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lower_score_may_be_the_better_one(tmp_path):
    own = space("experts")
    study = search(
        tmp_path / "log", lambda parameters: -bowl(parameters), own, better="lower", sampler="cmaes", seed=0, trials=60
    )
    found = summary(study, own, dict(metric="kid"))
    assert found["score"] == min(score for _, score in found["history"]) < found["average"] == -bowl(own.average)
    assert len(found["history"]) == found["trials"] == 60


def test_time_is_a_budget_too(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    study = search(
        tmp_path / "log", bowl, space("experts"), better="higher", sampler="tpe", seed=0, trials=99, minutes=2
    )
    assert len(trials_of(study)) == 3  # begun after 30, 60 and 90 seconds


@pytest.mark.parametrize("sampler", SEARCHERS)
def test_a_score_that_is_no_number_is_the_worst(sampler, tmp_path):
    own, calls = space("experts"), []

    def broken(parameters):
        calls.append(parameters)
        return math.nan if len(calls) % 3 == 2 else bowl(parameters)

    kwargs: dict[str, Any] = dict(better="higher", sampler=sampler, seed=0, trials=14)
    found = summary(search(tmp_path / "log", broken, own, **kwargs), own, dict(metric="subject"))
    assert [i for i, (_, score) in enumerate(found["history"]) if score is None] == [1, 4, 7, 10, 13]
    assert found["trials"] == len(calls) == 14 and found["score"] >= found["average"] == bowl(own.average)
    json.dumps(found, allow_nan=False)
    with pytest.raises(InputError, match="the uniform average scores nan; try another --metric"):
        search(tmp_path / "first", lambda parameters: math.nan, own, **kwargs)


def test_both_is_the_share_of_pictures_with_both_subjects(monkeypatch):
    subjects = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    monkeypatch.setattr(searching, "load_judge", lambda: np.copy)
    monkeypatch.setattr(searching, "hits", lambda judgement, prompts: dict(subject=subjects[: len(judgement)]))
    score = emoji_score("both", 4)
    assert score.of([np.zeros((32, 64, 3), np.uint8)] * 4) == 0.5 and score.better == "higher"


def test_the_command(root, tmp_path, capsys):
    """It searches, resumes, refuses other settings; the weights it found score what it says, and are the merge's."""
    workdir, out = tmp_path / "search", tmp_path / "merged.safetensors"

    def go(*more: str) -> int:
        arguments = ["--config", str(root / "config.py"), "--workdir", str(workdir), "--prompts", "2", "--steps", "1"]
        return run(command.main, [*arguments, "--guidance", "1", "--batch", "2", *more])

    assert go("--trials", "2") == 0
    first = json.loads((workdir / "best.json").read_text())
    told = tmp_path / "new" / "best.json"
    assert go("--trials", "3", "--resume", "--write", str(out), "--out", str(told)) == 0
    best = json.loads(told.read_text())
    assert best["history"][:2] == first["history"] and best["trials"] == 3
    assert best["average"] == best["history"][0][1] <= best["score"]
    assert go("--trials", "3", "--out", str(told)) == 2 and go("--trials", "3", "--resume", "--out", str(out)) == 2
    other = tmp_path / "other.json"
    for content in (json.dumps(best | dict(settings=dict(best["settings"], seed=5)), indent=2), "{}"):
        other.write_text(content)
        assert go("--trials", "3", "--resume", "--out", str(other)) == 2 and other.read_text() == content
    (workdir / "best.json").unlink()
    for more in ((), ("--out", str(told))):  # with no trial missing
        assert go("--trials", "3", "--resume", *more) == 0
    assert json.loads((workdir / "best.json").read_text()) == best == json.loads(told.read_text())

    config = load_config(str(root / "config.py"))
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)  # as the command: one compilation
    rows = np.array([[best["weights"][block][name] for name in NAMES] for block in space("blocks").blocks])
    options = SampleOptions(size=(32, 64), steps=1, guidance=1.0, batch=2)
    assert score_weights(rows, experts, emoji_score("subject", 2), seed=1000, options=options) == best["score"]
    merged = merge_stacks(experts.unet, experts.text_encoder, jnp.asarray(rows, jnp.float32))
    for module, stored in zip(merged, (load_unet(out), load_text_encoder(out)), strict=True):
        written = flatten(stored)
        for path, leaf in flatten(take(module, 0)).items():
            np.testing.assert_allclose(leaf, written[path], atol=1e-6, err_msg=path)

    assert says_nothing_of(str(root), tmp_path) > 3 and says_nothing_of(str(tmp_path), tmp_path)

    capsys.readouterr()
    assert go("--trials", "3") == 2
    assert "is not empty: continue it with --resume" in capsys.readouterr().err
    assert go("--trials", "3", "--resume", "--metric", "style") == 2
    assert "searched with other metric; give it again, or another --workdir" in capsys.readouterr().err
    assert go("--trials", "3", "--resume", "--config.dtype=bfloat16") == 2
    assert "searched with other dtype; give it again, or another --workdir" in capsys.readouterr().err


def test_what_the_command_refuses(root, tmp_path, capsys, monkeypatch):
    def error(*more: str) -> str:
        arguments = ["--config", str(root / "config.py"), "--workdir", str(tmp_path / "none"), *more]
        assert run(command.main, arguments) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "--metric beauty: of emoji scenes there are subject," in error("--metric", "beauty")
    assert "--prompts 2; choose 3 or more" in error("--metric", "kid", "--prompts", "2")
    assert "--trials: 0: write a whole number from 1" in error("--trials", "0")
    assert "--minutes 0.0; choose more than 0" in error("--minutes", "0")
    assert "No such file" in error("--prompt_file", str(tmp_path / "absent.txt"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "needs optuna, which is not installed: pip install -r requirements-search.txt" in error()


def test_any_metric_of_full_scale_is_a_score(monkeypatch, tmp_path):
    """The mean over the pictures, or the figure of the set, beside the prompts' own real pictures."""
    info = metrics.MetricInfo(name="pickscore", better="lower", what="", level="picture", digits=1)

    def flat(*values):
        return [np.full((2, 2, 3), value, np.uint8) for value in values]

    class Brightness:
        infos = (info,)

        def __call__(self, pictures, prompts, references=None):
            assert prompts == ["one", "two"]
            return dict(pickscore=np.array([picture.mean() for picture in pictures]))

    class Distance:
        infos = (dataclasses.replace(info, name="fid", level="set"),)

        def features(self, pictures):
            return np.array([[picture.mean()] for picture in pictures])

        def distance(self, features, real):
            return dict(fid=float(np.abs(features.mean() - real.mean())))

    loaded = dict(pickscore=Brightness(), fid=Distance())
    monkeypatch.setattr(scores, "load_metrics", lambda names, weights: ([loaded[name] for name in names], {}))
    items = [Item(prompt="one"), Item(prompt="two")]
    score = full_scale_score("pickscore", items, {}, size=(2, 2))
    assert (score.metric, score.better, score.captions, score.references) == ("pickscore", "lower", ("one", "two"), ())
    assert score.of(flat(10, 20)) == 15

    for name, value in (("one", 40), ("two", 50)):
        Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.csv").write_text("prompt,reference\none,one.png\ntwo,two.png\n")
    pairs = load_items(ConfigDict(dict(kind="file", path=str(tmp_path / "prompts.csv"))))
    score = full_scale_score("fid", pairs, {}, size=(2, 2))
    assert score.of(flat(10, 20)) == 30 and score.references[0].startswith("one.png, ")
    with pytest.raises(InputError, match=r"--metric fid: it compares to real pictures, .* columns prompt and ref"):
        full_scale_score("fid", items, {}, size=(2, 2))


def test_the_searchs_prompts_are_not_those_of_evaluations():
    searched = set(emoji_score("subject", 64).captions)
    config = load_config(str(Path(command.__file__).parents[1] / "configs" / "emoji.py"))
    items = load_items(config.evaluation.prompts)
    assert len(searched) == 64 and len(items) == 200
    assert not searched & {item.prompt for item in items}
