"""Experts as configs and command lines name them: any container, LoRAs baked in, one stack out."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from afa_jax import sample
from afa_jax.cli.commands import run
from afa_jax.errors import InputError
from afa_jax.experts.checks import mismatches
from afa_jax.experts.frozen import load_experts
from afa_jax.experts.sources import find_checkpoints, parse_expert
from afa_jax.experts.specs import parse_argument
from afa_jax.trees import flatten
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats.folders import save_folder, write_folder
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import write_tensors
from tests import tiny
from tests.commands.conftest import CONFIG, TOKENIZER

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon")


def model(seed: int, **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = dict(unet=tiny.unet(seed, tiny.MICRO_UNET), text_encoder=tiny.text_encoder(seed))
    return own | dict(vae=tiny.vae(0), scheduler=SCHEDULE) | changes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts as folders, as single files, one U-Net alone, and a LoRA."""
    root = tmp_path_factory.mktemp("files")
    save_folder(root / "base", **model(0), tokenizer=TOKENIZER)
    for seed, name in ((1, "a"), (2, "b")):
        save_folder(root / name, **model(seed))
        write_single_file(root / f"{name}.safetensors", open_checkpoint(root / name))
    write_single_file(root / "base.safetensors", open_checkpoint(root / "base"))
    alone = MemoryCheckpoint.of(unet=tiny.unet(1, tiny.MICRO_UNET), scheduler=SCHEDULE)
    write_single_file(root / "alone.safetensors", alone)
    rng, name = np.random.default_rng(0), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 2), (2, 8)))
    write_tensors(root / "lora.safetensors", {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


def experts(files: Path, *entries: dict[str, Any], base: Any = None) -> Any:
    return load_experts(ConfigDict(dict(base=base or str(files / "base"), experts=list(entries))))


def same(one: Any, other: Any) -> bool:
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_every_container_gives_the_same_experts(files):
    folders = experts(files, dict(name="a", path=f"{files}/a"), dict(name="b", path=f"{files}/b"))
    single = experts(
        files, dict(name="a", path=f"{files}/a.safetensors"), dict(name="b", path=f"{files}/b.safetensors")
    )
    assert same((folders.unet, folders.text_encoder), (single.unet, single.text_encoder))
    for i, seed in enumerate((1, 2)):
        assert same(jax.tree.map(lambda x, i=i: x[i], folders.unet), tiny.unet(seed, tiny.MICRO_UNET))
    assert folders.names == ("a", "b") and folders.hashes == single.hashes and len({*single.hashes}) == 2


def test_one_file_twice_is_two_experts_when_a_lora_tells_them_apart(files):
    entry = dict(name="a", path=f"{files}/a.safetensors")
    both = experts(files, entry, dict(entry, name="styled", loras=[(f"{files}/lora.safetensors", 0.5)]))
    plain, styled = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), both.unet) for i in range(2))
    changed = [name for name, array in flatten(plain).items() if not np.array_equal(array, flatten(styled)[name])]
    assert len(changed) == 1 and "attn1.to_q" in changed[0]
    assert both.hashes[0] != both.hashes[1]


def test_a_dtype_rounds_what_the_loras_left(files):
    entry = dict(name="a", path=f"{files}/a", loras=[(f"{files}/lora.safetensors", 0.5)])
    exact, rounded = (experts(files, dict(entry, **more)).unet for more in ({}, dict(dtype="bfloat16")))
    assert same(jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), exact), rounded)


def test_an_expert_without_a_text_encoder_takes_the_bases(files):
    with pytest.warns(UserWarning, match="expert 'alone' has no text encoder; it takes the base model's"):
        alone = experts(files, dict(name="alone", path=f"{files}/alone.safetensors"))
    assert same(jax.tree.map(lambda x: x[0], alone.text_encoder), tiny.text_encoder(0))
    assert same(jax.tree.map(lambda x: x[0], alone.unet), tiny.unet(1, tiny.MICRO_UNET))


