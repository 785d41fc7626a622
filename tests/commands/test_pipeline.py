"""Ensemble: what Python makes is what the commands make, bit for bit, and what cannot be is one line."""

import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import afa_jax
from afa_jax import Ensemble, InputError, export, merge, sample, screen, train
from afa_jax.cli.commands import run
from afa_jax.training.log import TIMINGS

ROOT = Path(__file__).parents[2]
PROMPT = "octopus and pizza, noto style"


@pytest.fixture(scope="module")
def ens(root: Path) -> Ensemble:
    """The tiny experts, with a run that Python trained."""
    ensemble = Ensemble.from_config(f"{root}/config.py", overrides={"train.steps": 2, "train.log_every": 1})
    assert ensemble.train(root / "python", steps=4, quiet=True) is ensemble
    return ensemble


@pytest.fixture(scope="module")
def by_command(root: Path) -> Path:
    """The run of the command, stopped in its middle and resumed."""
    arguments = [f"--config={root}/config.py", f"--workdir={root}/command", "--quiet"]
    assert run(train.main, [*arguments, "--config.train.steps=2"]) == 0
    assert run(train.main, [*arguments, "--resume"]) == 0
    return root / "command"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_training_is_that_of_the_command(ens, by_command):
    assert ens.workdir is not None
    here, there = (json.loads((folder / "ensemble.json").read_text()) for folder in (ens.workdir, by_command))
    assert here["training"].pop("arguments")[2:] == [
        f"--config.train.{x}" for x in ("steps=2", "log_every=1", "steps=4")
    ]
    del there["training"]["arguments"]
    assert here == there
    weights = "aggregators.safetensors"
    assert (ens.workdir / weights).read_bytes() == (by_command / weights).read_bytes()
    assert logged(ens.workdir) == logged(by_command) and len(logged(by_command)) == 4


