"""What is wrong with a command line is found before anything heavy is imported."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from afa_jax import names
from afa_jax.cli.commands import Parser
from afa_jax.config import method_options
from afa_jax.errors import InputError
from afa_jax.evaluation import search
from afa_jax.exporting.outputs import check_model
from afa_jax.methods import method as methods
from afa_jax.scale import abstract
from afa_jax.weights.merging import rules as merge_kinds

ROOT = Path(__file__).parents[2]

WRONG_LINES = """
import contextlib, importlib, io, pathlib, sys
from afa_jax.cli.commands import run

root, folder = sys.argv[1:]
heavy = ("jax", "torch", "tensorflow", "transformers", "numpy")
config = f"--config={root}/configs/emoji.py"
others = dict(finetune=f"--config={root}/configs/emoji_base.py", train_vae=f"--config={root}/configs/emoji_vae.py")
own = dict(
    train=["--workdir=x"],
    distil=["--workdir=x"],
    finetune=["--workdir=x"],
    train_vae=["--workdir=x"],
    sample=["--prompt=fox", "--out=x"],
    evaluate=["--out=x"],
    maps=["--prompt=fox", "--out=x"],
    merge=["--method=average", "--out=x"],
    search=["--workdir=x"],
    export=["--workdir=x", "--pair=y"],
    screen=[],
    aot=["--devices=2"],
)
for name, arguments in own.items():
    own[name] = [
        ([*arguments, f"--config={folder}/absent.py"], "no file"),
        ([*arguments, others.get(name, config), "--config.nme=x"], "did you mean name"),
        ([*arguments, f"--config={root}/configs/emoji_{'vae' if name == 'finetune' else 'base'}.py"], "wants one of"),
        ([*arguments, config, "--nonsense"], "nonsense"),
        ([config, "--seed=x", "--steps=x", "--resume_step=x", "--devices=x", *arguments], ""),
    ]
own["distil"] += [
    (["--workdir=x", config, "--teacher=ties,densty=1"], "distil.teacher=ties,densty=1: ties: no option"),
    (["--workdir=x", config, "--student=magic"], "distil.student=magic"),
    (["--workdir=x", config, "--config.distil={'features': -1}"], "distil.features"),
]
own["sample"] += [
    (["--prompt=fox", "--out=x", config, "--style=a=1"], "--style a=1: it goes with --method distilled:RUN"),
    (["--prompt=fox", "--out=x", config, "--method=distilled:x", "--style=a"], "--style a: write NAME=WEIGHT"),
]
own["train"].append((["--workdir=x", config, "--resume", "--overwrite"], "exclude each other"))
own["sample"] += [
    (["--prompt=fox", "--out=x", config, f"--{option}"], option.partition("=")[0])
    for option in ("num_images=0", "seed=-2", "steps=0", "guidance=nan", "size=64", "method=magic", "eta=-1")
]
own["sample"].append((["--prompt=fox", "--out=x", config, "--method=ties,densty=1"], "ties: no option 'densty'; there"))
for name in ("train", "distil", "finetune", "train_vae", "search"):
    own[name].append((["--workdir=/dev/null/x", others.get(name, config)], "cannot be written"))
own["sample"].append(([f"--prompts={root}/pyproject.toml", "--out=x", config], "the line is empty"))
for name, more in (("sample", "--prompt=fox"), ("evaluate", "--prompts=2"), ("maps", "--prompt=fox"),
                   ("merge", "--method=average")):
    own[name].append(([more, "--out=/dev/null/x", config], "cannot be written"))
for name, more in (("screen", "--pairs=8"), ("search", "--workdir=x")):
    own[name].append(([more, "--out=/dev/null/x.json", config], "cannot be written"))
own["export"].append((["--workdir=x", "--pair=/dev/null/x", config], "cannot be written"))
own["aot"].append((["--devices=2", "--json=/dev/null/x.json", config], "cannot be written"))
own["merge"].append((["--method=magic", "--out=x", config], "no merge 'magic'; there are average"))
methods = {
    "expert:NOSUCH": "no expert 'NOSUCH'; there are animals, food, things", "ties,density=2": "density=2",
    "afa,top=4": "top=4; choose 1 to 3", "dare,p=1": "p=1", "ties,densty=1": "no option 'densty'", "expert": "missing",
    "average,weights.food=0.5": "sum to 0.5", "uniform,steps=0": "steps=0", "ties,density": "FIELD=VALUE",
}  # fmt: skip
for method, fact in methods.items():
    if fact != "FIELD=VALUE":  # else the config may have a method of this name
        own["evaluate"].append(([f"--method={method}", "--out=x", config], fact))
        own["sample"].append(([f"--method={method}", "--prompt=fox", "--out=x", config], fact))
    if method.split(",")[0] in ("ties", "dare", "average"):
        own["merge"].append(([f"--method={method}", "--out=x", config], fact))
