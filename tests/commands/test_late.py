"""What can be known at the start is said at the start: before models are loaded, pictures made or steps trained."""

import importlib
import os
import re
from pathlib import Path

import pytest

import afa_jax
from afa_jax.cli.commands import run

PROMPT = ("--prompt", "octopus, noto style")
EMOJI = Path(__file__).parents[2] / "configs" / "emoji.py"
FOLDERS = {
    "train --workdir OUT": (),
    "sample --out OUT": PROMPT,
    "sample --prompts PROMPTS --out OUT": (),
    f"evaluate --config {EMOJI} --out OUT": None,
    f"evaluate --config {EMOJI} --pictures_only --out OUT": None,
    "maps --out OUT": PROMPT,
    "search --workdir OUT": (),
    "search --workdir new --write OUT": (),
    "merge --out OUT": ("--method", "average"),
    "export --pair OUT --workdir ROOT": (),
    "export --snapshot OUT --workdir ROOT": (),
    "export --bake a OUT": (),
    "convert ROOT/a --out OUT": None,
    "demo --out OUT": None,
}
FILES = {
    "screen --out OUT.json": (),
    "search --workdir new --out OUT.json": (),
    "search --workdir new --write OUT.safetensors": (),
    "merge --out OUT.safetensors": ("--method", "average"),
    "export --snapshot OUT.safetensors --workdir ROOT": (),
    "convert ROOT/a --out OUT.safetensors": None,
    "convert --inspect ROOT/a --json OUT.json": None,
    "report --workdir ROOT --out OUT.html": None,
    "report --sheet ROOT --out OUT.png": None,
    "aot --json OUT.json": ("--devices", "1"),
}
"""Every option that names an output, and what else the command wants; None for one without the tiny config."""
PLACES = ("file/out", "nowhere/out", "sealed/out", "n" * 250)
WORK = (
    "afa_jax.experts.frozen.find_checkpoints", "afa_jax.exporting.merge.find_checkpoints",
    "afa_jax.exporting.export.find_checkpoints", "afa_jax.evaluation.screening.find_checkpoints",
    "afa_jax.exporting.convert.open_input", "afa_jax.exporting.inspect._described",
    "afa_jax.methods.models.load_experts",
    "afa_jax.training.run.load_experts", "afa_jax.evaluation.trials.load_experts",
    "afa_jax.report.run_page.read_metrics", "afa_jax.evaluation.comparison.sheet.comparison_sheet",
    "afa_jax.scale.fit.target_of",
)  # fmt: skip


