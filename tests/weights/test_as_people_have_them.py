"""Folders and files as people give them: what one container may carry unused, any may; wrong ones are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import convert
from afa_jax.cli.commands import run
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_same_layers
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.formats.hub import fetch_model
from afa_jax.weights.formats.wrong_places import meant
from afa_jax.weights.formats.yaml_files import yaml_prediction
from afa_jax.weights.load import load_text_encoders
from afa_jax.weights.merging.merge import merge
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import WeightsError, open_tensors, read_tensors, write_tensors
from tests import tiny

TEXT = "text_encoder/model.safetensors"
IDS = jnp.asarray([[673, 5, 9, 673]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people") / "model"
    save_folder(folder, unet=tiny.unet(0, tiny.MICRO_UNET), vae=tiny.vae(0), text_encoder=tiny.text_encoder(0))
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(model: Path, tensors: dict[str, Any], **config: Any) -> None:
    write_tensors(model / TEXT, read_tensors(model / TEXT) | tensors)
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def states(*models: Path) -> np.ndarray:
    encoders = load_text_encoders([open_checkpoint(model) for model in models])
    import jax

    return np.asarray(jax.vmap(lambda encoder: encoder(IDS))(encoders))


HALF = {
    "vision_model.embeddings.class_embedding": np.ones(4, np.float32),
    "visual_projection.weight": np.ones((4, 4), np.float32),
    "text_projection.weight": np.ones((8, 8), np.float32),
    "logit_scale": np.float32(4.6),
}


def test_a_text_encoder_with_the_rest_of_clip_is_the_text_encoder(saved: Path, model: Path) -> None:
    change(model, HALF, architectures=["CLIPTextModelWithProjection"], projection_dim=8)
    np.testing.assert_array_equal(states(model), states(saved))


def test_what_one_container_carries_unused_every_one_may(saved: Path, model: Path, tmp_path: Path) -> None:
    """The same things beside a folder's networks, and in a single file with another clip skip than it stores."""
    any_network = {"global_step": np.int64(3), "betas": np.ones(4, np.float32), "model_ema.decay": np.float32(0.9)}
    for part, own in (("unet", {}), ("vae", {"loss.logvar": np.float32(0)})):
        file = model / part / "diffusion_pytorch_model.safetensors"
        write_tensors(file, read_tensors(file) | any_network | own)
    assert run(convert.main, [str(model), "--out", str(tmp_path / "a.safetensors")]) == 0
    kept = open_tensors(tmp_path / "a.safetensors")
    layer = {k.replace(".0.", ".1."): np.array(v) for k, v in kept.tensors.items() if "encoder.layers.0." in k}
    first = "first_stage_model."
    more = any_network | layer | {f"{first}loss.logvar": np.float32(0), f"{first}epoch": np.int64(1)}
    more |= {f"cond_stage_model.transformer.{key}": value for key, value in HALF.items()}
    write_tensors(tmp_path / "b.safetensors", {k: np.array(v) for k, v in kept.tensors.items()} | more, kept.metadata)
    for name in ("unet", "vae", "text_encoder"):
        hashes = {open_checkpoint(path).sha256(name) for path in (saved, model, *tmp_path.glob("*.safetensors"))}
        assert len(hashes) == 1, name


def test_clip_skip_leaves_out_layers_and_stands_beside_an_encoder_with_all(saved: Path, model: Path) -> None:
    """One layer in config.json, two in the file: the first one counts, as transformers reads it."""
    first = {k: v for k, v in read_tensors(model / TEXT).items() if ".layers.0." in k}
    second = {key.replace(".layers.0.", ".layers.1."): -2 * value for key, value in first.items()}
    change(model, second)
    np.testing.assert_array_equal(states(model), states(saved))
    full = Path(shutil.copytree(model, model.parent / "full"))
    change(full, {}, num_hidden_layers=2)
    together, alone = states(model, full), (states(model), states(full))
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    experts = dict(a=open_checkpoint(model), b=open_checkpoint(full))
    with pytest.raises(InputError, match=r"num_hidden_layers \(a 1, b 2\).* one clip skip"):
        check_same_layers(experts)
    with pytest.raises(InputError, match=r"another architecture.*text_encoder=base"):
        merge("average", experts, None, {})
    assert merge("average", experts, None, dict(text_encoder="a")).sha256("text_encoder")


