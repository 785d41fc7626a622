"""Distillation end to end: what it learns, that it resumes bit for bit, what it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import distil, sample
from afa_jax.cli.commands import load_config, run
from afa_jax.distillation.trajectories import SHARD
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.specs import parse_method
from afa_jax.trees import flatten
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.opened import open_checkpoint
from tests.commands.conftest import says_nothing_of

FIELDS = {
    "train.batch": 16, "train.steps": 4, "train.save_every": 2, "train.ema": 0.5, "validation.pairs": 3,
    "distil.scenes": 24, "distil.trajectories.count": 5, "distil.trajectories.steps": 3, "distil.trajectories.batch": 4,
    "distil.trajectories.painted": 0.25, "validation.prompts": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def config(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' config with a section ``distil``; trajectories are shared by the module's tests."""
    folder = tmp_path_factory.mktemp("distil")
    path = folder / "config.py"
    text = (root / "config.py").read_text()
    section = f"distil=dict(teacher='uniform', trajectories=dict(path={str(folder / 'paths')!r})),\n    ))"
    path.write_text(text.replace("    ))\n", f"        {section}\n"))
    return path


OF_WHOLE = dict(validation__every=2, validation__prompts="('octopus, noto style',)")


def distilled(config: Path, workdir: Path, *more: str, **fields: object) -> int:
    values = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    overrides = [f"--config.{name}={value}" for name, value in values.items()]
    return run(distil.main, ["--config", str(config), "--workdir", str(workdir), "--quiet", *overrides, *more])


def parameters(folder: Path) -> dict[str, jax.Array]:
    return flatten((load_unet(folder / "model"), load_text_encoder(folder / "model")))


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert distilled(config, folder, **OF_WHOLE) == 0
    return folder


def test_two_and_two_steps_are_four(config, whole, tmp_path):
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    for name in ("model", "checkpoints/4"):
        shutil.rmtree(parts / name)
    for name in ("model.safetensors", "distilled.json"):
        (parts / name).unlink()
    assert distilled(config, parts, "--resume", **OF_WHOLE) == 0
    for name, array in parameters(whole).items():
        np.testing.assert_array_equal(array, parameters(parts)[name], err_msg=name)
    for name in ("validation.jsonl", "distilled.json"):
        assert (whole / name).read_text() == (parts / name).read_text()


def test_it_is_one_ordinary_checkpoint_with_its_distance(whole, config, root, capsys):
    folder, single = open_checkpoint(whole / "model"), open_checkpoint(whole / "model.safetensors")
    for part in ("unet", "text_encoder", "vae"):
        assert {k: t.shape for k, t in folder.tensors(part).items()} == {
            k: t.shape for k, t in single.tensors(part).items()
        }
    assert folder.sha256("vae") == open_checkpoint(root / "base").sha256("vae")
    assert {"scheduler", "tokenizer"} <= set(folder.components)
    record = json.loads((whole / "distilled.json").read_text())
    for checkpoint in (folder, single):
        said = json.loads(checkpoint.metadata["afa_jax.recipe"])
        assert said["teacher"]["kind"] == "uniform" and said["student"]["kind"] == "average"
        assert said["distance"] == record["distance"]
    lines = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["distance"] == record["distance"]["distance"] > 0
    assert record["distance"]["distance_path"] > 0
    assert (whole / "samples" / "step_00000004.png").is_file()
    assert says_nothing_of(str(root), whole) > 5 and says_nothing_of(str(whole.parent), whole)


def test_it_comes_nearer_to_its_teacher(config, tmp_path):
    start = "--student=expert:a"
    assert distilled(config, tmp_path / "near", start, train__steps=20, validation__every=2) == 0
    lines = [json.loads(line) for line in (tmp_path / "near" / "validation.jsonl").read_text().splitlines()]
    assert lines[-1]["distance"] < 0.7 * lines[0]["distance"]
    assert lines[-1]["distance_path"] < 0.7 * lines[0]["distance_path"]


