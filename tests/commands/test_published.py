"""From files as users have them to a pair that a stranger samples; and no word of the machine that made it."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from afa_jax import convert, evaluate, export, merge, new_config, sample, screen, train
from afa_jax.cli.commands import run
from afa_jax.exporting.model_card import METHODS, model_card, part_of
from afa_jax.exporting.pair import CARD, CONFIG, SAMPLES
from afa_jax.fusion.pair_record import RECORD, WEIGHTS, aggregators_hash
from afa_jax.report.__main__ import main as write_report
from afa_jax.weights.tensors import write_tensors
from tests.commands.conftest import TOKENIZER, says_nothing_of

NAME = "machine-of-the-trainer"
PROMPT = "octopus, noto style"


@pytest.fixture(scope="module")
def home(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of someone who has single files, LoRAs and captioned pictures, and a config of them."""
    home = tmp_path_factory.mktemp(NAME)
    for name in ("base", "a", "b"):
        arguments = [str(root / name), "--out", str(home / f"{name}.safetensors")]
        assert run(convert.main, arguments) == 0
    shutil.copytree(root / "c", home / "c")
    shutil.copytree(TOKENIZER, home / "words")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    lora = {f"{layer}.lora_A.weight": (2, 8), f"{layer}.lora_B.weight": (8, 2)}
    write_tensors(home / "film.safetensors", {key: rng.normal(size=shape).astype("f4") for key, shape in lora.items()})
    (home / "pictures").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (32, 64, 3), np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{number}.png")
        (home / "pictures" / f"{number}.txt").write_text(PROMPT)
    text = (root / "config.py").read_text().replace(f'"{root}/base"', "BASE")
    text = re.sub(r"experts=\[.*\],\n", "experts=EXPERTS,\n", text)
    text = text.replace('data=dict(kind="emoji", seed=0, length=64)', "data=DATA")
    experts = [
        dict(name="photo", path=f"{home}/a.safetensors"),
        dict(name="film | x", path=f"{home}/b.safetensors", loras=[(f"{home}/film.safetensors", 0.5)]),
        dict(name="folder", path=f"{home}/c", dtype="float16"),
    ]
    data = dict(kind="folder", path=f"{home}/pictures", size=(32, 64), flip=False, bad="error", workers=0)
    base = dict(path=f"{home}/base.safetensors", tokenizer=f"{home}/words")
    (home / "config.py").write_text(f"BASE = {base!r}\nEXPERTS = {experts!r}\nDATA = {data!r}\n{text}")
    return home


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """Two steps with validation and its samples."""
    options = ["--config.validation.every=2", "--config.train.steps=2", "--config.sabw.sites=last", "--quiet"]
    assert run(train.main, ["--config", f"{home}/config.py", "--workdir", f"{home}/run", *options]) == 0
    return home / "run"


@pytest.fixture(scope="module")
def pair(home: Path, trained: Path) -> Path:
    options = ["--config", f"{home}/config.py", "--workdir", str(trained), "--with_config", "--license", "mit"]
    assert run(export.main, [*options, "--pair", f"{home}/pair"]) == 0
    return home / "pair"


def test_what_is_written_says_nothing_of_the_machine(home, trained, pair):
    config, out = ["--config", f"{home}/config.py"], home / "out"
    sampled = ["--workdir", str(trained), "--prompt", PROMPT, "--out", str(out / "pictures"), "--maps"]
    assert run(sample.main, [*config, *sampled]) == 0
    for method, name in (("average", "merged"), ("average", "merged.safetensors")):
        assert run(merge.main, [*config, "--method", method, "--out", str(out / name)]) == 0
    assert run(export.main, [*config, "--bake", "film | x", str(out / "film.safetensors")]) == 0
    assert run(write_report, ["--workdir", str(trained), "--out", str(out / "page.html")]) == 0
    for place in (trained, pair, out):
        assert says_nothing_of(NAME, place) > 1


