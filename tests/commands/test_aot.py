"""The check ahead of time, end to end on a tiny config; for a TPU where its compiler is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from afa_jax.aot import main
from afa_jax.cli.commands import load_config, run
from afa_jax.scale import abstract, chips
from afa_jax.scale.abstract import KNOWN, Architecture, architecture_of
from afa_jax.scale.memory import arguments_of
from afa_jax.training.run import configured_fusion
from tests import tiny


@pytest.fixture(scope="module")
def config_file(root: Path) -> Path:
    """The tiny config with a mesh of all devices."""
    text = (root / "config.py").read_text()
    path = root / "on_a_mesh.py"
    path.write_text(text.replace('name="tiny",', 'name="tiny", mesh=dict(data=-1, fsdp=1, expert=1),'))
    return path


def aot(config_file: Path, *arguments: str) -> int:
    return main(["--config", str(config_file), *arguments])


def chip_with(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU device pass for a chip of so much memory."""
    chip = dataclasses.replace(chips.CHIPS["v5e"], name="small", kind="cpu", memory=memory)
    monkeypatch.setitem(chips.CHIPS, "small", chip)


def test_a_training_step_that_does_not_fit(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny config's: three experts on three devices, two rows on two; with room for a few arguments too few."""
    config = load_config(str(config_file), ["mesh.expert=3", "sabw.sites=last"])
    fusing = configured_fusion(config)
    target = abstract.target_of(config, fusing, jax.devices()[:6], "train")
    call = abstract.training_step(config, fusing, architecture_of(config), target)
    held = arguments_of(call.arguments)
    assert call.beside == {}  # without a cache the step has use for all networks
    last = "--config.sabw.sites=last"
    arguments, facts = ("--devices", "6", "--config.mesh.expert=3", last, "--json"), tmp_path / "facts.json"

    chip_with(held - 1, monkeypatch)
    assert aot(config_file, *arguments, str(facts)) == 1
    first, said = capsys.readouterr().out.splitlines()  # it was not compiled
    assert first == "train: 3 experts on 6 devices (cpu), mesh data=2, fsdp=1, expert=3"
    assert said.startswith(f"does not fit: {held / 2**20:.2f} MiB of ") and "--config.mesh.fsdp=2" in said
    assert json.loads(facts.read_text()) | dict(fits=False, needed=held) == json.loads(facts.read_text())

    chip_with(held + 10, monkeypatch)
    assert aot(config_file, *arguments, str(facts)) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("does not fit: ") and "--config.train.remat=fused" in printed[-1]
    assert any(line.startswith("lower bounds of the time, not estimates: compute ") for line in printed)
    read = json.loads(facts.read_text())
    # The VAE's decoder is not used, but it is there.
    assert read["memory"]["arguments"] + read["beside"] == read["held"] == held and read["beside"] > 0
    assert read["flops"]["exact"] and read["flops"]["products"] > 10**6
    kinds = {(total["axes"], total["kind"]): total for total in read["totals"]}
    # The gradient of the parameters, float32, once; of a few the compiler sees that it is zero.
    sabw = dataclasses.replace(tiny.PLAIN_SABW, sites="last")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny.aggregators(3, tiny.MICRO_UNET, sabw)))
    assert 0.99 < kinds["data+expert", "all-reduce"]["bytes"] / (4 * parameters) < 1.05
    assert ("expert", "reduce-scatter") in kinds and ("expert", "all-gather") in kinds
    assert "other" not in {axes for axes, _ in kinds}


def test_the_sampler_on_two_devices(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six experts on both, the rows split: only pictures are exchanged, which all devices get."""
    facts = tmp_path / "facts.json"
    assert aot(config_file, "--mode", "sample", "--devices", "2", "--experts", "6", "--json", str(facts)) == 0
    assert "sample: 6 experts on 2 devices (cpu)" in capsys.readouterr().out
    totals = json.loads(facts.read_text())["totals"]
    (total,) = totals
    assert (total["axes"], total["kind"], total["bytes"]) == (
        "data",
        "all-gather",
        4 * (32 * 64 * 3 + 2),
    )  # and whether each is finite


def test_the_architecture_is_read_from_configs_alone(config_file: Path, tmp_path: Path) -> None:
    """Weights that are not there are not missed; those of six experts are only counted."""
    config = load_config(str(config_file))
    read = architecture_of(config)
    assert (read.unet.block_out_channels, read.vae, read.text_encoder) == ((8,), tiny.VAE_CONFIG, tiny.TEXT)
    assert KNOWN["sd15"] == Architecture()
    fusing = configured_fusion(config)
    with config.unlocked():
        config.experts = [dict(config.experts[0], name=str(i)) for i in range(6)]
    target = abstract.target_of(config, fusing, jax.devices()[:4], "sample")
    denoiser, *_ = abstract.sampler(config, fusing, read, target).arguments
    assert {leaf.shape[0] for leaf in jax.tree.leaves(denoiser.experts)} == {6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "0"), "--devices: 0: write a whole number from 1"),
        (("--devices", "2", "--slices", "2"), "--slices goes with --topology"),
        (("--devices", "2", "--architecture", "sdxl"), "argument --architecture: invalid choice: 'sdxl' (choose from"),
        (("--devices", "4096"), "--devices 4096: "),
        (("--devices", "2", "--expert", "a=missing"), "or --architecture sd15, which needs no files"),
        (("--devices", "4", "--config.mesh.expert=4"), "mesh data=-1, fsdp=1, expert=4 does not fit"),
        (("--topology", "v5e"), "--topology v5e: write GENERATION:CHIPSxCHIPS"),
        (("--mode", "train"), "one of the arguments --topology --devices is required"),
    ],
)
def test_wrong_input_is_one_line(
    config_file: Path, arguments: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, ["--config", str(config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -r requirements-aot.txt")
@pytest.mark.parametrize("mode", ["train", "sample"])
def test_for_a_tpu_that_is_not_there(
    config_file: Path, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.json"
    arguments = ("--topology", "v5e:2x2", "--mode", mode, "--quick", "--config.train.batch=4")
    assert aot(config_file, *arguments, "--json", str(facts)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{mode}: 3 experts on 4 devices (TPU v5 lite), mesh data=4, fsdp=1, expert=1"
    assert lines[-1].startswith("fits: ") and lines[-1].endswith(" of 15.75 GiB")
    read = json.loads(facts.read_text())
    assert read["flops"]["exact"] and not read["flops"]["unknown"]
    assert read["bounds"].keys() == {"compute", "memory", "exchange"}
    assert {total["axes"] for total in read["totals"]} == {"data"}