def test_trajectories_are_made_once_and_mended(config, whole, tmp_path):
    (paths,) = {file.parent for file in (config.parent / "paths").glob("*/*.npy") if len(np.load(file)) == 5}
    times = {file: file.stat().st_mtime_ns for file in paths.glob("*.npy")}
    states = np.load(paths / "00000.states.npy")
    assert states.shape[:2] == (5, 4) and SHARD > 5
    (paths / "00000.experts.npy").unlink()  # as a start that was killed leaves it
    before = np.load(paths / "00000.predictions.npy")
    assert distilled(config, tmp_path / "again") == 0
    assert all(file.stat().st_mtime_ns > times[file] for file in times)
    np.testing.assert_array_equal(np.load(paths / "00000.predictions.npy"), before)
    times = {file: file.stat().st_mtime_ns for file in paths.glob("*.npy")}
    assert distilled(config, tmp_path / "third") == 0
    assert all(file.stat().st_mtime_ns == times[file] for file in times)
    for name, array in parameters(tmp_path / "third").items():
        np.testing.assert_array_equal(array, parameters(tmp_path / "again")[name])


def test_a_distilled_run_is_a_method(config, whole, tmp_path):
    models = Models(load_config(str(config)))
    method = make_method(parse_method(f"distilled:{whole}"), models)
    x, t = jnp.ones((1, 8, 16, 4)), jnp.array([500])
    ids = jnp.asarray(method.experts.tokenizer(["octopus, noto style"]))
    from afa_jax.models.conditioning import encode_prompts

    prediction = method.denoiser(x, t, encode_prompts(method.experts.text_encoder, ids))  # type: ignore[operator]
    own = load_unet(whole / "model")(x, t, load_text_encoder(whole / "model").encode(ids))
    np.testing.assert_allclose(prediction, own, atol=1e-5)
    command = ["--config", str(config), "--method", f"distilled:{whole}", "--prompt", "octopus, noto style"]
    assert run(sample.main, [*command, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("teacher", ["data", "superdiff", "magicfusion,general=a", "ties,density=0.5"])
def test_any_method_teaches(config, tmp_path, teacher):
    share = 1.0 if teacher.startswith(("superdiff", "magic")) else 0.5
    assert (
        distilled(config, tmp_path / "run", "--teacher", teacher, train__steps=1, distil__trajectories__share=share)
        == 0
    )
    record = json.loads((tmp_path / "run" / "distilled.json").read_text())
    if teacher == "data":
        assert record["teacher"] == "data" and "distance_path" not in record["distance"]
    else:
        assert record["teacher"]["kind"] == teacher.split(",")[0]


def test_features_and_parts_of_a_batch(config, tmp_path):
    """A weight on features adds its part; a batch in parts is the same step."""
    common = dict(train__steps=1, distil__features=0.1, train__caption_dropout=0.0, train__ema=0.0)
    assert distilled(config, tmp_path / "a", **common) == 0
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["feature_error"] > 0 and line["loss"] > 0.1 * line["feature_error"]


WRONG = {
    "--teacher=afa": "distil.teacher=afa: it is trained; name the run",
    "--teacher=afa,workdir={here}": "is not trained",
    "--teacher=ties,densty=1": "no option 'densty'",
    "--teacher=superdiff": "distil.trajectories.share=1",
    "--student=uniform": "distil.student=uniform: it is not one U-Net",
    "--student=checkpoint,path={here}/absent": "distil.student",
    "--config.distil.trajectories.path=": "distil.trajectories.path is missing",
    "--config.distil.features=0.1 --teacher=average": "has no maps",
    "--config.train.batch=8": "train.batch=8",
    "--config.train.remat=fused": "train.remat=fused",
    "--config.distil.trajectories.share=1.5": "share=1.5",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(config, tmp_path, capsys, line):
    assert distilled(config, tmp_path / "bad", *line.format(here=tmp_path).split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and WRONG[line] in said
    assert not (tmp_path / "bad").exists()


def test_another_run_is_not_continued(config, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert distilled(config, tmp_path / "run", "--resume", "--student=expert:a", **OF_WHOLE) == 2
    assert "student changed" in capsys.readouterr().err
