"""The comparison as a user runs it, on tiny experts: it is written, goes on, and a change makes its own pictures."""

import dataclasses
import gc
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from afa_jax import evaluate
from afa_jax.cli.commands import load_config, run
from afa_jax.errors import InputError
from afa_jax.evaluation.bootstrap import BootstrapEstimate, Resamples
from afa_jax.evaluation.comparison import comparison, cost, results
from afa_jax.evaluation.comparison import evaluate as evaluating
from afa_jax.evaluation.comparison.comparison import Measured, Protocol, at_equal_time, at_equal_time_of, references
from afa_jax.evaluation.comparison.infos import MetricInfo
from afa_jax.evaluation.comparison.main_metric import main_metric
from afa_jax.evaluation.comparison.picture_files import folders_by_name, read_index, slug, write_index, write_method
from afa_jax.evaluation.comparison.pictures import PictureFolder, record_of
from afa_jax.evaluation.comparison.prompts import Item, fewer
from afa_jax.evaluation.emoji import judge
from afa_jax.evaluation.emoji import scores as emoji
from afa_jax.methods.entries import entries_of, missing_controls
from afa_jax.methods.method import Models, check_entry, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.report import __main__ as report_page
from afa_jax.sampling.generation import Picture
from afa_jax.weights.formats.folders import save_folder
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
        (["--prompts", "0"], "--prompts"),
        (["--config.evaluation.main=clip"], "evaluation.main='clip': it is none of the metrics"),
        (["--config.evaluation.main=nois", "--config.evaluation.metrics=()"], "evaluation.main='nois'"),
        (["--config.evaluation.main=noise", "--config.evaluation.noise.pairs=0"], "evaluation.noise.pairs is 0"),
        (["--config.evaluation.main=is"], "evaluation.main='is'"),  # a metric, and none of these
        (["--config.evaluation.stand_out=('subjct',)", "--pictures_only"], "evaluation.stand_out='subjct'"),
        (["--config.evaluation.metrics=('emoj',)"], "evaluation.metrics: metric 'emoj' is not known"),
        (["--config.evaluation.weights=dict(clop='x')"], "evaluation.weights"),
        (["--config.evaluation.noise.pair=3"], "evaluation.noise.pair"),
        (["--config.evaluation.steps=0"], "evaluation.steps"),
        (["--config.evaluation.curves.prompts=0"], "evaluation.curves.prompts"),
        (["--config.evaluation.curves.steps=(1, -2)"], "evaluation.curves.steps"),
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


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_comparison_without_any_metric_has_pictures_costs_and_a_page(place, monkeypatch, capsys):
    """Each metric is absent for a reason, and the noise MSE takes their place, of one prompt as well."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(emoji, "load_judge", lambda: judge.load_judge(place / "none.safetensors"))
    more = ["--method", "expert:a", "--method", "uniform", "--prompts", "1", "--config.evaluation.equal_time=()"]
    assert run(evaluate.main, arguments(place, *more)) == 0
    said = capsys.readouterr()
    assert "no metric is there" in said.out and said.out.count("without emoji: ") == 1
    assert "'subject' is absent; the best ones are chosen by 'noise'" in said.err
    part = place / "out" / "part"
    with Image.open(part / "grid.png") as picture:
        assert picture.width > 100 and picture.height > 100
    report = json.loads((part / "report.json").read_text())
    assert report["absent_metrics"].keys() == {"emoji", "pickscore"}
    assert "none.safetensors" in report["absent_metrics"]["emoji"] and str(place) not in str(report)
    assert [metric["name"] for metric in report["metrics"]] == ["noise"] and report["bounds"] == {}
    rows = {row["name"]: row for row in report["methods"]}
    for row in rows.values():
        assert row["time_ratio"] > 0 and row["seconds_per_image"] > 0 and row["memory_bytes"] > 0
        figure = dict(value=row["noise_mse"]["mean"], low=None, high=None) if row["noise_mse"] else None
        assert row["metrics"].get("noise") == figure
    apart = rows["uniform"]["against"]["best"]["noise"]["difference"]
    assert apart == pytest.approx(rows["uniform"]["noise_mse"]["mean"] - rows["expert:a"]["noise_mse"]["mean"])
    page = (part / "report.html").read_text()
    assert "time ratio" in page and "none.safetensors" in page and "data:image/png;base64" in page
    root = part.parent / "pictures"
    folders = {name: path for name, path in folders_by_name(root).items() if name in ("expert:a", "uniform")}
    assert len(folders) == 2 and all(path.name.startswith(slug(name)) for name, path in folders.items())
    assert all("octopus" in path.name or "_seed" in path.name for path in folders["uniform"].glob("*.png"))


def test_a_method_that_is_not_finite_is_named_and_costs_no_other_its_row(place, tmp_path, capsys):
    """Not even where it is the first expert, beside whose time all others are measured."""
    unet = tiny.unet(1, tiny.MICRO_UNET)
    last: Any = unet.stages[-1]
    last.conv_out.kernel[...] *= 1e38
    shutil.copytree(place / "a", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")
    save_folder(tmp_path / "new", unet=unet)
    shutil.copytree(tmp_path / "new" / "unet", tmp_path / "broken" / "unet")
    experts = [dict(name="broken", path=f"{tmp_path}/broken"), dict(name="b", path=f"{place}/b")]
    line = ["--config", f"{place}/config.py", f"--config.experts={experts}", "--out", str(tmp_path / "out")]
    methods = [dict(kind="expert", expert="broken"), dict(kind="expert", expert="b"), dict(kind="uniform")]
    fields = dict(methods=methods, seeds=(0,), equal_time=()) | {"noise.pairs": 0, "curves.methods": ()}
    line += ["--prompts", "2", *(f"--config.evaluation.{name}={value}" for name, value in fields.items())]
    for more in (["--pictures_only"], []):
        assert run(evaluate.main, [*line, *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: expert:broken, uniform: ") and "NaN" in error
    report = json.loads((tmp_path / "out" / "part" / "report.json").read_text())
    assert [row["name"] for row in report["methods"]] == ["expert:b"]
    assert report["absent_methods"].keys() == {"expert:broken", "uniform"}


def test_the_index_has_the_methods_of_every_process_that_made_pictures(place, tmp_path):
    """So the sheet has all of them, in the config's order and then those of the command lines."""
    out = ["--config", f"{place}/config.py", "--out", str(tmp_path), "--pictures_only", "--prompts", "1"]
    for method in ("average,steps=1", "expert:a", "expert:b,steps=1"):
        assert run(evaluate.main, [*out, "--method", method]) == 0
    names = read_index(tmp_path / "pictures")["methods"]
    assert names[0] == "expert:a" and names[-2:] == ["expert:b,steps=1", "average,steps=1"]
    sheet = tmp_path / "sheet.png"
    assert run(report_page.main, ["--sheet", str(tmp_path), "--out", str(sheet)]) == 0
    with Image.open(sheet) as picture:
        assert picture.height > 3 * 64
    assert run(evaluate.main, [*out, "--method", "expert:a", "--config.evaluation.examples=0"]) == 0
    assert not read_index(tmp_path / "pictures")["examples"]