def logged(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def test_pictures_are_those_of_the_command(ens, root, by_command, tmp_path):
    arguments = [
        f"--config={root}/config.py",
        f"--workdir={by_command}",
        f"--prompt={PROMPT}",
        "--prompt=fox, blob style",
    ]
    arguments += ["--num_images=2", "--seed=5", "--maps", f"--out={tmp_path}/command"]
    assert run(sample.main, arguments) == 0
    seen: list[Any] = []
    made = ens([PROMPT, "fox, blob style"], num_images=2, seed=5, maps=True, on_picture=lambda *of: seen.append(of[:2]))
    made.save(tmp_path / "python")
    assert seen == [(count, 4) for count in (1, 2, 3, 4)]
    with Image.open(tmp_path / "command" / f"{made.names[0]}.png") as picture:
        theirs = json.loads(picture.info["afa_jax"])
    ours = json.loads(made.images[0].info["afa_jax"])
    assert ours == made.recipe and theirs["sources"].pop("workdir") == "command"
    assert ours["sources"].pop("workdir") == "python" and ours == theirs
    python, command = contents(tmp_path / "python"), contents(tmp_path / "command")
    assert python.keys() == command.keys()
    for name, data in command.items():
        one, other = (np.asarray(Image.open(tmp_path / side / name)) for side in ("python", "command"))
        np.testing.assert_array_equal(one, other)
        assert "maps" not in name or python[name] == data
    assert all(maps.shape == (3, 3, *maps.shape[2:]) for maps in made.maps[0].values()) and len(made.maps) == 4
    np.testing.assert_allclose(next(iter(made.maps[3].values())).sum(1), 1, atol=1e-5)
    moved = Ensemble.from_config(f"{root}/config.py", workdir=by_command)
    assert contents(_saved(moved, tmp_path / "moved")) == command  # with the same run every byte is the same
    with pytest.raises(InputError, match="exists"):
        made.save(tmp_path / "python")


@pytest.mark.parametrize("method", ["afa", "superdiff,temperature=0.1"])
def test_a_callback_sees_every_step_and_changes_no_more_than_rounding(ens, method):
    seen: list[tuple[int, int, np.ndarray]] = []
    ask: dict[str, Any] = dict(num_images=2, seed=5, eta=1, maps=method == "afa", method=method)
    whole, watched = ens(PROMPT, **ask), ens(PROMPT, **ask, callback=lambda *of: seen.append(of))
    for one, other in zip(whole.images, watched.images, strict=True):
        np.testing.assert_allclose(np.asarray(one, int), np.asarray(other, int), atol=1)
    for one, other in zip(whole.maps, watched.maps, strict=True):
        assert one.keys() == other.keys()
        for site in one:
            np.testing.assert_allclose(one[site], other[site], atol=1e-5)
    assert [(step, t) for step, t, _ in seen] == [*enumerate(whole.timesteps)]
    factor = 32 // seen[0][2].shape[1]
    assert {latents.shape[:3] for _, _, latents in seen} == {(2, 32 // factor, 64 // factor)}
    assert (seen[0][2] != seen[-1][2]).all()


def test_what_a_callback_raises_ends_the_call(ens):
    def stop(step: int, timestep: int, latents: np.ndarray) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError, match="0"):
        ens(PROMPT, callback=stop)


def _saved(ensemble: Ensemble, out: Path) -> Path:
    ensemble([PROMPT, "fox, blob style"], num_images_per_prompt=2, seed=5, maps=True).save(out)
    return out


def test_a_picture_gives_its_ensemble_back(ens, root, tmp_path):
    where: dict[str, Any] = dict(models={name: root / name for name in "abc"}, base=root / "base")
    made = ens(
        PROMPT, num_images=2, seed=7, steps=2, guidance_scale=3, negative_prompt="owl", method="afa,temperature=0.5"
    )
    path = made.save(tmp_path)[1]
    again = Ensemble.from_image(path, **where, workdir=ens.workdir)
    assert again.recipe is not None and again.recipe["number"] == 1 and again.recipe["prompt"] == PROMPT
    np.testing.assert_array_equal(again().images[0], made.images[1])
    other = again("fox, blob style", num_images=1).recipe
    assert other["seed"] == 7 and other["guidance"] == 3 and other["negative_prompt"] == "owl"
    swapped = Ensemble.from_image(
        path, **where | dict(models={**where["models"], "a": root / "b"}), workdir=ens.workdir
    )
    with pytest.raises(InputError, match="another expert 'a'"):
        swapped()
    with pytest.raises(InputError, match=r"a: no such file.*models=\{'a': \.\.\.\}"):
        Ensemble.from_image(path, base=root / "base", workdir=ens.workdir)


def test_experts_by_paths_and_by_a_run(ens, root):
    experts = [root / name for name in "abc"]
    one = Ensemble.from_pretrained(experts, base=root / "base", size=(32, 64), workdir=ens.workdir)
    assert one.experts == ["a", "b", "c"]
    settings: dict[str, Any] = dict(steps=3, guidance=2.0, seed=3)
    pixels = np.asarray(ens(PROMPT, seed=3).images[0])
    np.testing.assert_array_equal(one(PROMPT, **settings).images[0], pixels)
    own = {name: root / name for name in "abc"}
    two = Ensemble.from_run(ens.workdir, models=own, base=root / "base")
    np.testing.assert_array_equal(two(PROMPT, seed=3, height=32, width=64).images[0], pixels)
    with pytest.raises(InputError, match="say where it is"):
        Ensemble.from_run(ens.workdir)
    loras = Ensemble.from_pretrained(
        {"x": dict(path=root / "a", loras=[("l.safetensors", 1)]), "y": root / "a"}, base=root / "base"
    )
    assert loras.experts == ["x", "y"] and loras.config.experts[0]["loras"]
    alike = Ensemble.from_pretrained([root / "a", str(root / "a")], base=dict(path=root / "base"))
    assert alike.experts == ["a", "a_2"]
    assert alike("fox", steps=1, guidance_scale=1, method="expert:a").images[0].size == (32, 32)  # the U-Net's own


def test_the_published_pair_gives_its_ensemble_back(ens, root, tmp_path, capsys):
    assert (
        run(export.main, [f"--config={root}/config.py", f"--workdir={ens.workdir}", f"--pair={tmp_path}/command"]) == 0
    )
    said = capsys.readouterr().out.replace("command", "python").splitlines()
    ens.export(pair=tmp_path / "quiet")
    assert capsys.readouterr().out == ""
    ens.export(pair=tmp_path / "python", with_config=True, quiet=False)
    assert capsys.readouterr().out.replace(", config.py", "").splitlines() == said
    for name in ("aggregators.safetensors", "ensemble.json"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    own: dict[str, Any] = dict(models={name: root / name for name in "abc"}, base=root / "base")
    pixels = np.asarray(ens(PROMPT).images[0])
    for pair in ("python", "command"):  # config.py, and the record alone
        again = Ensemble.from_run(tmp_path / pair, **own)
        np.testing.assert_array_equal(again(PROMPT).images[0], pixels)


def test_compare(ens):
    prompts = [PROMPT, "fox, blob style", "owl, noto style"]
    compared = ens.compare(prompts, ["afa", "uniform"], seeds=2, judge=lambda image, prompt: np.asarray(image).mean())
    assert compared.methods == ["afa", "uniform"] and compared.scores["afa"].shape == (3, 2)
    np.testing.assert_array_equal(compared.images["afa"][1][1], ens(prompts[1], seed=1).images[0])
    figure = compared.figures["uniform"]
    assert figure["value"] == pytest.approx(compared.scores["uniform"].mean())
    assert figure["low"] <= figure["value"] <= figure["high"]
    apart = compared.difference("afa", "uniform")
    assert apart["value"] == pytest.approx(compared.figures["afa"]["value"] - figure["value"])
    assert apart["low"] <= apart["value"] <= apart["high"] and compared.difference("afa", "afa")["high"] == 0
    assert compared.grid.height > 6 * 32


def test_merge_screen_and_maps_are_those_of_the_commands(ens, root, tmp_path, capsys):
    config = f"--config={root}/config.py"
    for name in ("m.safetensors", "folder"):
        assert run(merge.main, [config, "--method=ties,density=0.4", f"--out={tmp_path}/command_{name}"]) == 0
        capsys.readouterr()
        saved = ens.merge("ties,density=0.4").save(tmp_path / name)
        assert capsys.readouterr().out == ""
        theirs = tmp_path / f"command_{name}"
        for file in [saved] if saved.is_file() else [path for path in saved.rglob("*") if path.is_file()]:
            assert file.read_bytes() == (theirs / file.relative_to(saved)).read_bytes()
    assert "unet" in ens.merge("average").checkpoint.components
    status = run(screen.main, [config, "--pairs=8", "--draws=2", f"--out={tmp_path}/command.json"])
    found = ens.screen(pairs=8, draws=2, out=tmp_path / "python.json")
    theirs, ours = (json.loads((tmp_path / f"{side}.json").read_text()) for side in ("command", "python"))
    theirs.pop("config"), ours.pop("config")
    assert theirs == ours and status == (3 if found.answer == "no" else 0)
    page = ens.maps(PROMPT, out=tmp_path / "maps")
    assert page.is_file() and json.loads((page.parent / "maps.json").read_text())["pictures"][0]["prompt"] == PROMPT


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(prompt=""), "--prompt is empty"),
    (dict(prompt=[]), "prompt"),
    (dict(prompt=None), "prompt is missing"),
    (dict(seed=-2), "seed: -2: write a whole number"),
    (dict(seed=True), "seed=True"),
    (dict(steps=0), "steps: 0: write a whole number from 1 to 1000"),
    (dict(steps=2.5), "steps: 2.5"),
    (dict(steps=4, num_inference_steps=4), "steps and num_inference_steps are one argument"),
    (dict(num_images=1, num_images_per_prompt=1), "num_images and num_images_per_prompt"),
    (dict(guidance_scale=2, guidance=2), "guidance_scale and guidance are one"),
    (dict(guidance_scale=float("nan")), "guidance_scale: nan: write a number"),
    (dict(eta=-1), "eta: -1"),
    (dict(size=(33, 64)), "size 33x64"),
    (dict(size=64), "size=64; write (rows, columns)"),
    (dict(size=(32, 64), height=32), "--size and --width, --height exclude each other"),
    (dict(height=32), "--width and --height go together"),
    (dict(method="magic"), "no method 'magic'; there are expert"),
    (dict(method="ties,densty=1"), "no option 'densty'"),
    (dict(method=dict(kind="expert", expert="z")), "no expert 'z'"),
    (dict(sampler="magic"), "sampler='magic'; choose ddim"),
    (dict(out="/dev/null/x"), "cannot be written"),
]  # fmt: skip


def test_bad_calls_are_the_commands_line_before_anything_is_loaded(root, monkeypatch, tmp_path):
    ensemble = Ensemble.from_config(f"{root}/config.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afa_jax.sampling.pictures.sample_prompts", lambda *_, **__: pytest.fail("it was loaded"))
    for arguments, message in WRONG:
        with pytest.raises(InputError) as caught:
            ensemble(**dict(prompt="fox") | arguments)
        assert message in str(caught.value) and "\n" not in str(caught.value), arguments
    for act, message in (
        (lambda: ensemble.merge("magic"), "no merge 'magic'"),
        (lambda: ensemble.merge("ties,density=2"), "density=2"),
        (lambda: ensemble.merge("ties", dtype="int8"), "dtype='int8'"),
        (lambda: ensemble.merge("ties").save("x.gguf"), "end it in .safetensors"),
        (lambda: ensemble.screen(pairs=2), "--pairs of 8 or more"),
        (lambda: ensemble.export(), "nothing to export"),
        (lambda: ensemble.export(pair="x"), "--workdir is missing"),
        (lambda: ensemble.export(bake=("a", "x"), license="mit"), "go with --pair"),
        (lambda: ensemble.maps(), "nothing to draw"),
        (lambda: ensemble.evaluate("x"), "no evaluation"),
        (lambda: ensemble.search("x", space="all"), "space='all'; choose blocks"),
        (lambda: ensemble.train("x", resume=True), "--resume: x holds no run"),
        (lambda: ensemble.train("x", overrides={"train.stps": 1}), "did you mean train.steps"),
        (lambda: ensemble.train("x", method="magic"), "expected one of 'afa'"),
        (lambda: ensemble.compare("fox", ["afa", "afa"]), "name each once"),
        (lambda: Ensemble.from_config("absent.py"), "--config absent.py: no file absent.py"),
        (lambda: Ensemble.from_config(f"{root}/config.py", workdir="x"), "--workdir x: no such file or folder"),
        (lambda: Ensemble.from_config({"base": "x"}), "config: experts"),
        (lambda: Ensemble.from_pretrained(["absent.safetensors"], base="b"), "b: no such file or folder"),
        (lambda: Ensemble.from_pretrained("a", base="b"), "write a list"),
        (lambda: Ensemble.from_pretrained(["a"], base="b", names=["x", "y"]), "names: 2 of them for 1"),
        (lambda: Ensemble.from_run("x"), "--workdir x: no such"),
        (lambda: Ensemble.from_image("x.png"), "x.png: no such file"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            act()
        assert message in str(caught.value) and "\n" not in str(caught.value), message
    assert not list(tmp_path.iterdir())


LIGHT = """
import sys
import afa_jax
assert "Ensemble" in dir(afa_jax) and afa_jax.__version__
import afa_jax.models, afa_jax.diffusion, afa_jax.fusion, afa_jax.weights, afa_jax.evaluation
assert not {"jax", "numpy", "ml_collections"} & set(sys.modules), sys.modules
from afa_jax import Ensemble
assert not {"jax", "numpy"} & set(sys.modules)
"""


def test_importing_costs_next_to_nothing():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_name_of_every_table_of_contents_is_there():
    for module in pkgutil.walk_packages(afa_jax.__path__, "afa_jax."):
        if module.ispkg:
            room = importlib.import_module(module.name)
            for name in getattr(room, "__all__", ()):
                assert getattr(room, name).__doc__ or not callable(getattr(room, name)), (module.name, name)
                # Importing a module of this name would put itself in the function's place.
                assert importlib.util.find_spec(f"{module.name}.{name}") is None, (module.name, name)
