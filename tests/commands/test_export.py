"""The exports of a trained ensemble, on tiny experts: what is in them, and what the snapshot loses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import export
from afa_jax.cli.commands import load_config, run
from afa_jax.exporting.pair import CARD
from afa_jax.exporting.snapshot import block_weights
from afa_jax.exporting.written import RECIPE
from afa_jax.fusion.files import save_fusion
from afa_jax.fusion.pair_record import RECORD, WEIGHTS, aggregators_hash
from afa_jax.methods.method import Models, make_method
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.load import load_unet
from afa_jax.weights.opened import open_checkpoint, unet_blocks
from tests import tiny

MEASURED = ["--pairs=8", "--draws=2"]


def save_run(workdir: Path, experts: dict[str, Path]) -> None:
    """The pair that a run leaves, with random aggregators: their maps are far from even."""
    record = [
        dict(name=name, sha256=hash_components(open_checkpoint(path), EXPERT_COMPONENTS))
        for name, path in experts.items()
    ]
    aggregators = tiny.trained(len(experts), tiny.MICRO_UNET, tiny.PLAIN_SABW, 1)
    save_fusion(workdir, aggregators, dict(experts=record))


@pytest.fixture(scope="module")
def arguments(root: Path) -> list[str]:
    """A trained run of the three experts."""
    save_run(root / "exported", {name: root / name for name in ("a", "b", "c")})
    return ["--config", f"{root}/config.py", "--workdir", str(root / "exported")]


def recipe(path: Path) -> dict:
    return json.loads(open_checkpoint(path).metadata[RECIPE])


def test_the_pair_is_copied_and_can_be_used(root, arguments, tmp_path, capsys):
    out = tmp_path / "pair"
    assert run(export.main, [*arguments, "--pair", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {WEIGHTS, RECORD, CARD}
    for name in (WEIGHTS, RECORD):
        assert (out / name).read_bytes() == (root / "exported" / name).read_bytes()
    assert aggregators_hash(out) in capsys.readouterr().out
    make_method(dict(kind="afa"), Models(load_config(f"{root}/config.py"), out))
    assert run(export.main, [*arguments, "--pair", str(out)]) == 2
    assert "exists; choose another name, or --overwrite" in capsys.readouterr().err
    assert run(export.main, [*arguments, "--pair", str(out), "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_pair_that_does_not_belong_together_is_refused(root, arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in (WEIGHTS, RECORD):
        (tmp_path / "run" / name).write_bytes((root / "exported" / name).read_bytes())
    out = ["--config", f"{root}/config.py", "--workdir", str(tmp_path / "run"), "--pair", str(tmp_path / "out")]
    experts = [dict(name="a", path=str(root / "a")), dict(name="b", path=str(root / "b"))]
    assert run(export.main, [*out, f"--config.experts={experts}"]) == 2
    assert "was trained with the experts a, b, c, in this order; the config has a, b" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    (tmp_path / "run" / RECORD).write_text(json.dumps(record | dict(aggregators_sha256="0" * 64)))
    assert run(export.main, out) == 2
    assert "is not the file that ensemble.json beside it describes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["b.safetensors", "b"])
def test_an_expert_gets_the_bases_vae_and_schedule(root, arguments, tmp_path, out):
    assert run(export.main, [*arguments, "--bake", "b", str(tmp_path / out), "--dtype", "float16"]) == 0
    written, expert, base = (open_checkpoint(path) for path in (tmp_path / out, root / "b", root / "base"))
    for part, source in (("unet", expert), ("text_encoder", expert), ("vae", base)):
        for key, tensor in source.tensors(part).items():
            np.testing.assert_array_equal(np.asarray(written.tensors(part)[key]), np.asarray(tensor).astype(np.float16))
    assert written.config("scheduler")["beta_end"] == 0.012
    assert ("tokenizer" in written.components) == (out == "b")
    assert recipe(tmp_path / out)["made"] == "expert" and recipe(tmp_path / out)["name"] == "b"


def test_the_snapshot_is_the_average_by_the_routers_weights_and_says_what_it_loses(root, arguments, tmp_path, capsys):
    out = tmp_path / "snapshot.safetensors"
    assert run(export.main, [*arguments, "--snapshot", str(out), *MEASURED]) == 0
    printed, made = capsys.readouterr().out, recipe(out)
    assert made["aggregators_sha256"] == aggregators_hash(root / "exported") and "static approximation" in made["note"]
    assert [expert["name"] for expert in made["experts"]] == ["a", "b", "c"]
    snapshot = open_checkpoint(out)
    assert set(snapshot.components) == {"unet", "vae", "text_encoder", "scheduler"}

    # Each block is its own average.
    stages = [stage.name for stage in load_unet(root / "a").stages]
    assert list(made["weights"]) == stages  # a site after each
    weights = {site: np.asarray(own) for site, own in made["weights"].items()}
    assert max(np.ptp(own) for own in weights.values()) > 0.01  # not the uniform average
    mean = np.mean(list(weights.values()), axis=0)
    experts = [open_checkpoint(root / name) for name in ("a", "b", "c")]
    blocks = unet_blocks(root / "a")
    for part in ("unet", "text_encoder"):
        for key, tensor in snapshot.tensors(part).items():
            own = weights[blocks[key]] if blocks.get(key) in weights else mean
            expected = sum(w * np.asarray(e.tensors(part)[key]) for w, e in zip(own, experts, strict=True))
            np.testing.assert_allclose(np.asarray(tensor), expected, atol=1e-5, err_msg=key)

    # The figures are printed, and differ as they must.
    measured = made["measured"]
    best = f"expert {measured['best_expert']}"
    assert list(measured["noise_mse"]) == ["ensemble", "snapshot", "uniform average", best]
    assert list(measured["distance_to_ensemble"]) == ["snapshot", "uniform average", best]
    assert measured["pairs"] == 4 and measured["draws"] == 2
    for figures in (measured["noise_mse"], measured["distance_to_ensemble"]):
        for value in figures.values():
            assert value > 0 and f"{value:.5f}" in printed


def test_the_snapshot_of_an_ensemble_of_equal_experts_is_the_ensemble(root, tmp_path):
    """With equal experts any weights give the expert back: nothing is lost but rounding."""
    names = ("one", "two", "three")
    save_run(tmp_path / "run", dict.fromkeys(names, root / "a"))
    experts = [dict(name=name, path=str(root / "a")) for name in names]
    options = ["--config", f"{root}/config.py", f"--config.experts={experts}", "--workdir", str(tmp_path / "run")]
    assert run(export.main, [*options, "--snapshot", str(tmp_path / "out"), *MEASURED]) == 0
    measured = recipe(tmp_path / "out")["measured"]
    assert measured["distance_to_ensemble"]["snapshot"] < 1e-9
    assert measured["noise_mse"]["snapshot"] == pytest.approx(measured["noise_mse"]["ensemble"], rel=1e-5)
    snapshot, expert = load_unet(tmp_path / "out"), load_unet(root / "a")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), snapshot, expert)


def test_stages_without_a_site_take_the_nearest_ones_weights():
    stages = ["in", "down", "mid", "up", "out"]
    last = block_weights({"out": np.array([0.25, 0.75])}, stages)
    assert {name: tuple(own) for name, own in last.items()} == dict.fromkeys(
        [*stages, "time_embedding", "text_encoder"], (0.25, 0.75)
    )
    two = block_weights({"in": np.array([1.0, 0.0]), "up": np.array([0.5, 0.5])}, stages)
    assert [two[name][0] for name in stages] == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert two["time_embedding"] == [0.75, 0.25] and two["text_encoder"] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "nothing to export"),
        (["--pair", "x"], "--workdir is missing"),
        (["--bake", "d", "x"], "no expert 'd'; there are a, b, c"),
        (["--bake", "a", "x.pt"], "pickles are not written"),
        (["--bake", "a", "x.txt"], "x.txt: a model is written as safetensors, or as a folder; end it in .safetensors"),
        (["--snapshot", "x", "--workdir", "nowhere"], "nowhere: no such f"),
        (["--snapshot", "x", "--workdir", "nowhere", "--pairs=1"], "choose --pairs of 2 or more"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(root, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    assert run(export.main, ["--config", f"{root}/config.py", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_can_be_stored_in_half_precision(root, arguments, tmp_path):
    options = [*MEASURED, "--dtype=bfloat16"]
    assert run(export.main, [*arguments, "--snapshot", str(tmp_path / "out"), *options]) == 0
    assert {t.dtype for t in open_checkpoint(tmp_path / "out").tensors("unet").values()} == {jnp.dtype("bfloat16")}
