"""Merges written as ordinary checkpoints, on tiny experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from afa_jax import convert, merge
from afa_jax.cli.commands import load_config, run
from afa_jax.experts.checks import find_checkpoints
from afa_jax.exporting.written import RECIPE
from afa_jax.trees import take
from afa_jax.weights.load import load_unet
from afa_jax.weights.merging import merge as merging
from afa_jax.weights.opened import open_checkpoint
from tests import tiny

ROOT = Path(__file__).parents[2]
CONFIG = "--config={root}/config.py"


def merged(root, *arguments):
    return run(merge.main, [CONFIG.format(root=root), *map(str, arguments)])


def recipe(path):
    return json.loads(open_checkpoint(path).metadata[RECIPE])


@pytest.mark.parametrize("out", ["ties.safetensors", "ties"])
def test_a_merge_is_an_ordinary_checkpoint_with_its_recipe(root, tmp_path, capsys, out):
    out = tmp_path / out
    assert merged(root, "--method=ties,density=0.3,scale=0.5", "--out", out) == 0
    assert "ties of a, b, c; the base's vae, scheduler, tokenizer" in capsys.readouterr().out
    written, base = open_checkpoint(out), open_checkpoint(root / "base")
    experts = {name: open_checkpoint(root / name) for name in "abc"}
    expected = merging.merge("ties", experts, base, dict(density=0.3, scale=0.5))
    for part, source in (("unet", expected), ("text_encoder", expected), ("vae", base)):
        found, tensors = written.tensors(part), source.tensors(part)
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(tensor), err_msg=key)
    assert written.config("scheduler")["beta_end"] == 0.012
    assert ("tokenizer" in written.components) == (out.suffix == "")

    made = recipe(out)
    assert (made["made"], made["kind"], made["options"]) == ("merge", "ties", dict(density=0.3, scale=0.5))
    assert [expert["name"] for expert in made["experts"]] == ["a", "b", "c"]
    for expert in made["experts"]:
        networks = expert["input"]["networks"]
        assert networks == {part: experts[expert["name"]].sha256(part) for part in ("unet", "text_encoder")}
    assert made["base"]["networks"] == {part: base.sha256(part) for part in ("vae", "unet", "text_encoder")}

    # Other commands take it: as it is, and as an expert.
    assert run(convert.main, [str(out), "--out", str(tmp_path / "again.safetensors")]) == 0
    load_unet(tmp_path / "again.safetensors")
    assert recipe(tmp_path / "again.safetensors")["before"]["kind"] == "ties"


def test_a_merge_can_be_an_expert(root, tmp_path):
    assert merged(root, "--method=average,weights.a=0.25,weights.c=0.75", "--out", tmp_path / "m") == 0
    experts = [dict(name=name, path=path) for name, path in (("a", f"{root}/a"), ("m", f"{tmp_path}/m"))]
    _, checkpoints = find_checkpoints(load_config(f"{root}/config.py", [f"experts={experts}"]))
    key = "conv_in.weight"
    a, c, found = (
        np.asarray(open_checkpoint(path).tensors("unet")[key]) for path in (root / "a", root / "c", tmp_path / "m")
    )
    np.testing.assert_allclose(found, 0.25 * a + 0.75 * c, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(checkpoints["m"].tensors("unet")[key]), found)
    assert "unet" not in recipe(tmp_path / "m")["base"]["networks"]  # it gave only the VAE


def test_a_one_hot_merge_written_and_loaded_is_the_expert(root, tmp_path):
    assert merged(root, "--method=average,weights.b=1", "--out", tmp_path / "b.safetensors") == 0
    latents, t, states = tiny.inputs(1, 1)
    predict = jax.jit(lambda unet: unet(latents, t, take(states, 0)))
    np.testing.assert_array_equal(predict(load_unet(tmp_path / "b.safetensors")), predict(load_unet(root / "b")))


def test_half_precision_is_rounded_once(root, tmp_path):
    """From experts in float16: what is written in float32 has more than float16's digits."""
    halves = [dict(name=name, path=f"{root}/{name}", dtype="float16") for name in "ab"]
    experts = f"--config.experts={halves}"
    for dtype in ("float16", "float32"):
        assert merged(root, experts, "--method=average", "--out", tmp_path / dtype, "--dtype", dtype) == 0
    half, whole = (open_checkpoint(tmp_path / dtype).tensors("unet") for dtype in ("float16", "float32"))
    a, b = (open_checkpoint(root / name).tensors("unet") for name in "ab")
    for key in a:
        one, other = (np.asarray(own[key]).astype(np.float16).astype(np.float32) for own in (a, b))
        exact = (one + other) / 2
        np.testing.assert_array_equal(np.asarray(whole[key]), exact, err_msg=key)
        np.testing.assert_array_equal(np.asarray(half[key]), exact.astype(np.float16), err_msg=key)
    assert {tensor.dtype for tensor in half.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=mean"], "no merge 'mean'; there are average"),
        (["--method=ties,densty=0.3"], "ties: no option 'densty'; there are density, scale, text_encoder"),
        (["--method=average,weights.a=0.5"], "the weights sum to 0.5; make it 1"),
        (["--method=ties:a"], "ties: no option 'expert'"),
        (["--method=ties,0.3"], "'0.3' is not FIELD=VALUE"),
        (
            ["--method=average", "--config.experts=[{'name': 'base', 'path': '{root}/a'}]"],
            "average: an expert is called 'base'",
        ),
        (["--method=slerp"], "slerp is between two of the 3 experts"),
        (["--method=average", "--out=x.ckpt"], "pickles are not written"),
        (["--method=average", "--out=x.txt"], "x.txt: a model is written as safetensors, or as a folder"),
        ([], "--method"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert merged(root, "--out=x.safetensors", *(one.replace("{root}", str(root)) for one in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_without_being_asked(root, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    assert merged(root, "--method=average", "--out", out) == 2
    assert "exists; choose another name, or --overwrite" in capsys.readouterr().err and out.read_text() == "mine"
    assert merged(root, "--method=average", "--out", out, "--overwrite") == 0
    load_unet(out)


def test_a_base_without_a_unet_is_refused_for_those_that_need_it(root, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    for part in ("vae", "scheduler", "tokenizer", "model_index.json"):
        (tmp_path / "base" / part).symlink_to(root / "base" / part)
    base = f"--config.base={tmp_path}/base"
    assert merged(root, base, "--method=model_stock", "--out", tmp_path / "m") == 2
    error = capsys.readouterr().err
    assert "model_stock takes the base model's U-Net" in error and error.count("\n") == 1
    assert merged(root, base, "--method=average", "--out", tmp_path / "m") == 0


WITHOUT_JAX = """
import sys
from afa_jax import Ensemble
models = {name: f"models/emoji/{name}" for name in ("animals", "food")}
Ensemble.from_pretrained(models, base="models/emoji/base").merge("average").save(sys.argv[1])
sys.exit(str({"jax", "jaxlib", "flax"} & set(sys.modules)))
"""


def test_a_merge_needs_no_jax(tmp_path):
    """The merged file is bit for bit the rounded mean of what the experts' files hold."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, str(tmp_path / "m.safetensors")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.strip() == "set()"
    found = open_checkpoint(tmp_path / "m.safetensors")
    for part in ("unet", "text_encoder"):
        one, two = (open_checkpoint(ROOT / "models" / "emoji" / name).tensors(part) for name in ("animals", "food"))
        for key, tensor in found.tensors(part).items():
            halves = [np.asarray(own[key], np.float32) * np.float32(0.5) for own in (one, two)]
            np.testing.assert_array_equal(np.asarray(tensor), np.sum(halves, axis=0).astype(tensor.dtype), err_msg=key)