def test_a_folder_without_a_model_is_explained_and_replaces_nothing(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "good.safetensors"
    assert run(convert.main, [str(saved), "--out", str(out)]) == 0
    good = out.read_bytes()
    cache = tmp_path / "models--me--base"
    (tmp_path / "empty").mkdir()
    (tmp_path / "singles").mkdir()
    (tmp_path / "singles" / "a.safetensors").write_bytes(good)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "a.ckpt").write_bytes(b"")
    for kind in ("lora/adapter_model.safetensors", "run/ensemble.json"):
        (tmp_path / kind).parent.mkdir()
        (tmp_path / kind).write_bytes(b"")
    shutil.copytree(saved, cache / "snapshots" / "0a1b")
    shutil.copytree(saved, tmp_path / "above" / "model")
    wrong = {
        "empty": "is empty",
        "singles": "single files (a.safetensors); give one of them",
        "pickles": "weights_only=True",
        "lora": "is a LoRA; it is no model by itself",
        "run": "is a trained run; give it as --workdir",
        "models--me--base": "snapshots/0a1b, or the hub id me/base",
        "models--me--base/snapshots": "snapshots/0a1b, or the hub id me/base",
        "above": "subfolders (model); give one of them",
        "above/model/text_encoder": "the text_encoder of",
    }
    for name, said in wrong.items():
        for more in ([], ["--overwrite"]):
            target = out if more else tmp_path / "new"
            capsys.readouterr()
            assert run(convert.main, [str(tmp_path / name), "--out", str(target), *more]) == 2, name
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1, (name, error)
    assert out.read_bytes() == good and not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_path_that_is_written_in_another_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my models" / "photo.safetensors"
    file.parent.mkdir()
    file.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    hub = "of a hub's address write o/n"
    for path, said in {
        f"'{file}'": f"write {file}",
        f'"{file}" ': f"write {file}",
        file.as_uri(): f"write {file}",
        "~/my models/photo.safetensors": f"write {file}",
        "my models\\photo.safetensors": "write my models/photo.safetensors",
        "my models/photo": "write my models/photo.safetensors",
        f"{file}:0.7": f"write {file}",
        "my models/phto.safetensors": "there is my models/photo.safetensors",
        "https://hub.example/o/n": hub,
        "https://hub.example/o/n/blob/main/a%20b.safetensors?download=true": f"{hub}/a b.safetensors@main",
    }.items():
        with pytest.raises(InputError, match=f"no such file or folder.*{re.escape(said)}"):
            fetch_model(path, ("unet",))
    assert meant("a\0b") == meant("") == meant("/no/where") == ""


