"""Any checkpoint in, any out, on tiny models: the weights, the recipe, what is missing, and what --inspect says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import convert
from afa_jax.cli.commands import run
from afa_jax.exporting.written import RECIPE
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.opened import check_networks, open_checkpoint
from afa_jax.weights.tensors import open_tensors, read_metadata, read_tensors, write_tensors
from tests import tiny

NETWORKS = ("unet", "vae", "text_encoder")
FACTOR = "lora_unet_mid_block_attentions_0_proj_in"


def weights(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {
        f"{part} {key}": np.asarray(tensor)
        for part in NETWORKS
        if part in checkpoint.components
        for key, tensor in checkpoint.tensors(part).items()
    }


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def recipe(path: Path) -> dict:
    return json.loads(open_checkpoint(path).metadata[RECIPE])


@pytest.fixture(scope="module")
def single(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model as one file, written by the command."""
    path = tmp_path_factory.mktemp("single") / "a.safetensors"
    assert run(convert.main, [str(root / "a"), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a U-Net and a text encoder alone."""
    path = tmp_path_factory.mktemp("bare") / "bare"
    save_folder(path, unet=tiny.unet(1, tiny.MICRO_UNET), text_encoder=tiny.text_encoder(1))
    return path


def test_folder_to_single_file_and_back_is_bit_for_bit_the_same(root, single, tmp_path, capsys):
    assert run(convert.main, [str(single), "--out", str(tmp_path / "back"), "--base", str(root / "base")]) == 0
    assert_same(root / "a", single)
    assert_same(root / "a", tmp_path / "back")
    printed = capsys.readouterr().out
    assert f"tokenizer: taken from {root}/base" in printed and "vae: taken" not in printed
    assert {path.name for path in (tmp_path / "back" / "tokenizer").iterdir()} == {
        path.name for path in (root / "base" / "tokenizer").iterdir()
    }
    made = recipe(tmp_path / "back")
    assert made["input"]["name"] == "a.safetensors" and made["dtype"] == "as stored"
    assert made["input"]["sha256"] == hashlib.sha256(single.read_bytes()).hexdigest()
    assert made["before"]["input"]["name"] == "a"
    assert str(tmp_path) not in json.dumps(made)


def test_a_single_file_to_a_single_file_leaves_out_what_is_not_used(single, tmp_path, capsys):
    file = open_tensors(single)
    more = {"model_ema.decay": np.float32(0.9), "global_step": np.array(3)}
    write_tensors(tmp_path / "more.safetensors", {**file.tensors, **more}, dict(file.metadata) | {"title": "mine"})
    assert run(convert.main, [str(tmp_path / "more.safetensors"), "--out", str(tmp_path / "b.safetensors")]) == 0
    assert "left out: 2 tensors (" in capsys.readouterr().out
    assert_same(single, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors")["title"] == "mine"


def test_the_dtype_is_the_files(single, tmp_path):
    for dtype in ("float16", "bfloat16"):
        out = tmp_path / dtype
        assert run(convert.main, [str(single), "--out", str(out), "--dtype", dtype]) == 0
        whole = weights(single)
        for key, array in weights(out).items():
            assert array.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(array, whole[key].astype(jnp.dtype(dtype)))
        assert recipe(out)["dtype"] == dtype


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path, capsys):
    huge: Any = tiny.unet(1, tiny.MICRO_UNET)
    huge.time_embedding.linear_1.bias[...] = jnp.full_like(huge.time_embedding.linear_1.bias[...], 1e6)
    save_folder(tmp_path / "huge", unet=huge)
    for out in ("out", "out.safetensors"):
        assert run(convert.main, [str(tmp_path / "huge"), "--out", str(tmp_path / out), "--dtype", "float16"]) == 2
        error = capsys.readouterr().err
        assert "time_embedding.linear_1.bias" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def test_missing_components_are_named_or_taken_from_the_base(root, bare, tmp_path, capsys):
    assert run(convert.main, [str(bare), "--out", str(tmp_path / "alone")]) == 0
    printed = capsys.readouterr().out
    for part in ("vae", "scheduler", "tokenizer"):
        assert f"{part}: {bare} has none; --base INPUT takes it from another checkpoint" in printed
    assert open_checkpoint(tmp_path / "alone").components == ("unet", "text_encoder")
    assert run(convert.main, [str(bare), "--out", str(tmp_path / "whole"), "--base", str(root / "b")]) == 0
    whole = open_checkpoint(tmp_path / "whole")
    assert set(whole.components) == {*NETWORKS, "scheduler", "tokenizer"}
    assert whole.config("scheduler")["beta_schedule"] == "scaled_linear"
    np.testing.assert_array_equal(
        np.asarray(whole.tensors("vae")["encoder.conv_in.bias"]),
        np.asarray(open_checkpoint(root / "b").tensors("vae")["encoder.conv_in.bias"]),
    )
    assert recipe(tmp_path / "whole")["taken"]["vae"]["name"] == "b"


def test_a_part_of_a_model_is_said_to_be_one(root, tmp_path, capsys):
    assert run(convert.main, [f"{root}/base/vae", "--out", str(tmp_path / "vae")]) == 0
    assert f"unet: {root}/base/vae, which is a part of {root}/base, has none; " in capsys.readouterr().out


def test_another_vae_replaces_the_models(root, single, tmp_path):
    assert run(convert.main, [str(single), "--out", str(tmp_path / "c.safetensors"), "--vae", str(root / "c")]) == 0
    mixed, own, other = (open_checkpoint(path) for path in (tmp_path / "c.safetensors", single, root / "c"))
    for part, source in (("vae", other), ("unet", own)):
        for key, tensor in source.tensors(part).items():
            np.testing.assert_array_equal(np.asarray(mixed.tensors(part)[key]), np.asarray(tensor))


def test_a_lora_is_baked_in_and_named_in_the_recipe(single, tmp_path):
    up, down = (np.random.default_rng(i).standard_normal((8, 2)).astype(np.float32) for i in (0, 1))
    write_tensors(
        tmp_path / "style.safetensors", {f"{FACTOR}.lora_up.weight": up, f"{FACTOR}.lora_down.weight": down.T}
    )
    out = tmp_path / "baked.safetensors"
    assert run(convert.main, [str(single), "--out", str(out), "--lora", f"{tmp_path}/style.safetensors:0.5"]) == 0
    before, after = weights(single), weights(out)
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert changed == ["unet mid_block.attentions.0.proj_in.weight"]
    expected = before[changed[0]][:, :, 0, 0] + 0.5 * up @ down.T
    np.testing.assert_allclose(after[changed[0]][:, :, 0, 0], expected, rtol=1e-5, atol=1e-6)
    (lora,) = json.loads(open_checkpoint(out).metadata["afa_jax.loras"])
    assert lora["name"] == "style.safetensors" and lora["weight"] == 0.5 and len(lora["sha256"]) == 64


def test_an_empty_folder_is_used(root, tmp_path):
    (tmp_path / "model").mkdir()
    assert run(convert.main, [str(root / "a"), "--out", str(tmp_path / "model")]) == 0
    assert_same(root / "a", tmp_path / "model")


@pytest.mark.parametrize("out", ["model", "model.safetensors"])
def test_what_is_there_stays_unless_overwriting_is_asked_for(root, tmp_path, capsys, out):
    arguments = [str(root / "a"), "--out", str(tmp_path / out)]
    assert run(convert.main, arguments) == 0
    before = weights(tmp_path / out)
    arguments[0] = str(root / "b")
    assert run(convert.main, arguments) == 2
    assert f"{tmp_path / out} exists; choose another name, or --overwrite" in capsys.readouterr().err
    assert all(np.array_equal(before[key], array) for key, array in weights(tmp_path / out).items())
    assert run(convert.main, [*arguments, "--overwrite"]) == 0
    assert_same(root / "b", tmp_path / out)
    assert run(convert.main, [str(tmp_path / out), *arguments[1:], "--overwrite", "--dtype", "float16"]) == 0
    assert {array.dtype for array in weights(tmp_path / out).values()} == {np.dtype(np.float16)}
    assert [path.name for path in tmp_path.iterdir()] == [out]
    check_networks(tmp_path / out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ROOT/a"], "--out is missing"),
        (["ROOT/a", "ROOT/b", "--out", "x"], "2 inputs for one --out"),
        (["ROOT/nothing", "--out", "x"], "nothing: no such file or folder"),
        (["ROOT/a", "--out", "x.ckpt"], "pickles are not written"),
        (["ROOT/a", "--out", "x.json"], "x.json: a model is written as safetensors, or as a folder"),
        (["ROOT/a", "--out", "x", "--lora", "nothing.safetensors:0.5"], "nothing.safetensors: no such file or folder"),
        (["ROOT/a", "--out", "x", "--base", "ROOT/bad_vae", "--vae", "ROOT/bad_vae"], "no such file or folder"),
        (["ROOT/a", "--out", "x", "--json", "y"], "--json goes with --inspect"),
        (["ROOT/a", "--inspect", "--out", "x"], "--out does not go with --inspect"),
        (["ROOT/config.py", "--out", "x"], "config.py: not a .safetensors file or a diffusers folder"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(convert.main, [argument.replace("ROOT", str(root)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_kinds_of_models_are_refused(root, tmp_path, capsys):
    wide = dataclasses.replace(tiny.MICRO_UNET, cross_attention_dim=12)
    save_folder(tmp_path / "wide", unet=tiny.unet(1, wide))
    arguments = [str(tmp_path / "wide"), "--out", str(tmp_path / "out"), "--base", str(root / "base")]
    assert run(convert.main, arguments) == 2
    assert "makes text states of width 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", [9, 8], ids=["inpainting", "pix2pix"])
def test_models_of_other_tasks_are_converted(root, tmp_path, channels):
    """Their U-Nets take more channels than a VAE makes: a mask, a picture."""
    unet = tiny.unet(1, dataclasses.replace(tiny.MICRO_UNET, in_channels=channels))
    save_folder(tmp_path / "model", unet=unet, text_encoder=tiny.text_encoder(1))
    single, back = tmp_path / "model.safetensors", tmp_path / "back"
    base = ["--base", str(root / "base")]
    assert run(convert.main, [str(tmp_path / "model"), "--out", str(single), *base]) == 0
    assert run(convert.main, [str(single), "--out", str(back), *base]) == 0
    assert_same(single, back)
    found, own = weights(back), weights(tmp_path / "model")
    assert found["unet conv_in.weight"].shape[1] == channels
    assert all(np.array_equal(found[key], array) for key, array in own.items())


def test_a_vae_of_other_latents_is_refused(root, tmp_path, capsys):
    unet = tiny.unet(1, dataclasses.replace(tiny.MICRO_UNET, in_channels=8, out_channels=8))
    save_folder(tmp_path / "wide", unet=unet)
    arguments = [str(tmp_path / "wide"), "--out", str(tmp_path / "out"), "--base", str(root / "base")]
    assert run(convert.main, arguments) == 2
    error = capsys.readouterr().err
    assert "has 4 latent channels" in error and "makes 8; take the VAE" in error


def test_a_place_that_cannot_be_written_is_one_line(single, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / "model.safetensors"
    assert run(convert.main, [str(single), "--out", str(out)]) == 2
    assert f"error: {out} cannot be written (" in capsys.readouterr().err


# Looking


def test_inspect_describes_compares_and_names_the_expert(root, single, bare, tmp_path, capsys):
    half, report = tmp_path / "half", tmp_path / "new" / "report.json"
    assert run(convert.main, [str(single), "--out", str(half), "--dtype", "float16"]) == 0
    capsys.readouterr()
    inputs = [str(path) for path in (single, half, root / "b", bare)]
    arguments = ["--inspect", *inputs, "--config", f"{root}/config.py", "--json", str(report)]
    assert run(convert.main, arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    results = json.loads(report.read_text())
    found = results["inputs"]
    assert list(found) == inputs
    assert found[inputs[0]]["container"] == "single file" and found[inputs[1]]["container"] == "diffusers folder"
    assert found[inputs[0]]["sha256"] in printed
    assert found[inputs[1]]["components"]["unet"]["dtypes"] == {"float16": len(open_checkpoint(half).tensors("unet"))}
    assert found[inputs[0]]["prediction_type"] == "epsilon" and "prediction_type" not in found[inputs[3]]
    assert [found[path]["resembles"]["nearest"] for path in inputs] == ["a", "a", "b", "a"]
    kinds = {tuple(pair["inputs"]): pair["kind"] for pair in results["pairs"]}
    assert kinds[inputs[0], inputs[1]] == "near-identical" and kinds[inputs[0], inputs[2]] == "different"
    for line in results["duplicates"]:
        assert line in " ".join(printed.split())
    # The bare folder is the same expert, written once more; the half one is it, rounded.
    assert len(results["duplicates"]) == 3
    assert f"duplicate: {single} and {bare} have the same weights" in results["duplicates"]
    assert run(convert.main, arguments) == 2
    assert "report.json exists" in capsys.readouterr().err


def test_inspect_names_what_is_not_finite(root, single, tmp_path, capsys):
    tensors = read_tensors(single)
    name = "model.diffusion_model.out.2.bias"
    tensors[name][0] = np.inf
    write_tensors(tmp_path / "bad.safetensors", tensors, read_metadata(single))
    assert run(convert.main, ["--inspect", str(tmp_path / "bad.safetensors"), str(single)]) == 0
    printed = capsys.readouterr().out
    assert "not finite        1 tensors: conv_out.bias" in printed
    assert "relative L2" not in printed  # there is nothing to compare


def test_inspect_describes_what_cannot_be_used_and_goes_on(root, single, tmp_path, capsys):
    write_tensors(
        tmp_path / "xl.safetensors", {"conditioner.embedders.1.model.ln_final.weight": np.ones(3, np.float16)}
    )
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:-9])
    (tmp_path / "old.ckpt").write_bytes(b"")
    names = ["xl.safetensors", "cut.safetensors", "old.ckpt"]
    assert run(convert.main, ["--inspect", *(str(tmp_path / name) for name in names), str(single)]) == 2
    printed, errors = capsys.readouterr()
    assert "family            SDXL" in printed and "cannot be used" in printed
    assert printed.count("U-Net  ") == 1
    assert [line.partition(": ")[0] for line in errors.splitlines()] == ["error", "error"]
    assert "cut.safetensors: not a complete" in errors and "old.ckpt: pickled weights are refused" in errors


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA of the text encoder."""
    name, rng = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", np.random.default_rng(1)
    up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 2), (2, 8)))
    path = tmp_path / "style.safetensors"
    write_tensors(path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    return path


@pytest.mark.filterwarnings("ignore:.*nothing says what it predicts")
def test_a_lora_reaches_what_is_taken_from_the_base(root, style, tmp_path):
    write_single_file(tmp_path / "alone.safetensors", MemoryCheckpoint.of(unet=tiny.unet(1, tiny.MICRO_UNET)))
    command = [str(tmp_path / "alone.safetensors"), "--base", str(root / "base"), "--lora", str(style)]
    assert run(convert.main, [*command, "--out", str(tmp_path / "out")]) == 0
    before, after = weights(root / "base"), weights(tmp_path / "out")
    changed = [key for key in after if key.startswith("text") and not np.array_equal(before[key], after[key])]
    assert changed == ["text_encoder text_model.encoder.layers.0.self_attn.q_proj.weight"]


def test_another_dtype_is_rounded_once_after_the_loras(root, style, tmp_path):
    assert run(convert.main, [str(root / "a"), "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 0
    command = [str(tmp_path / "half"), "--lora", str(style), "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert run(convert.main, command) == 0
    changed = weights(tmp_path / "out")["text_encoder text_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(changed, changed.astype(np.float16))


def test_the_lora_is_not_replaced_by_the_model(root, style, capsys):
    command = [str(root / "a"), "--lora", f"{style}:0.5", "--out", str(style), "--overwrite"]
    assert run(convert.main, command) == 2
    assert capsys.readouterr().err == f"error: --out {style} would replace the file of --lora; choose another name\n"


def test_inputs_that_cannot_be_compared_are_named(root, tmp_path, capsys):
    save_folder(tmp_path / "wide", unet=tiny.unet(1), text_encoder=tiny.text_encoder(1))
    assert run(convert.main, ["--inspect", str(root / "a"), str(tmp_path / "wide")]) == 0
    assert "have different architectures" in " ".join(capsys.readouterr().out.split())


def test_a_place_that_cannot_be_written_to_is_one_line(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in ("file/x", "file/x.safetensors", "n" * 240 + ".safetensors"):
        assert run(convert.main, [str(root / "a"), "--out", str(tmp_path / out)]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1
