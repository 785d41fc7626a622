"""Every kind of method, by its name: what all of them must do with equal experts, and what is refused."""

import dataclasses
import json
import re
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.cli.commands import load_config
from afa_jax.diffusion.guidance import PathDenoiser
from afa_jax.errors import InputError
from afa_jax.fusion.rivals.blending import MagicFusion
from afa_jax.fusion.rivals.time_experts import TimeExperts
from afa_jax.methods.method import METHOD_KINDS, Models, NotTrained, make_method, method_name
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate
from afa_jax.weights.formats.folders import save_folder
from tests import tiny

OPTIONS = SampleOptions(size=(32, 64), steps=2, guidance=2.0, batch=2)
TRAINED = {"afa", "gate", "router", "ladder", "learned_mbw", "distilled", "autombw", "checkpoint"}
ENTRIES: dict[str, dict[str, Any]] = {
    "inside": dict(expert="b"),
    "expert": dict(expert="b"),
    "add_difference": dict(a="a", b="b", c="c"),
    "mbw": dict(preset="GRAD_V", of="b"),
    "slerp": dict(a="a", b="b", t=0.3),
    # Scaled so that equal task vectors give themselves.
    "task_arithmetic": dict(scale=1 / 3),
    "ties": dict(density=1.0),
    "dare": dict(p=0.0, scale=1 / 3),
    "magicfusion": dict(general="a", fuse_above=300),
    "time": dict(scheme="alternate"),
}


def models_of(root, paths, **options):
    config = load_config(f"{root}/config.py")
    with config.unlocked():
        config.experts = [dict(name=name, path=f"{root}/{path}") for name, path in zip("abc", paths, strict=True)]
    return Models(config, **options)


def pictures(method):
    requests = [Request(prompt="octopus and pizza, noto style", number=i) for i in range(2)]
    options = dataclasses.replace(OPTIONS, **method.sampling)
    made = generate(requests, method.denoiser, method.experts, seed=0, options=options)
    return np.stack([picture.pixels for picture in made]).astype(int)


@pytest.fixture(scope="module")
def equal(root):
    """Three times the same expert."""
    return models_of(root, "bbb", steps=2)


@pytest.fixture(scope="module")
def its_pictures(equal):
    return pictures(make_method(dict(kind="expert", expert="a"), equal))


UNTRAINED = [kind for kind in METHOD_KINDS if kind not in {"base", "expert", *TRAINED}]


@pytest.fixture(scope="module")
def different(root):
    """Three experts that differ."""
    return models_of(root, "abc", steps=2)