@pytest.mark.parametrize(
    ("metadata", "mark", "yaml", "scheduler", "expected"),
    [
        ({"modelspec.prediction_type": "V"}, False, "", "", "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, False, "eps", "epsilon", "epsilon"),
        ({"ss_base_model_version": "sd_v1_v"}, False, "", "", "v_prediction"),
        ({"ss_base_model_version": "sd_v1"}, True, "v", "", "v_prediction"),
        ({}, False, "", "v_prediction", "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, True, "", "", "its tensor v_pred says v_prediction"),
        ({}, True, "", "epsilon", "scheduler/scheduler_config.json beside it says epsilon"),
        ({}, True, "eps", "", "a.yaml beside it says epsilon"),
        ({"modelspec.prediction_type": "flow"}, False, "", "", "modelspec.prediction_type is 'flow'"),
        ({"afa_jax.configs": '{"scheduler":{"prediction_type":"epsilon"}}'}, False, "v", "", "a.yaml beside it says"),
        ({"afa_jax.configs": '{"scheduler":{"prediction_type":"epsilon"}}'}, True, "", "", "epsilon"),
    ],
)
def test_all_that_says_what_a_file_predicts_must_agree(
    tmp_path: Path, metadata: dict[str, str], mark: bool, yaml: str, scheduler: str, expected: str
) -> None:
    file = tmp_path / "a.safetensors"
    parts = {"input_blocks.0.0.weight": (8, 4, 3, 3), "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 8)}
    unet = {f"model.diffusion_model.{key}": np.zeros(shape, np.float32) for key, shape in parts.items()}
    write_tensors(file, unet | ({"v_pred": np.zeros(0, np.float32)} if mark else {}), metadata)
    if yaml:
        (tmp_path / "a.yaml").write_text(f"model:\n  params:\n    parameterization: '{yaml}'\n")
    if scheduler:
        (tmp_path / "model_index.json").write_text("{}")
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(prediction_type=scheduler)))
    if expected in ("epsilon", "v_prediction"):
        assert open_checkpoint(file).config("scheduler")["prediction_type"] == expected
        return
    with pytest.raises(WeightsError, match=f"{re.escape(expected)}.*prediction_type='epsilon'"):
        open_checkpoint(file).config("scheduler")
    assert open_checkpoint(file, prediction_type="epsilon").config("scheduler")["prediction_type"] == "epsilon"


def test_a_model_without_networks_is_not_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    for target in ("new", "new.safetensors"):
        assert run(convert.main, [str(tmp_path), "--out", str(tmp_path / target)]) == 2
        assert "no U-Net, VAE or text encoder" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


BOMB = "a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [{9 * f'*a{i}, '}]\n" for i in range(30))
BOMB += "model: {params: {parameterization: *a30}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    parameterization: eps\n", "epsilon"),
        ("model:\n  params:\n    timesteps: 1000\n", None),
        ("", "not used"),
        ("- a\n- b\n", "not used"),
        ("model:\n  params:\n    parameterization: x0\n", "parameterization is 'x0'"),
        ("model: [", "not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n", "not used"),
        ("!!python/object/apply:os.system ['true']", "not used"),
        ("[" * 100_000, "not YAML"),
        ("x" * (2**16 + 1), "larger than"),
        # maps merged into maps grow tenfold a line
        ("a0: &a0 {}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{10 * f'*a{i}, '}]}}\n" for i in range(30)), "not used"),
        (BOMB, "parameterization is no text"),
        ("model:\n  params:\n    parameterization: !!int 12:30\n", "parameterization is '12:30'"),
        ("a: \x00", "not YAML"),
    ],
)  # fmt: skip
def test_the_yaml_beside_a_file(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "a.yaml").write_text(text)
    if expected == "not used":
        with pytest.warns(UserWarning, match=r"a\.yaml: not used"):
            assert yaml_prediction(tmp_path / "a.safetensors") is None
    elif expected in (None, "epsilon", "v_prediction"):
        assert yaml_prediction(tmp_path / "a.safetensors") == expected
    else:
        with pytest.raises(WeightsError, match=r"a\.yaml: ") as caught:
            yaml_prediction(tmp_path / "a.safetensors")
        assert str(expected) in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_is_what_the_yaml_beside_it_says(saved: Path, tmp_path: Path) -> None:
    assert run(convert.main, [str(saved), "--out", str(tmp_path / "ours.safetensors")]) == 0
    file, beside = tmp_path / "theirs.safetensors", tmp_path / "theirs.yaml"
    write_tensors(file, read_tensors(tmp_path / "ours.safetensors"), {"afa_jax.configs": "{}"})
    # Without our own configs the tiny networks cannot be told, so only the schedule is asked.
    beside.write_text("model:\n  params:\n    parameterization: v\n")
    assert open_checkpoint(file).config("scheduler")["prediction_type"] == "v_prediction"
    assert open_checkpoint(file, prediction_type="epsilon").config("scheduler")["prediction_type"] == "epsilon"
    write_tensors(file, read_tensors(file), {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(WeightsError, match=r"says epsilon, theirs\.yaml beside it says v_prediction.*prediction_type"):
        open_checkpoint(file).config("scheduler")
