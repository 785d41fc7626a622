"""The commands as a user runs them, on tiny experts: train, resume, sample; and every bad input in one line."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from afa_jax import sample, train
from afa_jax.cli.commands import run
from afa_jax.fusion.pair_record import aggregators_hash
from afa_jax.models.configs import UNetConfig
from afa_jax.sampling.map_pictures import COLOURS
from afa_jax.sampling.pictures import find_method
from afa_jax.training.log import TIMINGS
from afa_jax.weights.formats.folders import save_folder
from tests import tiny
from tests.commands.conftest import CONFIG


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """Four steps without interruption."""
    workdir = root / "trained"
    assert run(train.main, ["--config", f"{root}/config.py", "--workdir", str(workdir), "--quiet"]) == 0
    return workdir


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_what_sampling_needs(trained):
    metrics = lines(trained)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for line in metrics:
        assert line["loss"] > 0 and line["gradient_norm"] > 0 and line["update_norm"] > 0
        assert sum(line[f"weight_{k}"] for k in range(3)) == pytest.approx(1, abs=1e-5)
    record = json.loads((trained / "ensemble.json").read_text())
    assert [expert["name"] for expert in record["experts"]] == ["a", "b", "c"]
    assert len({expert["sha256"] for expert in record["experts"]}) == 3
    tensors = load_file(trained / "aggregators.safetensors")
    assert np.abs(tensors["aggregators.0.conv_out.weight"]).max() > 0


def test_two_and_two_steps_equal_four_bit_for_bit(root, trained, tmp_path):
    """The second two are of another process than the first two: they have a copy of the run, without its end."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "aggregators.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert (
        run(train.main, ["--config", f"{root}/config.py", "--workdir", str(tmp_path / "run"), "--quiet", "--resume"])
        == 0
    )
    whole, parts = (load_file(w / "aggregators.safetensors") for w in (trained, tmp_path / "run"))
    assert whole.keys() == parts.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], parts[key], err_msg=key)
    strip = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(w)] for w in (trained, tmp_path / "run")
    ]
    assert strip[0] == strip[1]