@pytest.fixture(scope="module")
def of_each(different):
    """The pictures of each of them alone."""
    return {name: pictures(make_method(dict(kind="expert", expert=name), different)) for name in "abc"}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_equal_experts_give_that_expert(kind, equal, its_pictures):
    method = make_method(dict(kind=kind) | ENTRIES.get(kind, {}), equal)
    made = pictures(method)
    assert np.abs(made - its_pictures).max() <= 1, method.name
    assert method.on_path == isinstance(method.denoiser, PathDenoiser)
    count = dict(magicfusion=8, time=4).get(kind, 4 if method.family == "parameter space" else 12)
    assert method.evaluations(OPTIONS) == count
    without = dataclasses.replace(OPTIONS, guidance=1.0)
    assert method.evaluations(without) == dict(magicfusion=7, superdiff=12).get(kind, count // 2)


@pytest.mark.parametrize("kind", UNTRAINED)
def test_different_experts_do_not(kind, different, of_each):
    """But for one inside the ensemble, which is that one."""
    made = pictures(make_method(dict(kind=kind) | ENTRIES.get(kind, {}), different))
    for name, own in of_each.items():
        assert (np.abs(made - own).max() <= 1) == (kind == "inside" and name == "b"), name


def test_one_hot_weights_are_that_expert(different, of_each):
    for kind in ("average", "noise_average"):
        made = pictures(make_method(dict(kind=kind, weights=dict(b=1.0)), different))
        np.testing.assert_array_equal(made, of_each["b"])


def test_one_expert_costs_what_a_merge_does(different):
    """It is the reference of all costs: nothing of the others is in its program."""
    expert, merged, both = (
        make_method(entry, different)
        for entry in (dict(kind="expert", expert="c"), dict(kind="average"), dict(kind="uniform"))
    )
    sizes = [
        sum(
            np.asarray(leaf).nbytes for leaf in jax.tree.leaves((one.denoiser, one.experts.text_encoder))
        )  # the program's arguments
        for one in (expert, merged, both)
    ]
    assert sizes[0] == sizes[1] < sizes[2] / 2
    assert expert.experts.names == ("c",) and expert.record["experts"] == [different.experts.record[2]]


def test_weights_are_loaded_when_they_are_asked_for(root, monkeypatch):
    """Of a resumed comparison, in which nothing is sampled, only the records are."""
    models = models_of(root, "abc")
    assert models.experts
    loaded = []

    def load(self, chosen):
        loaded.append([*chosen])
        return self.experts

    monkeypatch.setattr(Models, "load", load)
    for entry in (dict(kind="ties"), dict(kind="base"), dict(kind="expert", expert="b"), dict(kind="time")):
        method = make_method(entry, models)
        assert method.record["experts"] and method.evaluations(OPTIONS) == 4 and not loaded
        assert method.shared is models.experts
        assert method.denoiser is method.denoiser and method.experts is models.experts and len(loaded) == 1
        loaded.clear()


def test_turns_are_those_of_the_steps_that_are_sampled(different):
    schedule = different.experts.schedule
    for steps in (4, 5, 10):
        denoiser = make_method(dict(kind="time", scheme="alternate", steps=steps), different).denoiser
        assert isinstance(denoiser, TimeExperts)
        turns = denoiser.expert_at(jnp.asarray(schedule.timesteps(steps))).tolist()
        assert turns == [i % 3 for i in range(steps)]


def test_options_of_time(different):
    def made(**options):
        denoiser = make_method(dict(kind="time") | options, different).denoiser
        assert isinstance(denoiser, TimeExperts)
        return denoiser.edges, denoiser.order

    assert made() == ((333, 667), (0, 1, 2))
    assert made(edges=[300, 600]) == ((300, 600), (0, 1, 2))
    assert made(edges=[300, 600], order=["c", "a", "c"]) == ((300, 600), (2, 0, 2))
    assert made(intervals=6)[1] == (0, 0, 1, 1, 2, 2)
    assert made(scheme="refiner", experts=["c", "a"]) == ((200,), (0, 1))
    assert made(scheme="refiner", at=50, order=["b", "a"]) == ((50,), (1, 0))


def test_magicfusion_takes_the_experts_that_are_loaded(different):
    whole = make_method(dict(kind="magicfusion", general="c", k=dict(a=3.0)), different)
    assert isinstance(whole.denoiser, MagicFusion)
    assert whole.experts is different.experts and whole.denoiser.general == 2
    np.testing.assert_array_equal(whole.denoiser.k, [3, 1, 1])
    assert [own["name"] for own in whole.record["experts"]] == ["c", "a", "b"]
    some = make_method(dict(kind="magicfusion", general="c", experts=["a"], k=dict(a=3.0)), different)
    assert isinstance(some.denoiser, MagicFusion)
    assert some.experts.names == ("c", "a") and some.denoiser.general == 0
    np.testing.assert_array_equal(some.denoiser.k, [1, 3])


def test_where_a_file_lies_is_not_in_the_record(root, different, tmp_path):
    """What is in it counts: pictures are found again when it moves."""
    (tmp_path / "c").symlink_to(root / "c")
    best = json.dumps(dict(weights={"M00": dict(a=1.0, b=0.0, c=0.0)}))
    for name in ("one.json", "other.json"):
        (tmp_path / name).write_text(best)
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("checkpoint", dict(path=f"{root}/c"), dict(path=f"{tmp_path}/c")),
        ("autombw", dict(path=f"{tmp_path}/one.json"), dict(path=f"{tmp_path}/other.json")),
        (
            "time",
            dict(experts=[dict(name="x", path=f"{root}/c"), "a"]),
            dict(experts=[dict(name="x", path=f"{tmp_path}/c"), "a"]),
        ),
    ]
    for kind, one, other in cases:
        records = [make_method(dict(kind=kind) | options, different).record for options in (one, other)]
        assert records[0] == records[1] and str(tmp_path) not in str(records)
    sampled = make_method(dict(kind="uniform", guidance=3, eta=1, steps=5), different).sampling
    assert {name: type(value) for name, value in sampled.items()} == dict(guidance=float, eta=float, steps=int)


def test_experts_of_another_kind_are_not_sampled_as_the_bases(root, different, tmp_path):
    (tmp_path / "v").mkdir()
    for part in (root / "c").iterdir():
        if part.name != "scheduler":
            (tmp_path / "v" / part.name).symlink_to(part)
    shutil.copytree(root / "c" / "scheduler", tmp_path / "v" / "scheduler")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(prediction_type="v_prediction")))
    for entry in (
        dict(kind="checkpoint", path=f"{tmp_path}/v"),
        dict(kind="time", experts=["a", dict(name="x", path=f"{tmp_path}/v")]),
    ):
        with pytest.raises(InputError, match="was trained with prediction_type 'v_prediction'") as error:
            make_method(entry, different)
        assert not isinstance(error.value, NotTrained)


