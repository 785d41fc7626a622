"""Records are plain JSON of any config, and say nothing of the machine's folders."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder

from afa_jax.errors import InputError
from afa_jax.records import plain, public_arguments, public_path, public_sentence, record_text, recorded


def test_every_form_of_a_config_is_plain_data():
    config = ConfigDict(
        dict(
            base=dict(path="/mnt/x/base.safetensors", tokenizer=Path("/mnt/x/tokenizer")),
            experts=[ConfigDict(dict(name="a", loras=(("/l/film.safetensors", np.float32(0.5)),))), dict(name="b")],
            dtype=jnp.bfloat16,
            other=np.dtype("float16"),
            numbers=(np.int64(3), np.float64(0.25), True, None, np.array([1, 2]), jnp.float32(2)),
            groups={"two topics": {"b", "a"}},
        )
    )
    expected = dict(
        base=dict(path="base.safetensors", tokenizer="tokenizer"),
        experts=[dict(name="a", loras=[["film.safetensors", 0.5]]), dict(name="b")],
        dtype="bfloat16",
        other="float16",
        numbers=[3, 0.25, True, None, [1, 2], 2.0],
        groups={"two topics": ["a", "b"]},
    )
    assert json.loads(record_text(config)) == recorded(config) == expected


@pytest.mark.parametrize(
    "value",
    [float("nan"), np.inf, 10**400, print, b"x", object(), {1: 2}, {1: 2, "a": 3}, required_placeholder(int)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_data_is_named(value):
    with pytest.raises(InputError, match=r"config\.train\.field|config\.train has the key"):
        plain(ConfigDict(dict(train=value if isinstance(value, dict) else dict(field=value))))
    endless: list = []
    endless.append(endless)
    with pytest.raises(InputError, match="within each other"):
        plain(endless)


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/mnt/alice/models/photo.safetensors", "photo.safetensors"),
        ("/data/{000..099}.tar", "{000..099}.tar"),
        ("~/photo", "photo"),
        ("../alice/photo", "photo"),
        ("..", "."),
        ("/", "."),
        ("file:///mnt/alice/photo", "photo"),
        ("C:\\models\\photo.safetensors", "photo.safetensors"),
        ("models/photo.safetensors", "models/photo.safetensors"),
        ("owner/name", "owner/name"),
        ("owner/name/file.safetensors@main", "owner/name/file.safetensors@main"),
        ("gs://bucket/folder", "gs://bucket/folder"),
        ("", ""),
        ("ladder,workdir=/mnt/alice/run,threshold=0.5", "ladder,workdir=run,threshold=0.5"),
        ("distilled:/mnt/alice/run", "distilled:run"),
        ("router,workdir=../alice/run", "router,workdir=run"),
        ("a=C:\\models\\a.safetensors,lora=~/l.safetensors:0.5", "a=a.safetensors,lora=l.safetensors:0.5"),
        ("afa,workdir=gs://bucket/run", "afa,workdir=gs://bucket/run"),
        ("configs/emoji.py:full", "configs/emoji.py:full"),
    ],
)
def test_a_path_of_this_machine_is_its_name(path, public):
    assert public_path(path) == public == public_path(public)


def test_arguments_and_sentences_name_no_folder_of_this_machine(monkeypatch):
    arguments = [
        "--config", "/mnt/x/configs/sd15.py:256", "--expert", "a=/mnt/x/a.safetensors,lora=/mnt/x/l.safetensors:0.5",
        "--config.base={'path': '/mnt/x/b', 'tokenizer': 'owner/name'}", "--config.data.path=/mnt/x/pictures",
        "--config.data.paths=('/mnt/x/1.tar', 'here/2.tar')", "--config.validation.prompts=('/a cat',)",
        "--config.train.steps=4", "--config.distil.teacher=ladder,workdir=/mnt/x/run",
    ]  # fmt: skip
    assert public_arguments(arguments) == [
        "--config", "sd15.py:256", "--expert", "a=a.safetensors,lora=l.safetensors:0.5",
        "--config.base={'path': 'b', 'tokenizer': 'owner/name'}", "--config.data.path=pictures",
        "--config.data.paths=('1.tar', 'here/2.tar')", "--config.validation.prompts=('/a cat',)",
        "--config.train.steps=4", "--config.distil.teacher=ladder,workdir=run",
    ]  # fmt: skip
    monkeypatch.chdir("/usr")
    sentence = "/usr/runs/x: no such file, see https://host/a/b and (/mnt/a/weights.pt); 1/2 of a and/or b"
    assert public_sentence(sentence) == (
        "runs/x: no such file, see https://host/a/b and (weights.pt); 1/2 of a and/or b"
    )


def test_published_reports_name_no_folder_of_the_machine_that_made_them():
    """The reports in docs/ are what ``recorded`` makes of themselves, in commands too."""
    for path in (Path(__file__).parents[1] / "docs" / "emoji").glob("*.json"):
        report = json.loads(path.read_text())
        assert recorded(report) == report, path.name
        for method in report["methods"]:
            words = (method["recipe"] or "").partition("#")[0].split()
            assert public_arguments(words) == words, method["recipe"]