def test_a_lora_reaches_a_text_encoder_that_is_the_bases(files, tmp_path):
    name, rng = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", np.random.default_rng(1)
    up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 2), (2, 8)))
    write_tensors(tmp_path / "te.safetensors", {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    entry = dict(name="alone", path=f"{files}/alone.safetensors", loras=[(f"{tmp_path}/te.safetensors", 1.0)])
    with pytest.warns(UserWarning, match="it takes the base model's"):
        alone = experts(files, entry)
    found, plain = flatten(jax.tree.map(lambda x: x[0], alone.text_encoder)), flatten(tiny.text_encoder(0))
    assert sum(not np.array_equal(found[key], plain[key]) for key in plain) == 1


def test_text_states_that_the_unet_does_not_take_are_refused(files, tmp_path):
    wide = dataclasses.replace(tiny.MICRO_UNET, cross_attention_dim=16)
    write_single_file(tmp_path / "wide.safetensors", MemoryCheckpoint.of(**model(3, unet=tiny.unet(3, wide))))
    with pytest.raises(InputError, match="expert 'wide': text states are 8 wide, its U-Net takes 16"):
        experts(files, dict(name="wide", path=f"{tmp_path}/wide.safetensors"))


def test_a_base_that_lacks_something_is_named(files, tmp_path):
    entry = dict(name="a", path=f"{files}/a")
    save_folder(tmp_path / "base", unet=tiny.unet(0, tiny.MICRO_UNET), tokenizer=TOKENIZER, scheduler=SCHEDULE)
    with pytest.raises(InputError, match=r"base: .*base has no VAE; take a base model that has one"):
        experts(files, entry, base=f"{tmp_path}/base")
    with pytest.raises(InputError, match=r"base is 5; write a path, or dict\(path=\.\.\.\)"):
        experts(files, entry, base=5)


def test_a_base_that_is_a_single_file_needs_a_tokenizer(files):
    entry = dict(name="a", path=f"{files}/a")
    with pytest.raises(
        InputError, match=r"base\.safetensors has no tokenizer; name one, base=dict\(path=\.\.\., token"
    ):
        experts(files, entry, base=f"{files}/base.safetensors")
    for tokenizer in (TOKENIZER, files / "base"):
        base = dict(path=f"{files}/base.safetensors", tokenizer=str(tokenizer))
        found = experts(files, entry, base=base)
        assert same(found.vae, tiny.vae(0)) and found.tokenizer(["octopus"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(path="x"), "an expert: the field name is missing"),
        (dict(name="a"), "expert 'a': the field path is missing"),
        ("models/x", r"an expert is 'models/x'; write dict\(name=\.\.\., path=\.\.\.\)"),
        (dict(name="a", path="x", lora="y"), "expert 'a': no such field lora; there are path, "),
        (dict(name="a", path="x", loras="y"), r"expert 'a': loras='y'; write a list of \(path, weight\)"),
        (dict(name="a", path="x", dtype="int8"), "expert 'a': dtype='int8'; choose float32, float16, bfloat16"),
        (dict(name="a", path="x", ema="yes"), "expert 'a': ema='yes'; expected bool"),
        (dict(name="a", path="x", prediction_type="v"), "expert 'a': prediction_type='v'; choose epsilon, "),
    ],
)
def test_a_wrong_entry_is_named(entry, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse_expert(entry)


def test_the_command_line_says_what_an_entry_says():
    assert parse_argument("a=b/c@main,lora=x.safetensors:0.5,lora=y:-1,lora=z,dtype=float16,ema=true") == dict(
        name="a",
        path="b/c@main",
        loras=[("x.safetensors", 0.5), ("y", -1.0), ("z", 1.0)],
        dtype="float16",
        ema=True,
    )
    assert parse_argument("a=b,ema=FALSE") == dict(name="a", path="b", ema=False)
    for wrong in (
        "a",
        "a=",
        "=b",
        "a=b,lora",
        "a=b,lora=x:much",
        "a=b,lora=x:nan",
        "a=b,loras=x",
        "a=b,ema=yes",
        "a=b,c",
    ):
        with pytest.raises(InputError, match=r"^(--expert a?=?|LoRA x:(much|nan): )"):
            parse_argument(wrong)
    for wrong in ("a=b,dtype=float16,dtype=float32",):
        with pytest.raises(InputError, match=r"is there twice"):
            parse_argument(wrong)


def test_experts_from_the_command_line(files, tmp_path, capsys):
    def pictures(*arguments: str) -> bytes:
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        command = ["--config", f"{files}/config.py", "--prompt", "octopus", "--steps", "2", *arguments]
        assert run(sample.main, [*command, "--out", str(out)]) == 0, capsys.readouterr().err
        (picture,) = (path for path in out.glob("*.png") if "grid" not in path.name)
        return picture.read_bytes()

    named = ["--expert", f"one={files}/a.safetensors", "--expert", f"two={files}/b,lora={files}/lora.safetensors:2"]
    assert pictures("--method", "uniform", *named) != pictures("--method", "expert:two", *named)
    capsys.readouterr()
    command = ["--config", f"{files}/config.py", "--prompt", "octopus", "--out", f"{tmp_path}/none"]
    assert run(sample.main, [*command, "--expert", "odd"]) == 2
    assert capsys.readouterr().err.startswith("error: --expert odd: write NAME=PATH, ")


def test_experts_that_do_not_fit_are_refused(files, tmp_path):
    wide = dataclasses.replace(tiny.MICRO_UNET, in_channels=9)
    write_single_file(tmp_path / "wide.safetensors", MemoryCheckpoint.of(**model(3, unet=tiny.unet(3, wide))))
    other = dict(SCHEDULE, prediction_type="v_prediction")
    write_folder(tmp_path / "v", MemoryCheckpoint.of(**model(4, scheduler=other)))
    late = dict(SCHEDULE, beta_end=0.02)
    write_folder(tmp_path / "late", MemoryCheckpoint.of(**model(4, scheduler=late)))
    for name, message in {
        "wide.safetensors": "inpainting",
        "v": "prediction_type 'v_prediction', the base model with 'epsilon'",
        "late": "beta_end 0.02, the base model with 0.012",
    }.items():
        entries = [dict(name="a", path=f"{files}/a"), dict(name="odd", path=f"{tmp_path}/{name}")]
        base, found = find_checkpoints(str(files / "base"), entries)
        assert any(message in mismatch.message for mismatch in mismatches(base, found)), name
        with pytest.raises(InputError):
            experts(files, *entries)