def test_what_is_there_but_damaged_is_not_called_missing(root, different, tmp_path):
    (tmp_path / "m.safetensors").write_text("nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ensemble.json").write_text("{")
    (tmp_path / "best.json").write_text("{}")
    other = dict(experts=[dict(name=name, sha256="0" * 64) for name in "abc"])
    (tmp_path / "other.json").write_text(json.dumps(dict(weights={}, settings=other)))
    for entry, message in (
        (dict(kind="checkpoint", path=f"{tmp_path}/m.safetensors"), "m.safetensors"),
        (dict(kind="checkpoint", path=f"{root}/c", dtype="fp8"), "dtype='fp8'; choose float32"),
        (dict(kind="checkpoint", path=f"{root}/c", paht="x"), "no such field paht"),
        (dict(kind="gate", workdir=f"{tmp_path}/run"), "ensemble.json"),
        (dict(kind="autombw", path=f"{tmp_path}/best.json"), "no weights in it"),
        (dict(kind="autombw", path=f"{tmp_path}/other.json"), "was trained with another expert 'a'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            make_method(entry, different)
        assert not isinstance(error.value, NotTrained), entry


def test_experts_in_time_of_other_files_and_a_group_with_the_base(root, different, of_each):
    models = different
    experts = [dict(name="x", path=f"{root}/c"), dict(name="y", path=f"{root}/c")]
    made = pictures(make_method(dict(kind="time", experts=experts), models))
    np.testing.assert_array_equal(made, of_each["c"])
    with_base = make_method(dict(kind="magicfusion", general="base", experts=["c"], fuse_above=1000), models)
    assert with_base.experts.names == ("base", "c") and with_base.evaluations(OPTIONS) == 4
    np.testing.assert_array_equal(pictures(with_base), pictures(make_method(dict(kind="base"), models)))


def test_experts_in_time_of_different_architectures(root, different, of_each, tmp_path):
    """As in MEME: each interval is drawn by its own U-Net, by itself."""
    deep = dataclasses.replace(tiny.MICRO_UNET, layers_per_block=2)
    save_folder(tmp_path / "deep", unet=tiny.unet(9, deep), text_encoder=tiny.text_encoder(9))
    experts = ["a", dict(name="deep", path=f"{tmp_path}/deep")]

    def made(*order):
        method = make_method(dict(kind="time", experts=experts, order=order), different)
        assert method.evaluations(OPTIONS) == 4
        return pictures(method)

    alone = pictures(make_method(dict(kind="checkpoint", path=f"{tmp_path}/deep"), different))
    np.testing.assert_array_equal(made("deep", "deep"), alone)
    np.testing.assert_array_equal(made("a", "a"), of_each["a"])
    both = made("a", "deep")
    assert (both != alone).any() and (both != of_each["a"]).any()


def test_block_weights_of_a_search_and_a_checkpoint(root, different, of_each, tmp_path):
    models = different
    (tmp_path / "best.json").write_text(json.dumps(dict(weights={"M00": dict(a=1.0, b=0.0, c=0.0)})))
    searched = make_method(dict(kind="autombw", path=str(tmp_path / "best.json")), models)
    merged = make_method(dict(kind="mbw", weights={"M00": dict(a=1.0, b=0.0, c=0.0)}), models)
    np.testing.assert_array_equal(pictures(searched), pictures(merged))
    assert searched.recipe == "python -m afa_jax.search"
    settings = dict(metric="subject", space="blocks", captions=["one", "two"], experts=models.experts.record)
    found = dict(weights={"M00": dict(a=1.0)}, trials=60, score=0.5, settings=settings)
    (tmp_path / "told.json").write_text(json.dumps(found))
    told = make_method(dict(kind="autombw", path=str(tmp_path / "told.json")), models)
    assert told.recipe is not None
    assert told.recipe.endswith("# metric subject, space blocks, 2 prompts, 60 trials, the best of which has 0.5")
    one = make_method(dict(kind="checkpoint", path=f"{root}/b"), models)
    np.testing.assert_array_equal(pictures(one), of_each["b"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(kind="magic"), "no method 'magic'; there are expert, inside"),
        (dict(kind="uniform", weights=3), "method uniform: no option 'weights'; it has none"),
        (dict(kind="expert"), "method expert: the option expert is missing"),
        (dict(kind="expert", expert="z"), "no expert 'z'; there are a, b, c"),
        (dict(kind="checkpoint"), "method checkpoint: the option path is missing"),
        (dict(kind="noise_average", weights=dict(a=0.2)), "sum to 0.2; make it 1"),
        (dict(kind="noise_average", weights=dict(a=float("nan"))), "a=nan; make it a finite number"),
        (dict(kind="noise_average", weights=3), "noise_average: weights: 3 names no experts"),
        (dict(kind="superdiff", temperature=float("inf")), "superdiff: temperature=inf; make it a finite number"),
        (dict(kind="superdiff", temperature=-1), "temperature=-1; choose 0"),
        (dict(kind="magicfusion", general="a", k=dict(z=3.0)), "magicfusion: k: no expert 'z'"),
        (dict(kind="magicfusion", general="a", k="sharp"), "magicfusion: k='sharp'; make it a finite number"),
        (dict(kind="magicfusion", general="a", experts="b"), "experts='b'; write a list"),
        (dict(kind="maxfusion", threshold="x"), "threshold='x'; make it a finite number"),
        (dict(kind="uniform", guidance="high"), "method uniform: guidance='high'; make it a finite number"),
        (dict(kind="uniform", guidance=0.5), "guidance=0.5; choose 1 or more"),
        (dict(kind="uniform", steps=2.5), "steps=2.5; choose 1 or more"),
        (dict(kind="uniform", eta=-1), "eta=-1; choose 0 or more"),
        (dict(kind="uniform", family="paramter space"), "family='paramter space'; choose control, parameter space"),
        (dict(kind="afa", top=4), "afa: top=4; choose 1 to 3"),
        (dict(kind="afa", top=1.5), "afa: top=1.5; make it a whole number"),
        (dict(kind="afa", order="cba"), "afa: order='cba'; write a list"),
        (dict(kind="time", scheme="tree", edges=[500]), "scheme=tree has no use for edges"),
        (dict(kind="time", at=300), "scheme=uniform has no use for at"),
        (dict(kind="time", scheme="edges", edges=500), "time: edges=500; write a list"),
        (dict(kind="time", scheme="refiner"), "2 intervals leave none for the expert 'c'"),
        (dict(kind="time", intervals=2), "2 intervals leave none for the expert 'c'"),
        (dict(kind="time", order=["a", "b", "z"]), "order: no expert 'z'; there are a, b, c"),
        (dict(kind="time", order=["a", "b"]), "for 2 edges; name the expert of each of the 3 intervals"),
        (dict(kind="noise_average", weights=dict(z=1.0)), "no expert 'z'"),
        (dict(kind="magicfusion", general="z"), "no expert 'z'"),
        (dict(kind="maxfusion", predictions="no"), "predictions='no'; choose fuse or average"),
        (dict(kind="time", scheme="no"), "scheme='no'; choose uniform, tree, refiner, edges, alternate"),
        (dict(kind="time", experts=["a", "a"]), "two of its experts have one name"),
        (dict(kind="ties", densty=0.3), "no option 'densty'"),
    ],
)
def test_what_is_wrong_is_named(different, entry, message):
    with pytest.raises(InputError, match=message):
        make_method(entry, different)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(kind="afa"), "--workdir is missing"),
        (dict(kind="gate", workdir="nowhere"), "nowhere: no such file or folder"),
        (dict(kind="autombw", path="nowhere.json"), "nowhere.json: no such file; python -m afa_jax.search"),
        (dict(kind="checkpoint", path="nowhere.safetensors"), "nowhere.safetensors"),
        (dict(kind="time", experts=[dict(name="x", path="nowhere")]), "nowhere"),
    ],
)
def test_what_is_not_there_yet_is_told_apart(different, entry, message):
    with pytest.raises(NotTrained, match=message):
        make_method(entry, different)


def test_names():
    assert method_name(dict(kind="expert", expert="food")) == "expert:food"
    assert method_name(dict(kind="ties", density=0.2, workdir="x")) == "ties density=0.2"
    assert method_name(dict(kind="uniform")) == "uniform"


def test_a_sampler_that_there_is_not_is_named_once_wherever_pictures_are_made(root, tmp_path):
    """Every command that makes any looks at its options with the experts that it has loaded."""
    shutil.copytree(root / "base", tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(_class_name="MySampler")))
    config = load_config(f"{root}/config.py", [f"base={tmp_path}/base"])
    experts = Models(config).experts
    with pytest.warns(match="'MySampler'; pictures are sampled by DDIM"):
        OPTIONS.check(experts)
    with warnings.catch_warnings(action="error"):
        OPTIONS.check(experts)