listed = "--config.evaluation.methods=[{'kind': 'ties', 'density': 2}]"
own["evaluate"].append((["--out=x", config, listed], "density=2"))
for name in ("sample", "maps"):
    sized = f"--config.base={root}/models/emoji/base"
    own[name].append((["--prompt=fox", "--out=x", config, sized, "--size=33x64"], "size 33x64: both sides must be"))
for name in ("train", "distil", "finetune", "train_vae", "search"):
    own[name].append((["--workdir=x", others.get(name, config), "--resume"], "--resume: x holds no run"))
    own[name].append(([f"--workdir={root}", others.get(name, config)], "is not empty"))
own |= {
    "demo": [
        (["--out=/dev/null/x"], "cannot be written"),
        (["--seed=-2"], "--seed"),
        (["--config.trian.steps=1"], "no such field"),
        (["--out=x", "--resume"], "--resume: x holds no run"),
    ],
    "convert": [
        (["a"], "--out is missing"),
        (["a", "--out=b", "--dtype=int8"], "--dtype"),
        (["--inspect", "a", "--out=b"], "--out does not go with --inspect"),
        ([f"{root}/models", "--out=/dev/null/b"], "cannot be written"),
        (["a", "--out=b"], "a: no such file or folder"),
        ([f"{root}/models", "--out=b", "--vae=c.safetensors"], "c.safetensors: no such file"),
        ([f"{root}/models", "--out=b", "--lora=d:0.5"], "d: no such file"),
        (["--inspect", "a", "--json=/dev/null/b.json"], "cannot be written"),
    ],
    "report.__main__": [([], "--workdir and --out"), (["--sheet=a", "--out=b", "--prompts=0"], "--prompts")],
    "new_config": [
        ([*model, *expert, *more], fact) for model, expert, more, fact in (
            (["a", "--base=b"], ["--expert=c=c"], [], "b: no such file"),
            (["a", f"--base={root}/models"], ["--expert=c=c"], [], "c: no such file"),
            (["a", f"--base={root}/models"], [f"--expert=c={root}/models,lora=d:1"], [], "d: no such file"),
            (["a", f"--base={root}/models"], [f"--expert=c={root}/models"], ["--data=e"], "--data e"),
            (["a", f"--base={root}/models/emoji/base"], [f"--expert=c={root}/models"], ["--size=33x64"], "size 33x64"),
        )
    ],
    "prepare": [(["--builder=x"], "--builder")],
}
for name, lines in own.items():
    main = importlib.import_module(f"afa_jax.{name}").main
    for arguments, fact in lines:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = run(main, arguments)
        (line,) = said.getvalue().splitlines()
        assert status == 2 and line.startswith("error: ") and fact in line, (name, arguments, status, line)
    there = [module for module in heavy if module in sys.modules]
    assert not there, (name, there)
assert not list(pathlib.Path(folder).iterdir())
"""


def test_wrong_lines_cost_no_heavy_import(tmp_path):
    arguments = [sys.executable, "-c", WRONG_LINES, str(ROOT), str(tmp_path)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr


def test_the_names_are_those_of_what_there_is():
    families = dict.fromkeys(kind.family for kind in methods.METHOD_KINDS.values())
    assert (*families, "ablation") == method_options.FAMILIES
    for kind, known in method_options.OPTIONS.items():
        function = merge_kinds.MERGE_RULES[kind] if kind in names.MERGES else methods.METHOD_KINDS[kind].build
        own = [p for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
        needed = [p.name for p in own if p.default is p.empty and p.name != "steps"]
        assert needed == ([method_options.REQUIRED[kind]] if kind in method_options.REQUIRED else []), kind
        assert known is None or tuple(known) == tuple(p.name for p in own if p.name != "steps"), kind
    assert tuple(method_options.OPTIONS) == names.METHODS
    assert tuple(methods.METHOD_KINDS) == names.METHODS and tuple(merge_kinds.MERGE_RULES) == names.MERGES
    assert search.SPACE_KINDS == names.SPACES and tuple(abstract.KNOWN) == names.ARCHITECTURES


@pytest.mark.parametrize(
    "name", ["sd-v1.5", "merge_0.5", "mix.final", "sd15.fp16", "v2.1-base", "x.SafeTensors", "photo"]
)
def test_models_have_names_with_dots(name, tmp_path):
    check_model(tmp_path / name)


def test_a_folder_that_is_called_like_a_file_can_be_replaced(tmp_path):
    (tmp_path / "x.txt").mkdir()
    check_model(tmp_path / "x.txt", overwrite=True)
    with pytest.raises(InputError, match=r"a\.gguf: .* end it in \.safetensors"):
        check_model(tmp_path / "a.gguf")


def test_help_fills_paragraphs_and_keeps_the_lines_of_examples(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="x", description="Make ``this``,\nor that.\n\n    one\n    two\n\nEnd.\n").parse_args(["--help"])
    assert "\nMake this, or that.\n\n    one\n    two\n\nEnd.\n" in capsys.readouterr().out
