"""The comparison as a user runs it, on tiny experts: it is written, goes on, and a change makes its own pictures."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from afa_jax import evaluate
from afa_jax.commands import load_config, run
from afa_jax.errors import InputError
from afa_jax.evaluation import comparison, cost, judge
from afa_jax.evaluation import evaluate as evaluating
from afa_jax.evaluation.bootstrap import Figure, Resamples
from afa_jax.evaluation.comparison import (
    Measured,
    Protocol,
    at_equal_time,
    at_equal_time_of,
    entries_of,
    missing_controls,
    references,
)
from afa_jax.evaluation.metrics import MetricInfo
from afa_jax.evaluation.picture_files import folders_by_name, slug
from afa_jax.evaluation.pictures import PictureFolder, record_of
from afa_jax.evaluation.prompts import Item, fewer
from afa_jax.generate import Picture, SampleOptions
from afa_jax.methods import Models, check_entry, make_method
from afa_jax.weights.folders import save_folder
from tests import tiny
from tests.commands.conftest import says_nothing_of

EVALUATION = """
        evaluation=dict(
            prompts=dict(kind="emoji", seed=1, groups={{"two topics": 4, "unseen pairs": 2}}),
            seeds=(0, 1), steps=2, guidance=2.0, batch=4, metrics=({metrics}), main="subject", resamples=50,
            noise=dict(pairs=18), equal_time=("uniform",), examples=2, controls=False,
            curves=dict(methods=("expert:a",), steps=(1, 2), prompts=2, seeds=(0,)),
            methods=[
                dict(kind="expert", expert="a"), dict(kind="inside", expert="a"), dict(kind="uniform"),
                dict(kind="average"), dict(kind="superdiff", eta=0.5), dict(kind="afa"),
            ],
        ),
    ))