def test_the_record_is_whole(home, trained, pair):
    record = json.loads((pair / RECORD).read_text())
    assert record["base"] == dict(path="base.safetensors", tokenizer="words")
    training = record["training"]
    assert training["config"]["experts"][1]["loras"] == [["film.safetensors", 0.5]]
    assert training["config"]["data"]["path"] == "pictures"
    assert training["arguments"][:2] == ["--config", "config.py"] and training["steps"] == 2
    assert record == json.loads((trained / RECORD).read_text())


def test_a_stranger_samples_the_pair_by_the_words_of_its_card(home, trained, pair, tmp_path, monkeypatch):
    assert {path.name for path in pair.iterdir()} == {WEIGHTS, RECORD, CARD, CONFIG, SAMPLES}
    shutil.copytree(pair, tmp_path / "pair")
    text = (tmp_path / "pair" / CONFIG).read_text()
    places = dict(re.findall(r'name="([^"]+)".*?HERE / "([^"]+)"', text))  # as ruff would write it
    places = places or dict(re.findall(r"name='([^']+)'.*?HERE / '([^']+)'", text))
    wanted = {
        "base.safetensors": "base.safetensors",
        "tokenizer": "words",
        "loras/film.safetensors": "film.safetensors",
    }
    wanted |= {places["photo"]: "a.safetensors", places["film | x"]: "b.safetensors", places["folder"]: "c"}
    for place, source in wanted.items():
        (tmp_path / "pair" / place).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(home / source, tmp_path / "pair" / place)
    card = (tmp_path / "pair" / CARD).read_text()
    there = re.findall(r"HERE / '([^']+)'", (tmp_path / "pair" / "config.py").read_text())
    put = next(line for line in card.splitlines() if line.startswith("Before that, put "))
    assert there and re.findall(r"`([^`]+)`", put)[:-1] == there  # the last one is config.py
    command = next(line for line in card.splitlines() if line.startswith("python -m afa_jax.sample"))
    monkeypatch.chdir(tmp_path)
    assert run(sample.main, shlex.split(command)[3:]) == 0
    assert run(sample.main, ["--config", f"{home}/config.py", "--workdir", str(trained), "--prompt", PROMPT,
                             "--out", "ours"]) == 0  # fmt: skip
    theirs, ours = (np.asarray(Image.open(next((tmp_path / name).glob("*octopus*")))) for name in ("pictures", "ours"))
    np.testing.assert_array_equal(theirs, ours)


def test_the_card_has_what_a_reader_asks_for(home, trained, pair):
    card = ModelCard.load(pair / CARD)
    data, body = card.data.to_dict(), card.text
    assert data["license"] == "mit" and data["pipeline_tag"] == "text-to-image" and "base_model" not in data
    record = json.loads((pair / RECORD).read_text())
    for expert in record["experts"]:
        assert expert["sha256"] in body
    assert "| film \\| x | b.safetensors | LoRA film.safetensors x 0.5 |" in body
    losses = json.loads((trained / "validation.jsonl").read_text())["loss"]
    assert f"| validation loss | {np.mean([*losses.values()]):.5f} |" in body
    assert f"]({SAMPLES})" in body and PROMPT in body
    assert {"Experts", "Pictures", "How to use it", "Training", "Figures", "Limitations", "License"} <= {
        line.removeprefix("## ") for line in body.splitlines()
    }
    with Image.open(pair / SAMPLES) as picture, Image.open(trained / "samples" / "step_00000002.png") as own:
        assert picture.size == own.size


def test_the_best_step_has_a_card_of_its_own(home, trained, tmp_path):
    options = ["--config", f"{home}/config.py", "--workdir", str(trained / "best"), "--pair", str(tmp_path / "pair")]
    assert run(export.main, options) == 0
    assert "| validation loss |" in (tmp_path / "pair" / CARD).read_text() and (tmp_path / "pair" / SAMPLES).is_file()


