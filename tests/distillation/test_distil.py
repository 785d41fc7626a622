"""Distillation end to end: what it learns, that it resumes bit for bit, what it writes, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afa_jax import Ensemble, distil, merge, sample
from afa_jax.cli.commands import load_config, run
from afa_jax.diffusion.guidance import Denoiser
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.few_steps import FewSteps
from afa_jax.distillation.student import Student
from afa_jax.errors import InputError
from afa_jax.fusion.steered import GuidedUNet, StyledUNet
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.methods.specs import parse_method
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.steering import Steering, SteeringConfig
from afa_jax.sampling.generation import Request, generate
from afa_jax.trees import flatten
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.opened import open_checkpoint
from tests import tiny
from tests.commands.conftest import TOKENIZER, says_nothing_of

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


@pytest.mark.slow
def test_it_comes_nearer_to_its_teacher(config, tmp_path):
    start = "--student=expert:a"
    fields = dict(train__steps=20, validation__every=2, distil__features=1e-3)
    assert distilled(config, tmp_path / "near", start, **fields) == 0
    first = json.loads((tmp_path / "near" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["feature_error"] > 0
    lines = [json.loads(line) for line in (tmp_path / "near" / "validation.jsonl").read_text().splitlines()]
    assert lines[-1]["distance"] < 0.7 * lines[0]["distance"]
    assert lines[-1]["distance_path"] < 0.7 * lines[0]["distance_path"]


def test_a_distilled_run_is_a_method(config, whole, tmp_path):
    models = Models(load_config(str(config)))
    method = make_method(parse_method(f"distilled:{whole}"), models)
    x, t = jnp.ones((1, 8, 16, 4)), jnp.array([500])
    ids = jnp.asarray(method.experts.tokenizer(["octopus, noto style"]))
    assert isinstance(method.denoiser, Denoiser)
    prediction = method.denoiser(x, t, encode_prompts(method.experts.text_encoder, ids))
    own = load_unet(whole / "model")(x, t, load_text_encoder(whole / "model").encode(ids))
    np.testing.assert_allclose(prediction, own, atol=1e-5)
    command = ["--config", str(config), "--method", f"distilled:{whole}", "--prompt", "octopus, noto style"]
    assert run(sample.main, [*command, "--out", str(tmp_path / "out")]) == 0


def test_the_control_has_no_teacher_and_is_as_far_as_the_noise(config, tmp_path):
    ensemble = Ensemble.from_config(config)
    model = ensemble.distil(
        tmp_path / "run", teacher="data", steps=1, quiet=True, overrides=FIELDS | {"train.steps": 1}
    )
    assert model == tmp_path / "run" / "model" and open_checkpoint(model).components
    record = json.loads((tmp_path / "run" / "distilled.json").read_text())
    assert record["teacher"] == "data" and "distance_path" not in record["distance"]


def test_a_method_on_a_path_teaches_its_guided_predictions_there(config, tmp_path):
    fields = dict(train__steps=1, distil__trajectories__share=1.0, distil__guidance=(1.5, 2.5))
    assert distilled(config, tmp_path / "run", "--teacher=superdiff", **fields) == 0
    record = json.loads((tmp_path / "run" / "distilled.json").read_text())
    assert record["teacher"]["kind"] == "superdiff" and "distance_noised" not in record["distance"]


def test_a_student_of_another_kind_does_not_fit(config, tmp_path, capsys):
    networks: dict[str, Any] = dict(text_encoder=tiny.text_encoder(0), tokenizer=TOKENIZER)
    other = dataclasses.replace(tiny.MICRO_UNET, in_channels=9)
    save_folder(tmp_path / "inpainting", unet=tiny.unet(0, other), **networks)
    narrow = dataclasses.replace(tiny.MICRO_UNET, block_out_channels=(4,))
    save_folder(tmp_path / "narrow", unet=tiny.unet(0, narrow), **networks)
    for name, fact in (("inpainting", "latent channels"), ("narrow", "choose 0, or a student of their architecture")):
        student = f"--student=checkpoint,path={tmp_path / name}"
        assert distilled(config, tmp_path / "bad", student, distil__features=0.1) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "distil." in said and fact in said and not (tmp_path / "bad").exists()


WRONG = {
    "--teacher=afa": "distil.teacher=afa: it is trained; name the run",
    "--teacher=afa,workdir={here}": "is not trained",
    "--teacher=ties,densty=1": "no option 'densty'",
    "--teacher=superdiff": "distil.guidance",
    "--teacher=uniform,guidance=3": "guidance says how it is sampled",
    "--student=uniform": "distil.student=uniform: it is not one U-Net",
    "--student=checkpoint,path={here}/absent": "distil.student",
    "--config.distil.trajectories.path=": "distil.trajectories.path is missing",
    "--config.distil.features=0.1 --teacher=average": "has no maps",
    "--teacher=superdiff --config.distil.guidance=(1,3)": "distil.trajectories.share=1",
    "--config.distil.guidance=(4,5)": "sample.guidance=2",
    "--teacher=data --config.distil.guidance=(1,3)": "no guidance to fold in",
    "--config.distil.few.steps=2": "distil.guidance",
    "--config.distil.few.steps=3 --config.distil.guidance=(1,3)": "distil.few.steps=3",
    "--config.distil.few.steps=4 --config.distil.few.teacher_steps=6 --config.distil.guidance=(1,3)": "teacher_steps=6",
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


@pytest.fixture(scope="module")
def guided(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose guidance is folded in."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    assert distilled(config, folder, distil__guidance=(1.0, 4.0)) == 0
    return folder


def test_guidance_is_an_input_and_baked_into_what_is_written(config, guided):
    models = Models(load_config(str(config)))
    method = make_method(parse_method(f"distilled:{guided}"), models)
    assert method.on_path and method.evaluations(SampleOptions(size=(32, 64), steps=5, guidance=3.0)) == 5
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 16, 4)), jnp.array([500, 20])
    ids = jnp.asarray(method.experts.tokenizer(["octopus, noto style"] * 2))
    conditional = encode_prompts(method.experts.text_encoder, ids)

    def predicted(scale: float) -> jax.Array:
        denoiser = method.denoiser
        assert isinstance(denoiser, GuidedUNet)
        return denoiser.guided(x, t, conditional, conditional, scale, ())[0]

    baked = load_unet(guided / "model")(x, t, load_text_encoder(guided / "model").encode(ids))
    np.testing.assert_allclose(predicted(2.0), baked, atol=2e-3)  # the config's guidance; weights are float16
    assert float(jnp.abs(predicted(4.0) - predicted(1.0)).max()) > 1e-4
    with pytest.raises(InputError, match=r"guidance 5: .*1 to 4"):
        generate([Request(prompt="octopus")], method.denoiser, method.experts, seed=0, options=options(5.0))


def options(guidance: float, steps: int = 2) -> SampleOptions:
    return SampleOptions(size=(32, 64), steps=steps, guidance=guidance, batch=1)


def test_a_fresh_input_changes_nothing(root):
    unet, encoder = load_unet(root / "a"), load_text_encoder(root / "a")
    steering = SteeringConfig(width=8, time_width=32, guidance=(1.0, 3.0), styles=("a", "b"))
    student = Student(unet, encoder, Steering(steering, rngs=nnx.Rngs(0)))
    x, t, ids = jnp.ones((2, 8, 16, 4)), jnp.array([500, 20]), jnp.ones((2, 16), jnp.int32)
    prediction, _ = student.predict(x, t, ids, jnp.array([1.0, 3.0]), jnp.eye(2))
    np.testing.assert_array_equal(prediction, unet(x, t, encoder.encode(ids)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_of_the_target_leads_where_the_teacher_gets(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing="trailing")
    few = FewSteps(schedule=schedule, steps=2, teacher_steps=6)
    x, following = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 4))
    point = jnp.array([0, 1])
    k = few.at(point, 2)
    assert k.t.tolist() == [999, 499]
    made, _ = few.sampler.step(k, x, few.target(x, following, point), (), None)
    np.testing.assert_allclose(made, following, atol=1e-4)
    # The weighted error is that of x_0 times max(SNR, 1), whatever is predicted.
    other = few.target(x, following + 0.01, point)
    clean = [schedule.split(x, p, k.signal, k.sigma)[0] for p in (other, few.target(x, following, point))]
    snr = (k.signal / k.sigma).ravel() ** 2
    wanted = jnp.maximum(snr, 1) * jnp.square(clean[0] - clean[1]).mean((1, 2, 3))
    error = jnp.square(other - few.target(x, following, point)).mean((1, 2, 3))
    np.testing.assert_allclose(few.weights(point) * error, wanted, rtol=1e-2)


def test_few_steps_from_a_model_with_guidance_folded_in(config, guided, tmp_path):
    out = tmp_path / "few"
    spec = f"distilled,workdir={guided}"
    fields = dict(distil__guidance=(2.0, 3.0), distil__few__steps=2, train__steps=2)
    assert distilled(config, out, f"--teacher={spec}", f"--student={spec}", **fields) == 0
    scheduler = open_checkpoint(out / "model").config("scheduler")
    assert scheduler["timestep_spacing"] == "trailing" and scheduler["beta_start"] == 0.00085
    method = make_method(parse_method(f"distilled:{out}"), Models(load_config(str(config))))
    shared = method.sampled_with(options(2.5, steps=25))
    assert shared.steps == 2 and method.experts.schedule.timesteps(2).tolist() == [999, 499]
    assert (
        len(list(generate([Request(prompt="octopus")], method.denoiser, method.experts, seed=0, options=shared))) == 1
    )


@pytest.mark.slow
def test_styles_are_picked_and_mixed_and_a_further_one_learnt(config, tmp_path, capsys):
    """Each expert is a teacher; a fourth is added, while the first three stay."""
    three, two = (
        tmp_path / "three",
        "--config.experts=" + repr([dict(entry) for entry in load_config(str(config)).experts[:2]]),
    )
    fields = dict(train__steps=2, distil__features=1e-3, distil__trajectories__path=str(tmp_path / "paths"))
    assert distilled(config, tmp_path / "two", "--teacher=experts", two, **fields) == 0
    record = json.loads((tmp_path / "two" / "distilled.json").read_text())
    assert record["steering"]["styles"] == ["a", "b"] and set(record["distance"]) >= {"distance_a", "distance_b"}
    models = Models(load_config(str(config)))
    spec = f"distilled:{tmp_path / 'two'}"
    one, other, mixed = (make_method(parse_method(spec + more), models) for more in (",style.a=1", ",style.b=2", ""))
    assert isinstance(one.denoiser, StyledUNet) and isinstance(mixed.denoiser, StyledUNet)
    assert np.asarray(one.denoiser.style).tolist() == [1, 0] and np.asarray(mixed.denoiser.style).tolist() == [0.5, 0.5]
    assert one.record != other.record and one.name == "distilled:two a=1"
    with pytest.raises(InputError, match="style 'c': no teacher has it; there are a, b"):
        make_method(parse_method(spec + ",style.c=1"), models)
    assert distilled(config, three, "--teacher=experts", f"--student={spec}", **fields) == 0
    assert json.loads((three / "distilled.json").read_text())["steering"]["styles"] == ["a", "b", "c"]
    capsys.readouterr()
    spec = f"distilled:{three}"
    assert distilled(config, tmp_path / "bad", "--teacher=experts", f"--student={spec}", **fields) == 2
    assert "add an expert" in capsys.readouterr().err and not (tmp_path / "bad").exists()
    command = [
        "--config",
        str(config),
        "--method",
        spec,
        "--prompt",
        "octopus, noto style",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(sample.main, [*command, "--style", "a=0.7,c=0.3"]) == 0
    assert run(sample.main, [*command, "--style", "d=1", "--overwrite"]) == 2
    assert "style 'd': no teacher has it" in capsys.readouterr().err


def test_another_scale_is_baked_in(config, guided, tmp_path, capsys):
    out = tmp_path / "scale.safetensors"

    def merged(*more: str) -> int:
        return run(
            merge.main,
            ["--config", str(config), "--out", str(out), f"--method=distilled,workdir={guided}{''.join(more)}"],
        )

    assert merged(",guidance=5") == 2 and "guidance=5; choose 1 to 4" in capsys.readouterr().err
    assert merged() == 2 and "guidance is missing" in capsys.readouterr().err
    assert merged(",guidance=2") == 0
    for name, array in flatten(load_unet(out)).items():  # that which was baked in already
        np.testing.assert_allclose(array, flatten(load_unet(guided / "model"))[name], atol=1e-3, err_msg=name)