"""


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    """A copy of the experts that a test may change, and a config with an evaluation."""
    place = tmp_path_factory.mktemp("comparison")
    for name in ("base", "a", "b", "c"):
        shutil.copytree(root / name, place / name)
    head = (root / "config.py").read_text().replace(str(root), str(place)).rstrip().removesuffix("))")
    (place / "config.py").write_text(head + EVALUATION.format(metrics='"emoji", "pickscore"'))
    return place


def arguments(place, *more):
    return ["--config", f"{place}/config.py", "--out", str(place / "out"), *more]


def pictures(place):
    return {path: path.stat().st_mtime_ns for path in (place / "out" / "pictures").glob("*/*.png")}


def test_a_comparison_is_written_goes_on_and_notices_what_changed(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(judge, "BATCH", 8)  # it fills its batches, and here there are few pictures
    made: dict[str, weakref.ref] = {}
    alive: list[str] = []

    def make(entry, models):
        method = make_method(entry, models)
        made[method.name] = weakref.ref(method)
        return method

    def compare(measured, protocol):
        gc.collect()
        alive.extend(name for name, method in made.items() if method() is not None)
        return comparison.compare(measured, protocol)

    monkeypatch.setattr(comparison, "make_method", make)
    monkeypatch.setattr(evaluating, "compare", compare)
    assert run(evaluate.main, arguments(place)) == 0
    assert len(made) >= 5 and alive == []  # the networks of a measured method do not stay on the device
    printed = capsys.readouterr().out
    report = json.loads((place / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in report["methods"]}
    assert {"expert:a", "inside:a", "uniform", "average", "superdiff eta=0.5"} <= set(rows) and "expert:a" in printed
    # What cannot be had is said, and the rest goes on.
    assert list(report["absent_methods"]) == ["afa"] and "--workdir is missing" in report["absent_methods"]["afa"]
    assert list(report["absent_metrics"]) == ["pickscore"] and "without pickscore: " in printed
    assert report["protocol"]["groups"] == {"two topics": 4, "unseen pairs": 2}
    # One expert alone and inside the ensemble are the same network.
    assert rows["inside:a"]["noise_mse"]["mean"] == pytest.approx(rows["expert:a"]["noise_mse"]["mean"], rel=1e-4)
    assert rows["superdiff eta=0.5"]["noise_mse"] is None
    assert (rows["expert:a"]["evaluations"], rows["uniform"]["evaluations"]) == (4, 12)
    for row in rows.values():
        figure = row["metrics"]["subject"]
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert row["seconds_per_image"] > 0 and row["time_ratio"] > 0 and row["memory_bytes"] > 0
        assert row["pictures"] == 12 and set(row["groups"]) == {"two topics", "unseen pairs"}
    assert report["references"] == dict(best="expert:a", merge="average")
    against = rows["uniform"]["against"]["best"]["subject"]
    assert sum(against[key] for key in ("wins", "losses", "ties")) == 6
    assert against["difference"] == pytest.approx(
        rows["uniform"]["metrics"]["subject"]["value"] - rows["expert:a"]["metrics"]["subject"]["value"]
    )
    assert rows["expert:a"]["against"].keys() == {"merge"}
    [curve] = report["curves"]
    assert (curve["prompts"], curve["seeds"]) == (2, [0]) and [point["steps"] for point in curve["points"]] == [1, 2]
    # With the comparison's steps a curve's point is the row's own pictures, and its time.
    assert curve["points"][1]["seconds_per_image"] == rows["expert:a"]["seconds_per_image"]
    for row in rows.values():  # all in one expert's seconds
        assert row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
        assert row["seconds_per_image"] / row["time_ratio"] == pytest.approx(
            np.median([one["reference_seconds"] for one in [*rows.values(), *curve["points"]]])
        )
    ceiling = report["bounds"]["real scenes (ceiling)"]
    assert ceiling["subject"] > 0.5
    assert all(ceiling["kid"] < row["metrics"]["kid"]["value"] for row in rows.values())
    page = (place / "out" / "report.html").read_text()
    assert "superdiff eta=0.5" in page and "data:image/png;base64" in page and "pickscore" in page

    assert says_nothing_of(str(place), place / "out") > 20  # absent metrics are explained, without folders

    # Again: nothing is made anew, and the figures are the same.
    before = pictures(place)
    broken, gone = list(before)[:2]
    broken.write_bytes(b"")
    gone.unlink()
    assert run(evaluate.main, arguments(place)) == 0
    after = pictures(place)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} == {broken, gone}
    again = json.loads((place / "out" / "report.json").read_text())
    for row in again["methods"]:
        old = rows[row["name"]]
        assert {key: row[key] for key in ("metrics", "groups", "memory_bytes", "time_ratio")} == {
            key: old[key] for key in ("metrics", "groups", "memory_bytes", "time_ratio")
        }

    # A part of it is a report of its own, whatever the config's curves and rows of equal time name.
    whole = (place / "out" / "report.json").read_bytes()
    assert run(evaluate.main, arguments(place, "--method", "uniform", "--prompts", "4")) == 0
    part = json.loads((place / "out" / "part" / "report.json").read_text())
    assert "uniform" in [row["name"] for row in part["methods"]] and part["curves"] == []
    assert part["protocol"]["prompts"] == 4 and (place / "out" / "report.json").read_bytes() == whole
    assert pictures(place).keys() == after.keys()

    # A changed expert makes its own pictures, and so do the methods that use it; the others keep theirs.
    shutil.rmtree(place / "b")
    save_folder(place / "b", unet=tiny.unet(9, tiny.MICRO_UNET), text_encoder=tiny.text_encoder(9))
    assert (
        run(evaluate.main, [*arguments(place, "--pictures_only"), "--method", "expert:a", "--method", "average"]) == 0
    )
    assert {path.parent.name.rsplit("-")[0] for path in pictures(place).keys() - after.keys()} == {"average"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "magic"], "no method 'magic'"),
        (["--method", "uniform,top=1"], "method uniform: no option 'top'; it has none"),
        (["--config.evaluation.equal_time=('unifrom',)"], "evaluation.equal_time: no method 'unifrom'; there are"),
        (["--config.evaluation.curves.methods=('afaa',)"], "evaluation.curves.methods: no method 'afaa'; there are"),
        (["--config.evaluation.seeds=()"], "evaluation.seeds"),
        (["--prompts", "1"], "--prompts"),
        (["--config.evaluation.main=clip"], "evaluation.main='clip': it is none of the metrics"),
        (["--config.evaluation.metrics=('emoj',)"], "emoj"),
        (["--config.evaluation.steps=0"], "evaluation.steps"),
        (["--config.evaluation.curves.prompts=0"], "evaluation.curves.prompts"),
        (["--config.evaluation.curves.steps=(1, -2)"], "steps=-2"),
        (["--method", "afa,top=9"], "afa: top=9"),
        (["--pictures_only", "--method", "uniform", "--method", "afa,top=9"], "afa: top=9"),
    ],
)
def test_wrong_input_is_one_line(root, place, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    assert run(evaluate.main, ["--config", f"{place}/config.py", "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_pictures_do_not_depend_on_the_list_of_prompts(place):
    """Fewer prompts are a part of all: none is made anew."""
    one = ("--method", "expert:a", "--pictures_only")
    assert run(evaluate.main, arguments(place, *one)) == 0
    before = pictures(place)
    assert run(evaluate.main, arguments(place, *one, "--prompts", "3")) == 0
    assert pictures(place) == before


@pytest.mark.parametrize("metrics", ["('pickscore',)", "()"])
def test_a_grid_is_had_without_any_metric(place, metrics, monkeypatch, capsys):
    """The pictures that are there are taken, and a name leads to them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = [f"--config.evaluation.metrics={metrics}", "--config.evaluation.main=noise"]
    assert run(evaluate.main, [*arguments(place, *more), "--method", "expert:a", "--method", "uniform"]) == 0
    said = capsys.readouterr().out
    assert "no metric is there" in said and said.rstrip().endswith("grid.png")
    (grid,) = (path for path in place.rglob("grid.png") if path.parent.name == "part")
    with Image.open(grid) as picture:
        assert picture.width > 100 and picture.height > 100
    root = grid.parents[1] / "pictures"
    folders = {name: path for name, path in folders_by_name(root).items() if name in ("expert:a", "uniform")}
    assert len(folders) == 2 and all(path.name.startswith(slug(name)) for name, path in folders.items())
    assert all("octopus" in path.name or "_seed" in path.name for path in folders["uniform"].glob("*.png"))