def test_a_config_written_for_their_files_serves_every_command(home, tmp_path, monkeypatch, capsys):
    """The command lines that new_config prints, made short by options only."""
    monkeypatch.chdir(tmp_path)
    base = [f"--base={home}/base.safetensors", f"--tokenizer={home}/words", f"--data={home}/pictures", "--size=32x64"]
    lora = f"--expert=b={home}/b.safetensors,lora={home}/film.safetensors:0.5"
    assert run(new_config.main, ["mine", *base, f"--expert=a={home}/a.safetensors", lora]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "python -m afa_jax." in line]
    commands = {line.split()[2].removeprefix("afa_jax."): line for line in lines}
    commands["sample"] = commands["sample"].replace('"..."', f'"{PROMPT}"')
    assert [*commands] == ["screen", "train", "sample", "evaluate"]
    shorter = dict(
        screen="--draws=2",
        train="--config.train.steps=1 --config.train.batch=2 --config.sabw.sites=last --quiet",
        sample="--size=32x64 --steps=2",
        evaluate="--prompts=2 --method=average --method=afa --pictures_only --config.sample.steps=2",
    )
    for module in (screen, train, sample, evaluate):
        name = module.__name__.removeprefix("afa_jax.")
        status = run(module.main, [*shlex.split(commands[name])[3:], *shorter[name].split()])
        assert status == (3 if name == "screen" else 0), name  # 3: routing has nothing to gain from random experts
    assert (tmp_path / "runs" / "mine" / RECORD).is_file() and [*(tmp_path / "pictures").glob("*.png")]
    assert [*(tmp_path / "runs" / "mine").rglob("grid.png")]


@pytest.mark.parametrize("kind", METHODS)
def test_a_card_of_any_kind_shows_texts_as_they_are(kind, tmp_path):
    """Names, prompts and a stranger's record of other types neither end a row, a block or the front matter."""
    evil = "x|`]\n---\n# <script>&```"
    base = part_of("base", "owner/base", "0" * 64)
    experts = [part_of(evil, dict(path="owner/a@main"), "1" * 64), part_of("b", "owner/b/x.safetensors", "2" * 64)]
    record = dict(training=dict(steps=1, arguments=["--config", evil], config=dict(name=evil, train=3, data=[])))
    text = model_card(record, kind, base, experts, folder="pair", prompt=evil, samples={SAMPLES: evil})
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["license"] == "unknown" and data["base_model"] == ["owner/base", "owner/a", "owner/b"]
    table = [line for line in card.text.splitlines() if "64" not in line and re.search("`[012]{64}`", line)]
    assert len(table) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table)
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", card.text, flags=re.S | re.M)
    assert "<script" not in outside and outside.count("\n# ") + outside.startswith("# ") == 1
    command = next(line for line in text.splitlines() if line.startswith("python -m afa_jax.sample"))
    assert ("--method" in command) == (kind != "afa")


def test_the_card_takes_figures_and_pictures_of_this_pair_only(home, trained, tmp_path, capsys):
    figures: dict[str, Any] = dict(
        version=1,
        protocol=dict(prompts=2, seeds=[0], steps=3, guidance=2.0, eta=0.0, sampler="ddim", size=[32, 64], groups={},
                      resamples=10),
        metrics=[dict(name="subject", better="higher", what="", level="", digits=3, main=True)],
        methods=[dict(name="afa <img>", kind="afa", family="AFA", metrics=dict(subject=dict(value=0.5)),
                      record=dict(aggregators_sha256=aggregators_hash(trained)))],
        device="cpu",
    )  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(figures))
    options = ["--config", f"{home}/config.py", "--workdir", str(trained), "--pair"]
    picture = str(next((home / "out" / "pictures").glob("*octopus-noto-style.png")))
    more = ["--report", str(tmp_path / "report.json"), "--picture", picture]
    assert run(export.main, [*options, str(tmp_path / "pair"), *more]) == 0
    card = (tmp_path / "pair" / CARD).read_text()
    assert "| afa &lt;img> | **0.500**" in card and f"![{PROMPT}](picture_00.png)" in card
    assert "license: unknown" in card and "fill it in" in card
    capsys.readouterr()
    figures["methods"][0]["record"] = dict(aggregators_sha256="0" * 64)
    (tmp_path / "report.json").write_text(json.dumps(figures))
    for wrong, said in (
        (more, "none of its methods"),
        (["--picture", f"{home}/config.py"], "no picture that can be read"),
        (["--license", "a b\nc"], "--license"),
    ):
        assert run(export.main, [*options, str(tmp_path / "other"), *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (tmp_path / "other").exists()