@pytest.fixture
def place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing may be made, and no work begun."""
    (tmp_path / "file").write_text("what was there")
    (tmp_path / "sealed").mkdir()
    (tmp_path / "folder").mkdir()
    for ending in ("safetensors", "json", "html", "png"):
        (tmp_path / f"folder.{ending}").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "prompts.txt").write_text(PROMPT[1])
    access = os.access  # root, who runs some of these tests, may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "sealed" not in str(path) and access(path, mode))
    monkeypatch.chdir(tmp_path)
    # First all that commands import when they begin: what is imported now would keep the function that stands in.
    for package in ("evaluation", "exporting", "report", "sampling", "scale", "training"):
        for file in sorted((Path(afa_jax.__file__).parent / package).rglob("[a-z]*.py")):
            importlib.import_module(".".join(file.relative_to(Path(afa_jax.__file__).parents[1]).with_suffix("").parts))
    for name in WORK:
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), function, begun)
    return tmp_path


def begun(*arguments, **options):
    raise AssertionError("the work was begun")


def call(command: str, root: Path, *more: str) -> int:
    name, *arguments = command.replace("ROOT", str(root)).replace("PROMPTS", "prompts.txt").split()
    module = importlib.import_module(f"afa_jax.{name}.__main__" if name == "report" else f"afa_jax.{name}")
    return run(module.main, [*arguments, *more])


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_an_output_that_cannot_be_written_is_said_before_the_work(command, root, place, capsys):
    more = (FOLDERS | FILES)[command]
    options = () if more is None else ("--config", f"{root}/config.py", *more)
    before = sorted(place.rglob("*"))
    for name in (*PLACES, *(("file", "nowhere") if command in FOLDERS else ("folder",))):
        assert call(command.replace("OUT", name), root, *options) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name[:20] in error, (name, error)
        assert sorted(place.rglob("*")) == before and (place / "file").read_text() == "what was there"


@pytest.mark.parametrize("command", [command for command in FILES if "safetensors" not in command])
def test_an_output_replaces_nothing_but_an_earlier_one_of_its_command(command, root, place, capsys):
    more, kind = FILES[command], "." + command.partition("OUT.")[2].partition(" ")[0]
    options, whole = () if more is None else ("--config", f"{root}/config.py", *more), command.replace("OUT", "mine")
    for ending in (kind, ".safetensors", ".py"):
        mine = place / f"mine{ending}"
        mine.write_text("{}")
        assert call(whole.replace(kind, ending), root, *options) == 2
        assert f"mine{ending}" in capsys.readouterr().err and mine.read_text() == "{}"


@pytest.mark.parametrize("name", ["report.json", "report.html", "grid.png"])
def test_a_comparison_replaces_no_other_file_in_its_folder(name, root, place, capsys):
    (place / "folder" / name).write_text("mine")
    assert call("evaluate --out folder", root, "--config", str(EMOJI)) == 2
    assert name in capsys.readouterr().err and (place / "folder" / name).read_text() == "mine"


@pytest.mark.parametrize(
    "option",
    [
        "train.optimizer.schedule=linear", "train.optimizer.lr=0.0", "train.optimizer.warmup=-1",
        "train.optimizer.weight_decay=-0.1", "train.optimizer.clip=-1.0", "train.optimizer.b2=1.0",
        "train.min_snr_gamma=-1.0", "train.seed=-1", "train.writers=('excel',)", "train.save_every=0",
        "data.workers=-1", "data.workers=10000", "data.bad=ignore", "data.length=1", "cache.crops=0", "cache.shard=0",
        "cache.path=file/c", "cache.path=nowhere/c", "cache.path=s3://bucket/c",
    ],
)  # fmt: skip
def test_a_field_that_is_used_late_is_looked_at_first(option, root, place, capsys):
    before = sorted(place.rglob("*"))
    assert call("train --workdir new", root, "--config", f"{root}/config.py", f"--config.{option}") == 2
    error, field = capsys.readouterr().err, option.partition("=")[0].rpartition(".")[2]
    assert error.count("\n") == 1 and field.replace("length", "1 pictures are fewer") in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["train --workdir new", "screen --out new.json"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("folder --config.data.path=nothing", "nothing: no such folder"),
        ("folder --config.data.path=folder", "no captions.jsonl"),
        ("tar --config.data.paths=nothing.tar", "nothing.tar: no such file"),
        ("folder --config.data.pth=x", "pth"),
        ("emoji --config.data.length=2", "2 "),
    ],
)
def test_data_that_cannot_be_used_is_said_before_models_are_read(command, data, said, root, place, capsys):
    text = (root / "config.py").read_text()
    kind, *more = data.split()
    if kind != "emoji":
        text = re.sub(r"data=dict\(kind=.emoji.[^)]*\)", f"data=dict(kind={kind!r}, size=(32, 64), path='x')", text)
        text = text.replace("path='x'", "paths='x'") if kind == "tar" else text
    (place / "config.py").write_text(text)
    more += ["--pairs=8"] if command.startswith("screen") else ["--config.train.batch=4"]
    assert call(command, root, "--config", f"{place}/config.py", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


@pytest.mark.parametrize(("option", "said"), [("tokenizer=folder", "folder"), ("scenes=9999999", "scenes=9999999")])
def test_a_fine_tune_looks_at_tokenizer_and_data_first(option, said, place, capsys, monkeypatch):
    for name in ("load_unet", "load_text_encoder", "load_vae"):
        monkeypatch.setattr(f"afa_jax.training.finetune.{name}", begun)
    models = EMOJI.parents[1] / "models" / "emoji"
    options = (f"--config.init={models}/base", f"--config.vae={models}/base", f"--config.{option}")
    assert call("finetune --workdir new", place, "--config", str(EMOJI.with_name("emoji_base.py")), *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_a_file_of_prompts_that_is_not_there_is_said_before_models_are_read(root, place, capsys):
    options = ("--config.evaluation.prompts.kind=file", "--config.evaluation.prompts.path=nothing.txt")
    assert call("evaluate --out new", root, "--config", str(EMOJI), *options) == 2
    assert "evaluation.prompts.path nothing.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("finetune --workdir new", "min_snr_gamma=-1.0"),
        ("finetune --workdir new", "optimizer.schedule=linear"),
        ("finetune --workdir new", "caption_dropout=2.0"),
        ("finetune --workdir file", "steps=1"),
        ("train_vae --workdir new", "optimizer.lr=0.0"),
        ("train_vae --workdir new", "ema=1.0"),
        ("train_vae --workdir new", "vae.use_quant_conv=False"),
        ("train_vae --workdir new", "data.length=1000"),
        ("train_vae --workdir file", "steps=1"),
        ("demo --out new", "fusion={'kind': 'gate'}"),
        ("demo --out new", "sample.size=(33, 64)"),
    ],
)
def test_the_other_trainers_look_first_too(command, option, root, place, capsys, monkeypatch):
    monkeypatch.undo()  # of the demo, experts are loaded; and the emoji models are found from the project's folder
    for name in ("training.finetune", "training.vae", "training.run"):
        monkeypatch.setattr(f"afa_jax.{name}.run_loop", begun)
    monkeypatch.chdir(EMOJI.parents[1])
    name, _, out = command.split()
    config = () if name == "demo" else ("--config", str(EMOJI.with_name(CONFIGS[name])))
    before = sorted(place.rglob("*"))
    assert call(command.replace(out, str(place / out)), root, *config, f"--config.{option}") == 2
    error = capsys.readouterr().err
    named = out if out == "file" else option.partition("=")[0].rpartition(".")[2].replace("length", "data")
    assert error.count("\n") == 1 and named in error
    assert sorted(place.rglob("*")) == before


CONFIGS = dict(finetune="emoji_base.py", train_vae="emoji_vae.py")