def test_resuming_with_other_experts_is_refused(root, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["--config", f"{root}/config.py", "--workdir", str(tmp_path / "run"), "--quiet", "--resume"]
    swapped = [dict(name=n, path=str(root / p)) for n, p in (("a", "b"), ("b", "a"), ("c", "c"))]
    assert run(train.main, [*arguments, f"--config.experts={swapped}"]) == 2
    assert "trained with another expert 'a'" in capsys.readouterr().err
    reordered = [dict(name=n, path=str(root / n)) for n in ("b", "a", "c")]
    assert run(train.main, [*arguments, f"--config.experts={reordered}"]) == 2
    assert "experts a, b, c, in this order" in capsys.readouterr().err


def test_pictures_carry_their_recipe_and_do_not_depend_on_their_batch(root, trained, tmp_path):
    prompts = ["octopus and pizza, noto style", "fox, blob style", "car, noto style", "owl and key, fluent style"]

    def make(out: str, prompts: list[str], *more: str) -> dict[str, np.ndarray]:
        arguments = [
            "--config",
            f"{root}/config.py",
            "--workdir",
            str(trained),
            "--out",
            str(tmp_path / out),
            "--seed",
            "5",
        ]
        for prompt in prompts:
            arguments += ["--prompt", prompt]
        assert run(sample.main, [*arguments, *more]) == 0
        pictures = [
            p for p in sorted((tmp_path / out).glob("afa_*.png")) if "grid" not in p.name and "maps" not in p.name
        ]
        with Image.open(pictures[0]) as picture:
            recipe = json.loads(picture.info["afa_jax"])
        assert recipe["seed"] == 5 and recipe["steps"] == 3 and recipe["method"] == "afa"
        assert recipe["made_by"]["aggregators_sha256"] == aggregators_hash(trained)
        assert recipe["base"] == "base"
        return {path.name.split("_", 2)[2]: np.asarray(Image.open(path)) for path in pictures}

    alone = make("alone", prompts[:1])
    four = make("four", prompts)
    seven = make("seven", [*prompts[1:], *prompts], "--config.sample.batch=7")
    for name, picture in alone.items():
        assert picture.shape == (32, 64, 3)
        np.testing.assert_array_equal(picture, four[name])
        np.testing.assert_array_equal(picture, seven[name])
    for name, picture in four.items():
        np.testing.assert_array_equal(picture, seven[name])


def test_maps_grid_and_methods(root, trained, tmp_path):
    arguments = ["--config", f"{root}/config.py", "--out", str(tmp_path), "--prompt", "fox and pizza, noto style"]
    assert run(sample.main, [*arguments, "--workdir", str(trained), "--maps", "--num_images", "2"]) == 0
    sheet, *others = tmp_path.glob("afa_000_*_maps.png")
    assert len(others) == 1
    legend = np.asarray(Image.open(sheet))[:20].reshape(-1, 3)
    assert {*map(tuple, COLOURS[:3].astype(int).tolist())} <= {*map(tuple, legend.tolist())}
    with Image.open(tmp_path / "afa_grid.png") as grid:
        assert grid.size == (2 * 64 + 4, 32)
    for method in ("uniform", "expert:b", "inside:b"):
        assert run(sample.main, [*arguments, "--method", method, "--eta", "0.5"]) == 0
    expert, inside, uniform = (
        np.asarray(Image.open(next(tmp_path.glob(f"{m}_000*.png"))), np.int32)
        for m in ("expert_b", "inside_b", "uniform")
    )
    assert np.abs(expert - inside).max() <= 1
    assert np.abs(expert - uniform).max() > 1


def test_flags_come_before_what_a_method_has_of_its_own():
    own = dict(name="superdiff eta=1", kind="superdiff", eta=1.0, steps=5)
    config = ConfigDict(dict(evaluation=dict(methods=[own])))
    assert find_method("superdiff eta=1", config, {}) == own
    given = dict(eta=0.0, guidance=2.0)
    assert find_method("superdiff eta=1", config, given) == own | dict(eta=0.0, guidance=2.0)
    assert find_method("uniform,eta=1,steps=4", config, given) == dict(
        name="uniform steps=4", kind="uniform", eta=0.0, guidance=2.0, steps=4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "café, noto style", "--method", "uniform"], "does not know 'é'"),
        (["--prompt", "zebra, noto style", "--method", "uniform"], "never learnt the word 'zebra'"),
        (["--prompt", "octopuss", "--method", "uniform"], "did you mean octopus?"),
        (["--prompt", "fox", "--prompt", " "], "--prompt is empty"),
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt", "fox", "--seed", "5000000000"], "--seed: 5000000000"),
        (["--prompt", "fox", "--steps", "0"], "--steps: 0: write a whole number from 1"),
        (["--prompt", "fox", "--size", "30x64"], "multiples of 4"),
        (["--prompt", "fox", "--size", "big"], "--size 'big'"),
        (["--prompt", "fox", "--size", "1000000x1000000"], "sides have 1 to 65,536 pixels"),
        (["--prompt", "fox", "--size", "60000x60000"], "pixels; choose a smaller"),
        (["--prompt", "fox", "--workdir", "nowhere"], "nowhere: no such file or folder"),
        (["--prompt", "fox", "--method", "expert:z"], "no expert 'z'; there are a, b, c"),
        (["--prompt", "fox", "--method", "magic"], "no method 'magic'; there are expert, inside"),
        (["--prompt", "fox", "--guidance", "0.5"], "--guidance: 0.5: write a number from 1"),
        (["--prompt", "fox", "--num_images", "0"], "--num_images: 0: write a whole number from 1"),
        (["--prompt", "fox", "--method", "expert:a", "--maps"], "maps exist only in an ensemble"),
        (["--prompt", "fox", "--config.sample.step=3"], "did you mean sample.steps"),
        (["--prompt", "fox", "--config.sample.steps=many"], "expected int"),
    ],
)
def test_bad_sampling_input_is_one_line_and_writes_nothing(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(sample.main, ["--config", f"{root}/config.py", "--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_a_long_prompt_is_cut_and_the_lost_words_are_named(root, tmp_path, capsys):
    prompt = "fox and " * 20 + "pizza"
    arguments = ["--config", f"{root}/config.py", "--out", str(tmp_path), "--method", "uniform", "--prompt", prompt]
    assert run(sample.main, arguments) == 0
    error = capsys.readouterr().err
    assert "has 41 tokens, 14 fit; lost:" in error and "pizza" in error.partition("lost:")[2]


def test_pictures_are_not_overwritten_unasked(root, tmp_path, capsys):
    arguments = ["--config", f"{root}/config.py", "--out", str(tmp_path), "--method", "uniform", "--prompt", "fox"]
    assert run(sample.main, arguments) == 0
    assert run(sample.main, arguments) == 2
    assert "exists; choose another --out, or --overwrite" in capsys.readouterr().err
    assert run(sample.main, [*arguments, "--overwrite"]) == 0


def test_a_workdir_is_resumed_or_overwritten_only_if_asked(root, trained, tmp_path, capsys):
    arguments = ["--config", f"{root}/config.py", "--quiet", "--workdir"]
    assert run(train.main, [*arguments, str(trained)]) == 2
    assert "is not empty: continue it with --resume, or replace it with --overwrite" in capsys.readouterr().err
    assert run(train.main, [*arguments, str(tmp_path / "new"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    assert run(train.main, [*arguments, str(tmp_path / "home"), "--overwrite"]) == 2
    assert "does not look like a run" in capsys.readouterr().err
    assert run(train.main, [*arguments, str(tmp_path / "home"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --workdir"),
        (["--workdir", "run", "--config.train.steps=0"], "train.steps=0: expected a whole number from 1"),
        (["--workdir", "run", "--config.train.log_every=0"], "log_every=0"),
        (["--workdir", "run", "--config.sabw.sites=first"], "sabw.sites"),
        (["--workdir", "run", "--config.sabw.hidden=6"], "sabw.norm_num_groups=4 does not divide sabw.hidden=6"),
        (["--workdir", "run", "--config.base=../nowhere"], "../nowhere: no such file or folder, and not a hub id"),
    ],
)
def test_bad_training_input_is_one_line_and_writes_nothing(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(train.main, ["--config", f"{root}/config.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_cannot_be_resumed_to_fewer_steps_and_keeps_its_config(root, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["--config", f"{root}/config.py", "--workdir", str(tmp_path / "run"), "--quiet", "--resume"]
    assert run(train.main, [*arguments, "--config.train.steps=2"]) == 2
    assert "is at step 4 already" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 4


def test_experts_that_differ_are_named_with_the_first_field(root, tmp_path, capsys):
    wide = UNetConfig(**{**vars(tiny.MICRO_UNET), "layers_per_block": 2})
    save_folder(tmp_path / "odd", unet=tiny.unet(9, wide), text_encoder=tiny.text_encoder(9))
    experts = [dict(name="a", path=str(root / "a")), dict(name="odd", path=str(tmp_path / "odd"))]
    arguments = ["--config", f"{root}/config.py", "--workdir", str(tmp_path / "run"), f"--config.experts={experts}"]
    assert run(train.main, arguments) == 2
    assert "experts 'a' and 'odd' have different architectures: layers_per_block is 1 and 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_an_unreadable_picture_is_named_and_skipped_only_if_asked(root, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    captions = []
    for i in range(3):
        Image.new("RGB", (80, 50), (90 * i, 10, 10)).save(pictures / f"{i}.png")
        captions.append(dict(file_name=f"{i}.png", text="fox, noto style"))
    damaged = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(damaged[: len(damaged) // 2])
    (pictures / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    arguments = [
        "--config",
        f"{root}/config.py",
        "--workdir",
        str(tmp_path / "run"),
        "--quiet",
        "--config.train.steps=1",
    ]
    source = dict(kind="folder", path=str(pictures), size=(32, 64))
    (tmp_path / "config.py").write_text(
        (root / "config.py")
        .read_text()
        .replace('dict(kind="emoji", seed=0, length=64)', f"dict({source!r}, skip_unreadable=False)")
    )
    arguments[1] = f"{tmp_path}/config.py"
    assert run(train.main, arguments) == 2
    error = capsys.readouterr().err
    assert "1.png: not a readable picture" in error and "data.skip_unreadable" in error
    assert not (tmp_path / "run").exists()
    assert run(train.main, [*arguments, "--config.data.skip_unreadable=True"]) == 0
    assert "left out 1 unreadable pictures (1.png)" in capsys.readouterr().err


def test_pickled_truncated_and_half_precision_weights(root, tmp_path, capsys):
    for part in ("base", "a", "b", "c"):
        shutil.copytree(root / part, tmp_path / part)
    (tmp_path / "config.py").write_text(CONFIG.format(root=tmp_path))
    arguments = [
        "--config",
        f"{tmp_path}/config.py",
        "--out",
        str(tmp_path / "out"),
        "--method",
        "uniform",
        "--prompt",
        "fox",
    ]
    weights = tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert run(sample.main, arguments) == 2
    assert "b/unet/diffusion_pytorch_model.safetensors: not a complete safetensors file" in capsys.readouterr().err
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert run(sample.main, arguments) == 2
    assert "pickled weights are refused" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "b")
    save_folder(
        tmp_path / "b", unet=tiny.unet(2, tiny.MICRO_UNET), text_encoder=tiny.text_encoder(2), dtype=jnp.float16
    )
    assert run(sample.main, arguments) == 0
