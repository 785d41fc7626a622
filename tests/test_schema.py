"""What a config may say: every field has its type and bounds, and what is missing its default or its name."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest

from afa_jax.cli.commands import load_config
from afa_jax.config.schema import NEEDED, SOURCES
from afa_jax.data.sources import SOURCE_CLASSES
from afa_jax.errors import InputError

EMOJI = Path(__file__).parents[1] / "configs" / "emoji.py"
# The example of docs/checkpoints.md: what has no default, and one section more.
SHORT = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        base=dict(path="b.safetensors", tokenizer="t"), experts=[dict(name="a", path="a.safetensors")],
        dtype="fp16", data=dict(kind="folder", path="p", size=(64, 64)), train=dict(steps=3),
    ))
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_short_config_is_completed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.py", SHORT), ["train.optimizer.lr=1", "sample.size=[32,64]"])
    assert (config.dtype, config.train.steps, config.train.batch) == ("float16", 3, 8)
    assert (config.sabw.hidden, config.sabw.transformer_layers, config.sabw.heads) == (128, 2, 8)  # the paper's
    assert (config.fusion.kind, config.cache.path, config.validation.every) == ("afa", "", 0)
    assert config.train.optimizer.lr == 1.0 and isinstance(config.train.optimizer.lr, float)
    assert tuple(config.sample.size) == (32, 64) and "evaluation" not in config and "mesh" not in config
    assert config.base.tokenizer == "t"


@pytest.mark.parametrize("spelled", ["fp16", "half", "float16", "FP16", "Float16", "Half"])
def test_names_of_dtypes(spelled: str) -> None:
    assert load_config(str(EMOJI), [f"dtype={spelled}"]).dtype == "float16"


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        ("dtype=float15", "dtype", "'float16'"),
        ("dtype=None", "dtype", "'float32'"),
        ("train.steps=None", "train.steps", "whole number"),
        ("train.steps='10'", "train.steps", "expected int"),
        ("train.steps=True", "train.steps", "expected int"),
        ("train.steps=0", "train.steps", "from 1"),
        ("train.steps=1.5", "train.steps", "expected int"),
        ("train.steps=1e30", "train.steps", "from 1"),
        (f"train.steps={'9' * 400}", "train.steps", "from 1 to"),
        ("train.batch=-1", "train.batch", "from 1"),
        ("train.seed=-1", "train.seed", "from 0"),
        ("train.ema=1", "train.ema", "below 1"),
        ("train.optimizer.lr=0", "train.optimizer.lr", "above 0"),
        (f"train.optimizer.lr={'1' * 400}", "train.optimizer.lr", "finite"),
        (f"train.optimizer.lr={'1' * 5000}", "train.optimizer.lr", "expected float"),
        ("train.optimizer.lr=1e400", "train.optimizer.lr", "finite"),
        ("train.optimizer.schedule=linear", "train.optimizer.schedule", "'cosine'"),
        ("train.caption_dropout=2", "train.caption_dropout", "from 0 to 1"),
        ("train.remat=all", "train.remat", "'fused'"),
        ("sabw.transformer_layers=100000000000", "sabw.transformer_layers", "from 0 to 64"),
        ("sabw.use_time='True'", "sabw.use_time", "expected bool"),
        ("mesh.data=0", "mesh.data", "from 1"),
        ("sample.size=(32,)", "sample.size", "(rows, columns)"),
        ("sample.size=(32, 0)", "sample.size", "from 1"),
        ("sample.guidance=nan", "sample.guidance", "expected float"),
        ("experts=[]", "experts", "list of 1 or more"),
        ("experts=['a']", "experts", "dict(name=..., path=...)"),
        ("experts=[{'name': 'a', 'pth': 'b'}]", "experts", "did you mean path?"),
        ("experts=[{'name': 'a'}]", "experts", "path is missing"),
        ("experts=[{'name': 'a', 'path': 'b', 'dtype': 'int8'}]", "experts", "whose dtype is one of 'float32'"),
        ("experts=[{'name': 'a', 'path': 'b', 'loras': ['c']}]", "experts", "[(path, weight), ...]"),
        ("experts=[{'name': 'a', 'path': 'b'}, {'name': 'a', 'path': 'c'}]", "experts", "'a' is there twice"),
        ("base={'tokenizer': 't'}", "base", "path is missing"),
        ("base=''", "base", "not empty"),
        ("data.kind=zip", "data.kind", "'parquet'"),
        ("evaluation.seeds=()", "evaluation.seeds", "list of 1 or more"),
        ("validation.prompts=('a', 1)", "validation.prompts", "text in quotes"),
        ("fusion.kind=moe", "fusion.kind", "'router'"),
        ("trian.steps=3", "trian.steps", "did you mean train.steps"),
        ("train.stpes=3", "train.stpes", "did you mean train.steps"),
        ("learning_rate=3", "learning_rate", "did you mean train.optimizer.lr"),
        ("train.batch_size=3", "train.batch_size", "did you mean train.batch?"),
        ("train.steps.more=3", "train.steps.more", "no such field"),
        ("=3", "--config.", "FIELD=VALUE"),
        ("train.steps", "train.steps", "FIELD=VALUE"),
        ("train={[]:1}", "train", "train.FIELD=VALUE"),
        ("train={'steps': 1}", "train", "train.FIELD=VALUE"),
        ("sample.size=(65536, 65536)", "sample.size", "67,108,864 pixels"),
        (f"train.steps={'[' * 5000}", "train.steps", "expected int"),
        (f"base={'x' * 20000}", "base", "20000 characters"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_field_and_what_to_write(override: str, field: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(str(EMOJI), [override])
    assert field in str(caught.value) and remedy in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "field", "remedy"),
    [
        ('kind="folder", path="p", text=5', "data.text=5", "a text in quotes"),
        ('kind="tar", paths="p", caption=["x"]', "data.caption=", "a text in quotes"),
        ('kind="tar", paths="p", caption=5', "data.caption=5", "a text in quotes"),
        ('kind="tar", paths=5', "data.paths=5", "a list of 1 or more"),
        ('kind="tar", paths=["p", 5]', "data.paths=", "a list of 1 or more"),
        ('kind="tfds", name=5', "data.name=5", "a text in quotes"),
        ('kind="tfds", name="n", data_dir=5', "data.data_dir=5", "a text in quotes"),
        ('kind="tfds", name="n", split=5', "data.split=5", "a text in quotes"),
        ('kind="parquet", paths="p", image=5', "data.image=5", "a text in quotes"),
        ('kind="folder"', "data.path is missing", "a text in quotes"),
        ('kind="tar", path="p"', "data.path:", "it has paths, caption"),
        ('kind="emoji", seed=0, pth="p"', "data.pth:", "it has seed, length"),
    ],
)
def test_data_is_what_its_kind_takes(data: str, field: str, remedy: str, tmp_path: Path) -> None:
    text = SHORT.replace('kind="folder", path="p"', data)
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "c.py", text), [])
    assert field in str(caught.value) and remedy in str(caught.value)


def test_the_fields_of_a_kind_of_data_are_the_arguments_of_its_source() -> None:
    for kind, (module, name) in SOURCE_CLASSES.items():
        arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        assert [*arguments] == [*SOURCES[kind]]
        assert NEEDED.get(kind) == next((n for n, own in arguments.items() if own.default is own.empty), None)


@pytest.mark.parametrize(("name", "meant"), [("base", "init"), ("train.steps", "steps"), ("train.lr", "optimizer.lr")])
def test_what_an_ensemble_calls_otherwise_is_said_of_one_model(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"config\.{name}: no such field; did you mean {meant}\?"):
        load_config(str(EMOJI.with_name("sd15_finetune.py")), [f"{name}=3"])


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31m", "a/b", "a:b", "a,b", "a=b", " a", ".", "\u202ea", 3, None])
def test_a_name_of_an_expert_fits_on_the_command_line(name: object) -> None:
    with pytest.raises(InputError, match=r"^--config .*: experts=.* whose name is|name is missing") as caught:
        load_config(str(EMOJI), [f"experts=[{{'name': {name!r}, 'path': 'b'}}]"])
    assert str(caught.value).isprintable()


def test_names_that_experts_have() -> None:
    for name in ("photo", "sd-v1.5", "my model", "a_b+c (2)", "写真"):
        assert load_config(str(EMOJI), [f"experts=[{{'name': {name!r}, 'path': 'b'}}]"]).experts[0]["name"] == name


def test_values_that_stand_for_plain_data_become_it(tmp_path: Path) -> None:
    text = SHORT.replace('"b.safetensors"', 'Path("b.safetensors")').replace('"a.safetensors"', 'Path("a")')
    text = text.replace('path="p", size=(64, 64)', 'path=Path("p"), size=(np.int64(64), 64.0), flip=np.bool_(True)')
    text = text.replace("steps=3", "steps=1e4, batch=np.int64(4), ema=np.float32(0.5), seed=np.asarray(3)")
    text = text.replace('"fp16"', "np.float16").replace("train=", "fusion=dict(kind='AFA', more=np.arange(2)), train=")
    config = load_config(write(tmp_path / "c.py", f"import numpy as np\nfrom pathlib import Path\n{text}"))
    assert json.loads(json.dumps(config.to_dict()))["fusion"] == dict(kind="afa", more=[0, 1])
    assert (config.train.steps, config.train.batch, config.train.ema, config.train.seed) == (10_000, 4, 0.5, 3)
    assert type(config.train.steps) is type(config.train.batch) is int and type(config.train.ema) is float
    assert (config.base.path, config.experts[0]["path"], config.data.path) == ("b.safetensors", "a", "p")
    assert (tuple(config.data.size), config.data.flip, config.dtype) == ((64, 64), True, "float16")
    assert (config.fusion.kind, config.fusion.more) == ("afa", [0, 1])
    with pytest.raises(InputError, match=r"train\.steps=1\.5"):
        load_config(write(tmp_path / "d.py", SHORT.replace("steps=3", "steps=1.5")))
    assert load_config(str(EMOJI), ["train.steps=1e3"]).train.steps == 1000


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{}", "no method 'None'; there are expert"),
        ("{'kind': 3}", "no method '3'; there are expert"),
        ("{'kind': 'ties', 'densty': 1}", "ties: no option 'densty'; there are density"),
        ("{'kind': 'expert'}", "method expert: the option expert is missing"),
        ("{'kind': 'uniform', 'steps': 1.5}", "method uniform: steps=1.5"),
        ("3", "expected a list of 1 or more, each dict(...)"),
    ],
)
def test_methods_of_a_comparison_are_checked_with_the_config(entry: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(str(EMOJI), [f"evaluation.methods=[{entry}]"])
    assert "evaluation.methods" in str(caught.value) and said in str(caught.value)


def test_of_overrides_the_last_one_counts() -> None:
    assert load_config(str(EMOJI), ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no function get_config"),
        ("get_config = 3", "no function get_config"),
        ("def get_config(arg):\n    return 3", "returns int"),
        ("def get_config(arg):\n    return None", "returns NoneType"),
        ("def get_config(arg)\n    return 3", "c.py:1: not Python"),
        ("import nothing_of_that_name", "c.py:1: ModuleNotFoundError"),
        ("def get_config(arg):\n    x = 1\n    return x / 0", "c.py:3: ZeroDivisionError"),
        ("raise SystemExit(0)", "c.py:1: SystemExit"),
        ("def get_config(arg):\n    return {}", "base is missing"),
        (SHORT.replace("size=(64, 64)", "size=64"), "data.size=64"),
        (SHORT.replace('kind="folder", ', ""), "data.kind is missing"),
        (SHORT.replace("train=dict(steps=3)", "train=None"), "train=None: expected a section"),
        (
            SHORT.replace("train=dict(steps=3)", "train=dict(stps=3)"),
            "train.stps: no such field; did you mean train.steps",
        ),
        (SHORT.replace("get_config()", "get_config(a, b)"), "TypeError"),
        ("x = '\0'", "not Python"),
        (SHORT.replace("train=dict(steps=3)", "train={1: 2}"), "the field train.1: names of fields are texts"),
        ("d = {}\ndef get_config():\n    return d['learning']", "c.py:3: KeyError"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E", "c.py:4: E"),
    ],
)
def test_a_file_without_a_config_says_why_and_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "c.py", text))
    assert said in str(caught.value)


@pytest.mark.parametrize("section", ["mesh", "data", "evaluation", "validation.data"])
def test_an_optional_section_that_is_none_is_not_there(section: str) -> None:
    config = load_config(str(EMOJI), [f"{section}=None"])
    *parents, name = section.split(".")
    for parent in parents:
        config = config[parent]
    assert name not in config


def test_a_config_is_a_module(tmp_path: Path) -> None:
    text = SHORT.replace("def get", "@dataclass\nclass A:\n    steps: int = 3\n\n\ndef get").replace(
        "g()", "g(*, more='')"
    )
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + text
    assert load_config(write(tmp_path / "c.py", text)).train.steps == 3


def test_what_is_no_python_file(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("x = 1")
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "d.py", "no file"),
        (tmp_path / "c.txt", "not a Python file"),
    ):
        with pytest.raises(InputError, match=said):
            load_config(str(path))
    with pytest.raises(InputError, match="takes no variant"):
        load_config(write(tmp_path / "c.py", SHORT) + ":more")