def test_the_index_has_the_methods_of_processes_that_write_it_at_once(tmp_path):
    """Threads here; a lock that one of them has keeps out the others as it does processes."""
    names = [f"method {i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        wait = [pool.submit(write_index, tmp_path, methods=[n], prompts=["a"], examples=[], seeds=[0]) for n in names]
        wait += [pool.submit(write_method, tmp_path / "of", name, dict(kind="a")) for name in names]
    assert all(one.exception() is None for one in wait)
    assert sorted(read_index(tmp_path)["methods"]) == sorted(names)
    assert set(folders_by_name(tmp_path)) == set(names)


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
        cost.cost_of(method, options, against, folder, ["fox"])
        return len(calls) > before

    more = dataclasses.replace(OPTIONS, steps=4)
    assert measured(reference, OPTIONS) and not measured(reference, OPTIONS)
    assert measured(reference, more) and not measured(reference, more)
    assert measured(other, more)
    assert measured(other, more, options=dataclasses.replace(OPTIONS, one_by_one=True))
    assert not measured(other, more, options=dataclasses.replace(OPTIONS, one_by_one=True))


def figure(value):
    return BootstrapEstimate(value=value, resampled=np.full(3, value))


def row(name, value=0.0, pictures=None, figures=None, **fields):
    fields = dict(name=name, kind="average", family="parameter space", steps=10, time_ratio=1.0) | fields
    entry = dict(kind=fields["kind"], name=name)
    return Measured(
        row=fields,
        entry=entry,
        scores=[],
        figures=figures or dict(main=figure(value)),
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
    infos = protocol().infos
    assert main_metric("main", infos, noise=True) == main_metric("", infos, noise=True) == "main"
    assert main_metric("noise", infos, noise=True) == main_metric("", [], noise=True) == "noise"
    assert main_metric("", [], noise=False) == ""
    with pytest.warns(UserWarning, match="'pickscore' is absent; the best ones are chosen by 'main'"):
        assert main_metric("pickscore", infos, noise=True) == "main"
    with pytest.warns(UserWarning, match="'pickscore' is absent; no best ones are chosen"):
        assert main_metric("pickscore", [], noise=False) == ""


def test_the_noise_mse_chooses_the_best_where_it_is_the_main_metric():
    measured = [
        row(name, 0.0, kind="expert", family="control", steps=2, figures=dict(main=figure(better), noise=figure(noise)))
        for name, better, noise in (("expert:a", 0.9, 0.2), ("expert:b", 0.1, 0.1))
    ]
    measured.append(row("merge", figures=dict(main=figure(0.5))))  # it has no noise MSE
    shared = dataclasses.replace(protocol(), main="noise")
    assert [info.name for info in shared.infos] == ["noise", "main"]
    assert references(measured, shared) == dict(best="expert:b")
    assert references(measured, dataclasses.replace(protocol(), main="", scorers=[])) == {}
    named = comparison.compare(measured, shared)
    assert named == dict(best="expert:b") and measured[0].row["against"]["best"].keys() == {"noise", "main"}
    assert measured[2].row["against"]["best"].keys() == {"main"}


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

    monkeypatch.setattr(results, "generate", sample)
    folder = PictureFolder(tmp_path, dict(method=dict(kind="uniform")))
    measured = [row("uniform", kind="uniform", pictures=folder)]
    models = Models(config)
    for prompts in ([items[0].prompt], [items[0].prompt], [item.prompt for item in items]):
        found = results.example_maps(measured, "uniform", models, protocol(items=items), prompts)
        assert found.keys() == {("uniform", prompt) for prompt in prompts}
        for maps in found.values():
            np.testing.assert_allclose(maps, np.full((3, 4, 8), 1 / 3), atol=1e-4)
    assert len(sampled) == 2 and all(options.maps and options.batch == 1 for options in sampled)
    assert results.example_maps(measured, None, models, protocol(items=items), []) == {}


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