OPTIONS = SampleOptions(size=(32, 64), steps=2, guidance=2.0, batch=4)


@pytest.fixture(scope="module")
def config(root):
    config = load_config(str(root / "config.py"))
    config.unlock()
    return config


def key(config, entry, options=OPTIONS):
    return PictureFolder(Path(), record_of(make_method(entry, Models(config)), options)).folder.name


def test_pictures_are_named_by_what_makes_them(root, config, tmp_path):
    entry = dict(kind="expert", expert="a")
    own = key(config, entry)
    assert own == key(config, entry | dict(name="another")) and own.startswith("expert-")
    assert own == key(config, entry, dataclasses.replace(OPTIONS, batch=1))
    method = make_method(entry | dict(guidance=2, eta=0), Models(config))
    assert own[-12:] == protocol().folder_of(method).folder.name[-12:]  # whatever it is called
    assert own != key(config, entry, dataclasses.replace(OPTIONS, steps=3))
    assert own != key(ConfigDict(config.to_dict() | dict(dtype="bfloat16")), entry)
    # Another noise schedule of the base, and nothing else.
    shutil.copytree(root / "base", tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(set_alpha_to_one=True)))
    assert own != key(ConfigDict(config.to_dict() | dict(base=str(tmp_path / "base"))), entry)
    # A file is known by what it holds.
    shutil.copytree(root / "a", tmp_path / "copy")
    one, two = (key(config, dict(kind="checkpoint", path=str(path))) for path in (root / "a", tmp_path / "copy"))
    assert one == two != key(config, dict(kind="checkpoint", path=str(root / "b")))


def test_costs_are_measured_again_beside_another_reference(config, tmp_path, monkeypatch):
    models = Models(config)
    calls: list[tuple] = []
    method, reference, other = (make_method(dict(kind="expert", expert=name), models) for name in "abc")
    folder = PictureFolder(tmp_path, record_of(method, OPTIONS))
    monkeypatch.setattr(cost, "program_memory", lambda *_: len(calls))

    def timer(*arguments):
        calls.append(arguments)
        return lambda: (1.0, 1.0)

    monkeypatch.setattr(cost, "_timer", timer)

    def measured(*against, options=OPTIONS):
        before = len(calls)
        cost.cost_of(method, options, against, folder)
        return len(calls) > before

    more = dataclasses.replace(OPTIONS, steps=4)
    assert measured(reference, OPTIONS) and not measured(reference, OPTIONS)
    assert measured(reference, more) and not measured(reference, more)
    assert measured(other, more)
    assert measured(other, more, options=dataclasses.replace(OPTIONS, one_by_one=True))
    assert not measured(other, more, options=dataclasses.replace(OPTIONS, one_by_one=True))


