"""The trainer with each rival that is trained: run, resumed, published; block weights as an ordinary checkpoint."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from afa_jax import merge
from afa_jax import train as command
from afa_jax.cli.commands import load_config, run
from afa_jax.experts.frozen import load_experts, with_fusion
from afa_jax.exporting.written import RECIPE
from afa_jax.fusion.files import load_fusion, save_fusion
from afa_jax.fusion.pair_record import WEIGHTS
from afa_jax.fusion.registry import fusion_config, init_fusion
from afa_jax.fusion.rivals.block_weights import MergedUNet
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.map_pictures import contact_sheet
from afa_jax.training.workdir import read_metrics
from afa_jax.trees import flatten
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import read_tensors
from tests import tiny

FUSIONS = dict(
    gate='dict(kind="gate", hidden=8)',
    router='dict(kind="router", block_out_channels=(8,), heads=2, norm_num_groups=4)',
    ladder='dict(kind="ladder", block_out_channels=(8,), heads=2, norm_num_groups=4, residual=True, gates=True)',
    mbw='dict(kind="mbw")',
)
OPTIONS = SampleOptions(size=(32, 64), steps=2, guidance=2.0)
SITES = dict(gate=5, router=1, ladder=1, mbw=6)


def train(root, kind, workdir, *options):
    text = (root / "config.py").read_text().replace("sabw=dict(", f"fusion={FUSIONS[kind]}, sabw=dict(", 1)
    (root / f"{kind}.py").write_text(text)
    arguments = ["--config", str(root / f"{kind}.py"), "--workdir", str(workdir), "--quiet", *options]
    return run(command.main, arguments)


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_rival_is_trained(kind, root, tmp_path, capsys):
    experts = [dict(name=name, path=str(root / name)) for name in "ab"]
    options = ["--config.train.steps=4", "--config.validation.every=4", f"--config.experts={experts}"]
    options.append("--config.train.optimizer.weight_decay=0.0")  # which alone would change a parameter
    if kind != "mbw":  # whose pictures need other experts than it was given; of the others they cost a compilation
        options.append("--config.validation.prompts=()")
    assert train(root, kind, tmp_path / "run", *options) == 0
    assert f"({kind})" in capsys.readouterr().out
    one = {name: np.array(tensor) for name, tensor in read_tensors(tmp_path / "run" / WEIGHTS).items()}
    if kind == "gate":  # resumed bit for bit, by the loop that all of them share
        (tmp_path / "run" / WEIGHTS).unlink()
        assert train(root, kind, tmp_path / "run", *options, "--resume_step=2") == 0
        other = read_tensors(tmp_path / "run" / WEIGHTS)
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)

    record = json.loads((tmp_path / "run" / "ensemble.json").read_text())
    assert record["fusion"]["kind"] == kind and "sabw" not in record
    lines = read_metrics(tmp_path / "run")
    # At first all are trusted alike.
    first, *_, last = (np.array([line[name] for name in ("weight_0", "weight_1")]) for line in lines if "loss" in line)
    np.testing.assert_allclose([*first, lines[0]["entropy"]], [0.5, 0.5, 1], rtol=1e-5)
    assert np.abs(last - 0.5).max() > 1e-5
    (validated,) = [line for line in lines if "val_loss" in line]
    np.testing.assert_allclose(sum(validated[f"val_weight_{name}"] for name in "ab"), 1, rtol=1e-5)
    line = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    assert len(line["weights"]) == SITES[kind]
    if kind == "mbw":
        with Image.open(tmp_path / "run" / "samples" / "step_00000004.png") as picture:
            assert picture.size == (64, 32)
    config = load_config(str(root / "config.py"))
    config.experts = experts
    loaded = load_experts(config)
    fusion = load_fusion(tmp_path / "run", loaded.unet, 2)
    untrained = flatten(init_fusion(fusion.config, loaded.unet, 2, config.train.seed))
    assert not [name for name, array in flatten(fusion).items() if (array == untrained[name]).all()]
    denoiser, ready = with_fusion(fusion, loaded)
    assert (ready.unet is loaded.unet) == (kind != "mbw")
    assert len(jax.tree.leaves(denoiser.experts)[0]) == (1 if kind == "mbw" else 2)


def test_learned_block_weights_are_an_ordinary_checkpoint(root, tmp_path, capsys):
    """What is trained and sampled is what merge writes and the method learned_mbw loads, whose maps are the weights."""
    config_flag = f"--config={root}/config.py"
    config = load_config(str(root / "config.py"))
    experts = load_experts(config)
    fusion = tiny.randomised(init_fusion(fusion_config("mbw", {}), experts.unet, 3, 0), 2)
    save_fusion(tmp_path / "run", fusion, dict(experts=experts.record))
    assert run(merge.main, [config_flag, f"--method=learned_mbw,workdir={tmp_path}/run", f"--out={tmp_path}/m"]) == 0
    merged = open_checkpoint(tmp_path / "m")
    weights = json.loads(merged.metadata[RECIPE])["options"]["weights"]
    shares = np.array([[weights[block][name] for name in "abc"] for block in ("IN00", "M00", "BASE")])
    assert np.ptp(shares, 0).min() > 0.001
    np.testing.assert_allclose(shares.sum(1), 1)
    _, ready = with_fusion(fusion, experts)
    for network, loaded in ((ready.unet, load_unet(merged)), (ready.text_encoder, load_text_encoder(merged))):
        expected = flatten(loaded)
        for name, array in flatten(network).items():
            np.testing.assert_allclose(array[0], expected[name], atol=1e-6, rtol=1e-5, err_msg=name)
    method = make_method(dict(kind="learned_mbw", workdir=str(tmp_path / "run")), Models(config))
    expected = flatten(load_unet(merged))
    for name, array in flatten(method.experts.unet).items():
        np.testing.assert_array_equal(array[0], expected[name], err_msg=name)
    assert isinstance(method.denoiser, MergedUNet)
    np.testing.assert_allclose(method.denoiser.weights, fusion.weights(), atol=1e-6)
    assert method.recipe is not None and " --config " in method.recipe and "--workdir run" in method.recipe
    kept = [np.full((2, 3, 1, 1), 1 / 3, np.float32) for _ in method.denoiser.weights]  # as sample keeps them
    assert contact_sheet(kept, method.sites, [501, 1]).width > 1
    assert len(method.sites) == 6 and method.sites[-1] == "base" and method.evaluations(OPTIONS) == 4

    # Of another kind of run, or of other experts, it says so.
    capsys.readouterr()
    for wrong, message in (("", "name the run"), (",workdir=nowhere", "nowhere: no such file or folder")):
        assert run(merge.main, [config_flag, f"--method=learned_mbw{wrong}", f"--out={tmp_path}/n"]) == 2
        assert message in capsys.readouterr().err
    save_fusion(tmp_path / "run", fusion, dict(experts=[*experts.record[:2], dict(name="c", sha256="0" * 64)]))
    assert run(merge.main, [config_flag, f"--method=learned_mbw,workdir={tmp_path}/run", f"--out={tmp_path}/n"]) == 2
    assert "was trained with another expert 'c'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mbw", ["--config.cache.path=somewhere"], "leave it empty"),
        ("router", ["--config.train.remat=fused"], "train.remat=fused: it has no effect with fusion.kind=router"),
        ("gate", ["--config.fusion.kind=door"], "fusion.kind='door': expected one of"),
        ("gate", ["--config.fusion.kind=afa"], "fusion.hidden: AFA's options are in sabw"),
        ("router", ["--config.fusion.block_out_channels=(8,8)"], "choose 1 to 1, as the experts have"),
    ],
)
def test_what_a_rival_cannot_use_stops_the_run_first(kind, options, message, root, tmp_path, capsys):
    assert train(root, kind, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
