"""Folders and files as people give them: what one container may carry unused, any may; wrong ones are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import convert
from afa_jax.commands import run
from afa_jax.weights.folders import save_folder
from afa_jax.weights.load import load_text_encoders, open_checkpoint
from afa_jax.weights.tensors import WeightsError, read_tensors, write_tensors
from afa_jax.weights.yaml_files import yaml_prediction
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


@pytest.mark.parametrize("prepend", ["", "hub"])
def test_a_folder_without_a_model_is_explained_and_replaces_nothing(
    saved: Path, tmp_path: Path, prepend: str, capsys: pytest.CaptureFixture[str]
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
    shutil.copytree(saved, cache / "snapshots" / "0a1b")
    shutil.copytree(saved, tmp_path / "above" / "model")
    wrong = {
        "empty": "is empty",
        "singles": "single files (a.safetensors); give one of them",
        "pickles": "weights_only=True",
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


def test_a_model_without_networks_is_not_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    for target in ("new", "new.safetensors"):
        assert run(convert.main, [str(tmp_path), "--out", str(tmp_path / target)]) == 2
        assert "no U-Net, VAE or text encoder" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    parameterization: eps\n", "epsilon"),
        ("model:\n  params:\n    timesteps: 1000\n", None),
        ("", None),
        ("- a\n- b\n", None),
        ("model:\n  params:\n    parameterization: x0\n", "parameterization is 'x0'"),
        ("model: [", "not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n", None),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("[" * 100_000, "not YAML"),
        ("x" * (2**20 + 1), "larger than"),
        ("a: \x00", "not YAML"),
    ],
)  # fmt: skip
def test_the_yaml_beside_a_file(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "a.yaml").write_text(text)
    if expected in (None, "epsilon", "v_prediction"):
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
    with pytest.raises(WeightsError, match=r"says epsilon, and theirs\.yaml beside it v_prediction.*prediction_type"):
        open_checkpoint(file).config("scheduler")