def row(name, value=0.0, pictures=None, **fields):
    figure = Figure(value=value, resampled=np.full(3, value))
    fields = dict(name=name, kind="average", family="parameter space", steps=10, time_ratio=1.0) | fields
    entry = dict(kind=fields["kind"], name=name)
    return Measured(
        row=fields,
        entry=entry,
        scores=[],
        figures=dict(main=figure),
        pictures=pictures or PictureFolder(Path(), dict(method=dict(kind="x"))),
    )


def test_in_one_experts_time_a_method_never_takes_more():
    def steps(ratio, own=10):
        entry = at_equal_time(row("afa", time_ratio=ratio, steps=own))
        return None if entry is None else (entry["name"], entry["steps"], entry["what"])

    name = "afa in one expert's time"
    assert steps(2.0) == (name, 5, "5 steps instead of 10")
    assert steps(3.9) == (name, 2, "2 steps instead of 10")  # 3 would take 17 % more
    assert steps(3.9, own=40) == (name, 10, "10 steps instead of 40")
    assert steps(50.0) == (name, 1, "1 steps instead of 10")
    assert steps(1.0) is steps(0.97) is None


def test_of_all_methods_the_costly_ones_get_a_row_at_equal_time():
    measured = [
        row("expert:a", kind="expert", family="control", time_ratio=1.0),
        row("inside:a", kind="inside", family="control", time_ratio=3.0),
        row("in turns", kind="time", family="time axis", time_ratio=1.3),
        row("router", kind="router", time_ratio=4.5),
        row("afa", kind="afa", time_ratio=4.0),
    ]
    measured.append(dataclasses.replace(row("expert:a, 40 steps", time_ratio=4.0), entry=dict(kind="expert", steps=40)))
    measured.append(dataclasses.replace(row("permuted", time_ratio=4.0), entry=dict(kind="afa", order=("b", "a"))))

    def names(wanted):
        return [entry["name"].removesuffix(" in one expert's time") for entry in at_equal_time_of(measured, wanted)]

    assert names(("all",)) == ["router", "afa"]
    assert names(("afa", "inside:a", "expert:a")) == ["inside:a", "afa"]
    assert names(()) == []


def test_no_comparison_is_without_its_controls():
    def controls(*methods, names=("a", "b")):
        return {entry["name"]: entry for entry in missing_controls(methods, names)}

    plain = {"expert:a", "expert:b", "inside:a", "inside:b", "uniform"}
    assert controls(dict(kind="average")).keys() == plain
    # A row with steps of its own is no control, and one under another name is one.
    some = (dict(kind="expert", expert="a", steps=40), dict(kind="inside", expert="b", name="b, inside"))
    assert controls(*some).keys() == plain - {"inside:b"}
    afa = dict(kind="afa", name="ours", workdir="run")
    permuted = controls(afa, dict(kind="afa", name="less", family="ablation"))["ours, experts permuted"]
    assert permuted == afa | dict(name="ours, experts permuted", order=("b", "a"), family="control")
    assert controls(afa, dict(kind="afa", order=("b", "a"))).keys() == plain
    assert "ours, experts permuted" in controls(afa, dict(kind="time", order=("b", "a")))
    assert controls(afa, names=("a",)).keys() == {"expert:a", "inside:a", "uniform"}

    methods = [dict(kind="average"), dict(kind="afa")]
    config = ConfigDict(dict(experts=[dict(name="a"), dict(name="b")], evaluation=dict(methods=methods)))
    assert entries_of(config).keys() == plain | {"average", "afa", "afa, experts permuted"}
    for entry in entries_of(config).values():
        check_entry(entry)
    config.evaluation.controls = False
    assert entries_of(config).keys() == {"average", "afa"}


def test_an_absent_main_metric_gives_way_to_one_that_is_there():
    """The run goes on, and says so."""
    shared, absent = protocol(), dict(pickscore="no weights")
    assert evaluating.main_metric("main", shared, absent) == "main"
    with pytest.warns(UserWarning, match="'pickscore' is absent; the best ones are chosen by 'main'"):
        assert evaluating.main_metric("pickscore", shared, absent) == "main"
    with pytest.raises(InputError, match="'clip': it is none of the metrics: main, pickscore"):
        evaluating.main_metric("clip", shared, absent)


class Scorer:
    name, weights = "fake", ""

    def __init__(self, better):
        self.infos = (MetricInfo(name="main", better=better, what="", level="picture", digits=2),)

    def of(self, items):
        return self

    def score(self, pictures, items):
        return {}

    def figures(self, scores, resamples, rows=None):
        return {}


