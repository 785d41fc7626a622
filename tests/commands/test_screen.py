"""The routing screen as a user runs it, on tiny experts: tables, verdict, exit status, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax import screen, train
from afa_jax.cli.commands import load_config, run
from afa_jax.data.emoji.scenes import UNSEEN, SceneSource
from afa_jax.data.held_out import by_hash, choose_pairs, unseen
from afa_jax.data.sources import BadExample, make_source
from afa_jax.errors import InputError
from afa_jax.evaluation import screening
from afa_jax.evaluation.screen import GainEstimate, RoutingGain
from afa_jax.models.configs import UNetConfig
from afa_jax.weights.formats.folders import save_folder
from tests import tiny

SMALL = ["--pairs=8", "--draws=2"]


@pytest.fixture
def experts(root: Path) -> Callable[..., list[str]]:
    """Folders of two experts that a test may change, and the option that names them."""

    def choose(**folders: Path) -> list[str]:
        chosen = [dict(name=name, path=str(folder)) for name, folder in folders.items()]
        return ["--config", f"{root}/config.py", *SMALL, f"--config.experts={chosen}"]

    return choose


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.rstrip("\n").splitlines()[-1]


def test_the_figures_the_tables_and_the_verdict_agree(root, tmp_path, capsys):
    arguments = ["--config", f"{root}/config.py", *SMALL, "--out"]
    status = run(screen.main, [*arguments, str(tmp_path / "new" / "screen.json")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "screen.json").read_text())
    assert status == (3 if results["answer"] == "no" else 0)
    assert printed.rstrip().splitlines()[-1] == f"verdict: {results['verdict']}"
    total = results["routing"]["total"]
    assert total["low"] <= total["gain"] <= total["high"]
    single = total["mse"]["single"]
    assert min(single, key=single.get) == results["routing"]["best_single"]
    assert total["gain"] == pytest.approx(1 - total["mse"]["routed"] / min(single.values()))
    assert len(results["routing"]["buckets"]) == screening.BUCKETS
    for row in (total, *results["routing"]["buckets"]):
        assert sum(row["share"].values()) == pytest.approx(1)
        assert f"{row['mse']['routed']:.4f}" in printed
    assert [tuple(pair["experts"]) for pair in results["weights"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {pair["kind"] for pair in results["weights"]} == {"different"}
    assert all(f"{pair['total']:.5f}" in printed for pair in results["weights"])
    assert results["mismatches"] == [] and printed.count("fits") == 3
    # Again, it is the same; and it replaces nothing.
    run(screen.main, [*arguments, str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == results
    assert run(screen.main, [*arguments, str(tmp_path / "again.json")]) == 2
    assert "again.json exists; choose another name, or remove it" in capsys.readouterr().err


def test_one_file_under_two_names_is_found(root, tmp_path, experts, capsys):
    shutil.copytree(root / "a", tmp_path / "copy")
    arguments = experts(a=root / "a", b=root / "b", copy=tmp_path / "copy")
    assert run(screen.main, [*arguments, "--out", str(tmp_path / "screen.json")]) == 3
    assert last_line(capsys).startswith("verdict: not worth training: experts 'a' and 'copy' have the same weights")
    results = json.loads((tmp_path / "screen.json").read_text())
    pairs = {tuple(pair["experts"]): pair for pair in results["weights"]}
    assert pairs["a", "copy"]["kind"] == "identical" and pairs["a", "copy"]["total"] == 0
    assert pairs["a", "b"]["kind"] == "different"
    assert results["routing"] is None and results["answer"] == "no"


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(jnp.float32, "have the same weights"), (jnp.float16, "are near-identical (weights differ by")],
)
def test_one_model_in_two_files_is_found(root, tmp_path, experts, capsys, dtype, found):
    save_folder(
        tmp_path / "copy",
        unet=tiny.unet(1, tiny.MICRO_UNET),
        text_encoder=tiny.text_encoder(1),
        dtype=dtype,
        metadata=dict(by="me"),
    )
    assert run(screen.main, experts(a=root / "a", copy=tmp_path / "copy")) == 3
    assert f"experts 'a' and 'copy' {found}" in last_line(capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(prediction_type="v_prediction"), "was trained with prediction_type 'v_prediction'"),
        (dict(beta_end=0.02), "was trained with beta_end 0.02"),
        (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True is not supported"),
    ],
)
def test_another_noise_schedule_is_a_row_for_the_screen_and_an_error_for_training(
    root, tmp_path, experts, capsys, changed, message
):
    shutil.copytree(root / "b", tmp_path / "other")
    path = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    arguments = experts(a=root / "a", other=tmp_path / "other")
    assert run(screen.main, arguments) == 3
    printed = capsys.readouterr().out
    assert "  a                     fits\n" in printed
    assert "expert 'other'" in printed and message in printed
    assert printed.splitlines()[-1].startswith("verdict: not worth training: expert 'other'")
    assert "different" in printed  # the weights are compared all the same
    training = [argument for argument in arguments if argument not in SMALL]
    assert run(train.main, [*training, "--workdir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_every_mismatch_is_listed(root, tmp_path, experts, capsys):
    wide = UNetConfig(**{**vars(tiny.MICRO_UNET), "layers_per_block": 2})
    save_folder(
        tmp_path / "odd",
        unet=tiny.unet(9, wide),
        text_encoder=tiny.text_encoder(9),
        scheduler=dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type="sample"),
    )
    assert run(screen.main, experts(a=root / "a", odd=tmp_path / "odd", b=root / "b")) == 3
    printed = capsys.readouterr().out
    for what in ("prediction_type 'sample'", "beta_schedule 'linear'", "layers_per_block is 1 and 2"):
        assert what in printed
    assert printed.count("fits") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs=7"], "choose --pairs of 8 or more"),
        (["--draws=1"], "--draws of 2 or more"),
        (["--seed=-1"], "--seed: -1: write a whole number from 0"),
        (["--pairs=many"], "--pairs: many: write a whole number"),
        (["--config.data.length=5", *SMALL], "--pairs 8: the data has only 5 examples"),
        (["--config.data.kind=magic", *SMALL], "data.kind='magic'"),
        (["--config.base=../nowhere"], "../nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(screen.main, ["--config", f"{root}/config.py", "--out", "screen.json", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_expert_and_an_expert_without_weights_are_refused(root, tmp_path, experts, capsys):
    assert run(screen.main, experts(a=root / "a")) == 2
    assert "'a' is the only expert; routing needs two or more" in capsys.readouterr().err
    shutil.copytree(root / "b", tmp_path / "b")
    (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert run(screen.main, experts(a=root / "a", b=tmp_path / "b")) == 2
    assert "b/unet/diffusion_pytorch_model.safetensors: no such file" in capsys.readouterr().err


def chosen(data, count, seed):
    return choose_pairs(unseen(make_source(data)), None, count, seed)


def test_emoji_pairs_are_scenes_that_nothing_trains_on(root):
    data = load_config(f"{root}/config.py").data
    pictures, captions = chosen(data, 8, seed=0)
    unseen = SceneSource(seed=UNSEEN, length=data.length)
    order = list(by_hash(data.length, 0))
    assert captions == [unseen[index]["caption"] for index in order[:8]]
    np.testing.assert_array_equal(pictures, [unseen[index]["image"] for index in order[:8]])
    assert captions != chosen(data, 8, seed=1)[1]


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_the_hash_chooses_every_example_once(length):
    order = list(by_hash(length, 3))
    assert sorted(order) == list(range(length))
    assert length == 1 or order != sorted(order)


def test_an_example_that_cannot_be_read_is_named_and_replaced(root, monkeypatch):
    data = load_config(f"{root}/config.py").data

    class Damaged(list):
        fingerprint = "damaged"

        def name(self, index):
            return f"{index}.png"

        def __getitem__(self, index):
            if index % 2:
                raise BadExample(f"{index}.png", "not a readable picture")
            return dict(image=np.full((8, 8, 3), index, np.uint8), caption=str(index))

    monkeypatch.setitem(globals(), "make_source", lambda config: Damaged(range(20)))
    with pytest.warns(UserWarning, match=r"left out: \d*[13579].png: not a readable picture"):
        pictures, captions = chosen(data, 8, seed=0)
    assert [int(caption) for caption in captions] == pictures[:, 0, 0, 0].tolist()
    assert len(set(captions)) == 8
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match="only 10 examples"):
        chosen(data, 11, seed=0)


@pytest.mark.parametrize(
    ("estimate", "status", "verdict"),
    [
        (GainEstimate(0.051, 0.042, 0.06), 0, "routing is worth training (gain 5.1 %, 95 % interval 4.2 to 6.0 %)"),
        (
            GainEstimate(0.003, -0.0004, 0.01),
            3,
            "not worth training: gain 0.3 %, 95 % interval 0.0 to 1.0 %, below 2 %",
        ),
        (
            GainEstimate(0.025, 0.01, 0.04),
            0,
            "undecided: gain 2.5 %, 95 % interval 1.0 to 4.0 %, on both sides of 2 %; give more --pairs than 8",
        ),
    ],
)
def test_the_three_verdicts(root, monkeypatch, capsys, estimate, status, verdict):
    buckets = np.ones(screening.BUCKETS)
    gain = RoutingGain(
        total=estimate,
        buckets=(estimate,) * screening.BUCKETS,
        best=0,
        routed=buckets,
        single=np.stack([buckets] * 3),
        share=np.stack([buckets / 3] * 3),
    )
    monkeypatch.setattr(screening, "measure", lambda *arguments: gain)
    assert run(screen.main, ["--config", f"{root}/config.py", *SMALL]) == status
    assert last_line(capsys) == f"verdict: {verdict}"
