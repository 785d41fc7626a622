"""Scores of pictures: a few at a time, kept as long as they are of the same files, and figures of what has them."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from afa_jax.data.emoji.scenes import evaluation_prompts
from afa_jax.data.pictures import save_png
from afa_jax.errors import InputError
from afa_jax.evaluation.bootstrap import Resamples
from afa_jax.evaluation.comparison import scores
from afa_jax.evaluation.comparison.infos import MetricInfo
from afa_jax.evaluation.comparison.pictures import PictureFolder
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.evaluation.comparison.scores import CHUNK, PublishedScorer, load_scorers, scored
from afa_jax.evaluation.metrics import clip_scores
from afa_jax.evaluation.metrics import table as metrics
from afa_jax.evaluation.metrics.table import Weights

SEEDS = (0, 1)


def info(name, level="picture"):
    return MetricInfo(name=name, better="higher", what=name, level=level, digits=2)


class Brightness:
    """A picture metric: the mean of the picture, and of its real one where clip_i is asked for; it notes its calls."""

    def __init__(self, *names):
        self.infos, self.calls, self.sizes = tuple(map(info, names)), [], set()

    def __call__(self, pictures, prompts, references=None):
        self.calls.append(len(pictures))
        self.sizes |= {reference.shape for reference in references or ()}
        both = dict(brightness=pictures, clip_i=references)
        return {i.name: np.array([picture.mean() for picture in both[i.name]]) for i in self.infos}


class Colours:
    """A set metric: features are the mean colour, the figure the distance of the means."""

    def __init__(self, *names):
        self.infos, self.calls = tuple(info(name, "set") for name in names), []

    def features(self, pictures):
        self.calls.append(len(pictures))
        return np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float32)

    def distance(self, features, real):
        if len(features) < 3:
            raise ValueError("too few")
        return {i.name: float(np.abs(features.mean(0) - real.mean(0)).sum()) for i in self.infos}


@pytest.fixture
def items(tmp_path):
    """40 prompts with real pictures of another shape."""
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 256, (12, 20, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return [Item(prompt=f"prompt {i}", group=f"group {i % 8}", reference=tmp_path / f"{i}.png") for i in range(40)]


@pytest.fixture
def folder(tmp_path, items):
    folder = PictureFolder(tmp_path / "pictures", dict(method=dict(kind="expert")))
    folder.folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for item in items:
        for seed in SEEDS:
            save_png(folder.path(item, seed), random.integers(0, 256, (8, 8, 3), np.uint8), {})
    return folder


def of(metric, items, weights=""):
    return PublishedScorer(metric, items, (8, 8), weights)


def test_pictures_and_real_ones_are_read_a_few_at_a_time_and_cut_to_size(folder, items):
    bright, colours = Brightness("brightness", "clip_i"), Colours("fid", "kid")
    scorers = [of(bright, items), of(colours, items)]
    one, two = scored(scorers, folder, items, SEEDS)
    assert bright.calls == [CHUNK, 80 - CHUNK] and colours.calls == [40, CHUNK, 80 - CHUNK]
    assert bright.sizes == {(8, 8, 3)}
    assert one["brightness"].shape == (40, 2) and two["features"].shape == (40, 2, 3)
    for row, item in enumerate(items):
        for column, seed in enumerate(SEEDS):
            with Image.open(folder.path(item, seed)) as picture:
                assert one["brightness"][row, column] == np.asarray(picture).mean()


def test_a_real_picture_is_cut_in_its_middle(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    cut = scores.cut(tmp_path / "a.png", (10, 10))
    assert cut.shape == (10, 10, 3) and (cut == 255).all()
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"b\.png: a reference picture that cannot be read"):
        scores.cut(tmp_path / "b.png", (10, 10))


def test_kept_scores_are_those_of_the_same_pictures_references_and_weights(folder, items):
    def calls(weights="a", chosen=items, seeds=SEEDS):
        metric = Brightness("clip_i")
        [found] = scored([of(metric, chosen, weights)], folder, chosen, seeds)
        assert found["clip_i"].shape == (len(chosen), len(seeds))
        return len(metric.calls)

    assert calls() == 2
    assert calls() == 0
    assert calls(chosen=items[5:9], seeds=(1,)) == 0  # some of them are kept too
    assert calls(weights="b") == 2  # another network
    assert calls(weights="b") == 0
    save_png(folder.path(items[0], 0), np.zeros((8, 8, 3), np.uint8), {})  # a picture made again
    assert calls(weights="b") == 2
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(items[7].reference)
    assert calls(weights="b") == 2
    assert calls(weights="b") == 0
    (folder.folder / "scores-clip_i.npz").write_bytes(b"broken")
    assert calls(weights="b") == 2


def test_local_weights_are_told_apart_by_their_files(monkeypatch, tmp_path, items):
    monkeypatch.setattr(scores, "load_metrics", lambda names, weights: ([Brightness("brightness")], {}))
    (tmp_path / "clip").mkdir()
    file = tmp_path / "clip" / "model.safetensors"
    found = set()
    for time in (1, 1, 2):
        file.write_bytes(b"1")
        os.utime(file, ns=(time, time))
        [scorer], _ = load_scorers(["clip_t"], items, dict(clip=str(tmp_path / "clip")), size=(8, 8))
        found.add(scorer.weights)
    assert len(found) == 2


def test_sets_have_figures_of_all_prompts_only_and_the_kernel_distance_an_interval(folder, items):
    scorer = of(Colours("fid", "kid"), items)
    [own] = scored([scorer], folder, items, SEEDS)
    resamples = Resamples(prompts=40, count=100)
    figures = scorer.figures(own, resamples)
    assert set(figures) == {"fid", "kid"}
    assert figures["fid"].to_json()["low"] is None
    low, high = figures["kid"].interval
    assert low < high
    assert scorer.figures(own, resamples, [0, 8]) == {}  # a group of two prompts
    few = scorer.of(items[:1])
    assert few.figures({"features": own["features"][:1]}, Resamples(prompts=1, count=10)) == {}


def test_metrics_that_need_more_pictures_are_absent_before_any_is_made(monkeypatch, items):
    monkeypatch.setattr(scores, "load_metrics", lambda names, weights: ([Colours(name) for name in names], {}))
    names = ["fid", "kid", "is"]
    found, absent = load_scorers(names, items[:4], {}, size=(8, 8), seeds=2)
    assert [s.name for s in found] == ["fid", "kid"] and absent == {"is": "8 pictures of 4 prompts are too few for it"}
    found, absent = load_scorers(names, items[:2], {}, size=(8, 8), seeds=5)
    assert [s.name for s in found] == ["fid", "is"] and list(absent) == ["kid"]
    found, absent = load_scorers(["fid"], [Item(prompt="a"), Item(prompt="b")], {}, size=(8, 8), seeds=5)
    assert found == [] and "real pictures" in absent["fid"]


def test_a_real_picture_that_is_missing_is_found_at_the_start(monkeypatch, items):
    monkeypatch.setattr(scores, "load_metrics", lambda names, weights: ([Brightness("clip_i")], {}))
    assert load_scorers(["clip_i"], items, {}, size=(8, 8))[0]
    whole = items[7].reference.read_bytes()
    items[7].reference.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"7\.png: .* cannot be read"):
        load_scorers(["clip_i"], items, {}, size=(8, 8))
    items[7].reference.unlink()
    with pytest.raises(InputError, match=r"7\.png: the reference picture of 'prompt 7' is not there"):
        load_scorers(["clip_i"], items, {}, size=(8, 8))


def test_the_judge_is_absent_where_it_has_nothing_to_judge():
    drawn = [Item(prompt=p.caption, asked=p) for p in evaluation_prompts("mixed", 2, 0)]
    for prompts, size, why in (
        ([*drawn, Item(prompt="a cat")], (32, 64), "kind=emoji"),
        (drawn, (64, 64), "32x64"),
    ):
        found, absent = load_scorers(["emoji"], prompts, {}, size=size)
        assert found == [] and why in absent["emoji"]


def test_published_weights_that_are_broken_are_a_reason_and_a_users_own_an_error(monkeypatch, tmp_path):
    def load(infos, paths, device):
        raise InputError(f"{paths['clip']}: broken")

    weights = Weights(key="clip", find=lambda: tmp_path / "hub")
    known = dataclasses.replace(metrics.METRICS["clip_t"], modules=(), weights=(weights,))
    monkeypatch.setattr(metrics, "METRICS", dict(clip_t=known))
    monkeypatch.setattr(clip_scores, "load_clip_scores", load)
    found, absent = metrics.load_metrics(["clip_t"], device="cpu")
    assert found == [] and "hub: broken" in absent["clip_t"]
    with pytest.raises(InputError, match="broken"):
        metrics.load_metrics(["clip_t"], dict(clip=str(tmp_path)), "cpu")


def test_processes_that_write_the_same_picture_do_not_meet(tmp_path, monkeypatch):
    one, two = (np.full((4, 4, 3), value, np.uint8) for value in (0, 255))
    save = Image.Image.save

    def slow(self, path, **options):
        save(self, path, **options)
        if os.getpid() == pid:  # meanwhile another process writes it whole
            monkeypatch.setattr(os, "getpid", lambda: pid + 1)
            save_png(tmp_path / "a.png", two, {})

    pid = os.getpid()
    monkeypatch.setattr(Image.Image, "save", slow)
    save_png(tmp_path / "a.png", one, {})
    with Image.open(tmp_path / "a.png") as picture:
        assert (np.asarray(picture) == 0).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