def protocol(better="higher", items=()):
    return Protocol(
        items=items, seeds=(0,), options=OPTIONS, scorers=[Scorer(better)], main="main",
        resamples=Resamples(prompts=2, count=3), pairs=None, root=Path(),
    )  # fmt: skip


def test_the_best_merge_is_a_merge():
    measured = [
        row("expert:a", 0.4, kind="expert", family="control", steps=2),
        row("expert:b", 0.6, kind="expert", family="control", steps=2),
        row("expert:a, more steps", 0.9, kind="expert", family="control", steps=8),
        row("inside:a", 0.9, kind="inside", family="control"),
        row("average", 0.3),
        row("ties", 0.2, kind="ties"),
        row("fine-tuned", 0.8, kind="checkpoint"),
        row("tuned merge", 0.7, family="control"),
        row("afa, top 1", 0.7, kind="afa", family="ablation"),
        row("afa", 0.5, kind="afa", family="AFA"),
    ]
    assert references(measured, protocol()) == dict(best="expert:b", merge="average", afa="afa")
    assert references(measured, protocol("lower")) == dict(best="expert:a", merge="ties", afa="afa")
    assert references(measured[2:5], protocol()) == dict(merge="average")


def test_example_maps_are_kept_beside_the_pictures(config, tmp_path, monkeypatch):
    items, sampled = [Item(prompt=f"{style} style") for style in ("noto", "fluent")], []

    def sample(requests, *_, options, **__):
        sampled.append(options)
        maps = (np.full((2, 3, 4, 8), 1 / 3, np.float32), np.full((2, 3, 2, 4), 1 / 3, np.float32))
        return [Picture(request=request, pixels=np.zeros((32, 64, 3), np.uint8), maps=maps) for request in requests]

    monkeypatch.setattr(evaluating, "generate", sample)
    folder = PictureFolder(tmp_path, dict(method=dict(kind="uniform")))
    measured = [row("uniform", kind="uniform", pictures=folder)]
    models = Models(config)
    for prompts in ([items[0].prompt], [items[0].prompt], [item.prompt for item in items]):
        found = evaluating.example_maps(measured, "uniform", models, protocol(items=items), prompts)
        assert found.keys() == {("uniform", prompt) for prompt in prompts}
        for maps in found.values():
            np.testing.assert_allclose(maps, np.full((3, 4, 8), 1 / 3), atol=1e-4)
    assert len(sampled) == 2 and all(options.maps and options.batch == 1 for options in sampled)
    assert evaluating.example_maps(measured, None, models, protocol(items=items), []) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(kind="magic"), "no method 'magic'"),
        (dict(kind="ties", densty=0.3), "ties: no option 'densty'; there are density, scale"),
        (dict(kind="uniform", top=1), "method uniform: no option 'top'; it has none"),
        (dict(kind="expert"), "method expert: the option expert is missing"),
        (dict(kind="checkpoint"), "method checkpoint: the option path is missing"),
        (dict(kind="uniform", steps=2.5), r"method uniform: steps=2\.5; choose 1 or more"),
        (dict(kind="uniform", eta="x"), "method uniform: eta='x'; make it a finite number"),
    ],
)
def test_a_misspelt_method_is_found_before_the_work(entry, message):
    with pytest.raises(InputError, match=message):
        entries_of(ConfigDict(dict(evaluation=dict(methods=[dict(kind="uniform", name="fine"), entry]))))


def test_fewer_prompts_are_of_all_groups_in_their_shares():
    items = [Item(prompt=str(i), group="a" if i < 60 else "b") for i in range(90)]
    chosen = fewer(items, 30)
    assert [int(item.prompt) for item in chosen] == [*range(20), *range(60, 70)]
    many = [Item(prompt=str(i), group=str(i % 7)) for i in range(20_000)]
    assert len(fewer(many, 500)) == 500


def test_noise_needs_pictures_of_its_own_where_prompts_are_not_emoji():
    def pairs(**noise):
        return evaluating.noise_pairs(
            ConfigDict(dict(evaluation=dict(prompts=dict(kind="coco"), noise=noise)), convert_dict=True)
        )

    assert pairs(pairs=0) is None
    with pytest.raises(InputError, match=r"evaluation\.noise\.data is missing"):
        pairs(pairs=4)
    with pytest.raises(InputError, match=r"evaluation\.noise\.pairs=9: .* only 5 examples"):
        pairs(pairs=9, data=dict(kind="emoji", seed=0, length=5))
