"""Tokenizers as people have them: the ids of transformers, or one line that names the file and the key."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from afa_jax.errors import InputError
from afa_jax.models.configs import TextConfig
from afa_jax.weights.tokenizer.files import read_tokenizer
from afa_jax.weights.tokenizer.prompts import LONGEST_PROMPT, check_prompt, unsupported_syntax
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

EMOJI = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji" / "tokenizer"
PROMPT = "octopus and pizza, noto style"
IDS = Tokenizer(EMOJI)([PROMPT])


def edited(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EMOJI, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="module")
def every_byte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has a token for each byte, as CLIP's: any text has ids."""
    folder = tmp_path_factory.mktemp("bytes")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(c) for c in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "n"), ("an", "d</w>")]
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    return folder


def test_the_ids_are_transformers(every_byte: Path) -> None:
    draw = random.Random(0)
    texts = ["don't we'll 's", " a\t b\n\nc ", "éé 🐙 日本語", "1.5!!?", "<|endoftext|> cat", "ﬁ ½ İI", ""]
    ranges = ((32, 127), (160, 0x2000), (0x3000, 0x9FFF), (0x1F300, 0x1F600))
    for length in range(1, 100):
        texts.append("".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length % 30)))
    theirs, ours = CLIPTokenizer.from_pretrained(every_byte), Tokenizer(every_byte)
    assert ours.length == 77
    for text in texts:
        own = theirs(text, add_special_tokens=False)["input_ids"]
        if theirs.unk_token_id in own:  # which ours refuses
            continue
        assert ours([text], quiet=True)[0].tolist() == ([ours._start, *own[:75], ours._end] + [ours._pad] * 77)[:77]


def test_as_transformers_5_saves_it(folder: Path, tmp_path: Path) -> None:
    """tokenizer.json alone; what is written from it has the files that others look for."""
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "five")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "five" / name).unlink(missing_ok=True)
    np.testing.assert_array_equal(Tokenizer(tmp_path / "five")([PROMPT]), IDS)
    read_tokenizer(tmp_path / "five").write(tmp_path / "copy")
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "copy").iterdir()}
    (tmp_path / "copy" / "tokenizer.json").unlink()
    np.testing.assert_array_equal(Tokenizer(tmp_path / "copy")([PROMPT]), IDS)


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("pad", [None, "!"])
def test_a_tokenizer_json_of_any_class_is_read_if_it_is_clips(
    every_byte: Path, tmp_path: Path, name: str, template: bool, pad: str | None
) -> None:
    CLIPTokenizer.from_pretrained(every_byte).save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token=pad)
    start, end = map(theirs.convert_tokens_to_ids, ("<|startoftext|>", "<|endoftext|>"))
    if template:
        theirs.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|startoftext|> $A <|endoftext|>",
            special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
        )
    theirs.save_pretrained(tmp_path)
    edited(tmp_path, CONFIG, lambda c: c | dict(tokenizer_class=name, bos_token=None, pad_token=pad))
    text = "The cat's 12 hats, and é!"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    fill = end if pad is None else theirs.convert_tokens_to_ids(pad)
    assert ids[0] == start and Tokenizer(tmp_path)([text])[0].tolist() == (ids + [fill] * 77)[:77]


def test_what_a_file_says_as_null_it_does_not_say(folder: Path) -> None:
    edited(folder, CONFIG, lambda c: c | dict.fromkeys(("pad_token", "bos_token", "eos_token", "unk_token")))
    added = {"672": dict(content="<|startoftext|>", normalized=None, special=True, lstrip=None)}
    edited(folder, CONFIG, lambda c: c | dict(added_tokens_decoder=added))
    edited(folder, SPECIAL, lambda c: dict.fromkeys(c))
    np.testing.assert_array_equal(Tokenizer(folder)([PROMPT]), IDS)


def test_an_added_token_that_is_a_space_is_transformers(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({" ": 674}))
    theirs = CLIPTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    assert 674 in theirs and Tokenizer(folder)([PROMPT])[0].tolist()[: len(theirs)] == theirs


@pytest.mark.parametrize("length", [None, 10**30, 1e30, 77, 2**62, "absent"])
def test_the_encoders_positions_are_the_bound(folder: Path, length: Any) -> None:
    edited(folder, "tokenizer_config.json", lambda c: c | {"model_max_length": length} if length != "absent" else {})
    tokenizer = Tokenizer(folder, TextConfig(vocab_size=674, max_position_embeddings=16))
    assert tokenizer.length == 16
    np.testing.assert_array_equal(tokenizer([PROMPT]), IDS)


def test_line_ends_are_no_matter_and_a_cut_file_is_named(folder: Path) -> None:
    merges = (folder / "merges.txt").read_bytes()
    for data in (merges.replace(b"\n", b"\r"), merges.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + merges):
        (folder / "merges.txt").write_bytes(data)
        np.testing.assert_array_equal(Tokenizer(folder)([PROMPT])[0][: len(IDS[0])], IDS[0])
    (folder / "merges.txt").write_bytes(b"\n".join(merges.split(b"\n")[:-2]))
    with pytest.raises(InputError, match=r"merges\.txt: no merge makes the token"):
        Tokenizer(folder)([PROMPT])


def test_ids_beyond_the_encoder_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"the text encoder knows 0 to 99"):
        Tokenizer(folder, TextConfig(vocab_size=100))


CONFIG, SPECIAL, VOCAB = "tokenizer_config.json", "special_tokens_map.json", "vocab.json"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (CONFIG, lambda c: c | dict(model_max_length=-5), "model_max_length"),
        (CONFIG, lambda c: c | dict(model_max_length="long"), "model_max_length"),
        (CONFIG, lambda c: c | dict(tokenizer_class="T5Tokenizer"), "tokenizer_class"),
        (CONFIG, lambda c: c | dict(tokenizer_class="TokenizersBackend"), "tokenizer.json: not there"),
        (CONFIG, lambda c: [c], "no JSON object"),
        (CONFIG, lambda c: c | dict(added_tokens_decoder=3), "added_tokens_decoder"),
        (CONFIG, lambda c: c | dict(whole_words="yes"), "whole_words"),
        (SPECIAL, lambda c: c | dict(unk_token=-5), "unk_token"),
        (SPECIAL, lambda c: c | dict(pad_token=["a"]), "pad_token"),
        (SPECIAL, lambda c: c | dict(eos_token="no such token"), "eos_token"),
        (VOCAB, lambda c: {}, "empty"),
        (VOCAB, lambda c: c | dict(octopus="x"), "octopus"),
        (VOCAB, lambda c: {token: number for token, number in c.items() if token != "<|endoftext|>"}, "endoftext"),
        (VOCAB, lambda c: dict.fromkeys(c, 0), "one id"),
        (VOCAB, b"\xff\xfe", "not UTF-8"),
        (SPECIAL, b'{"bos_token": "<|sta', "not JSON"),
        (SPECIAL, b"[" * 100_000, "not JSON"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt:2"),
        ("merges.txt", b"\xff", "not UTF-8"),
        ("merges.txt", b"#version: 0.2\n", "merges.txt: no merge makes"),
        ("merges.txt", None, "merges.txt: not there"),
        (VOCAB, None, "no tokenizer there"),
        (CONFIG, b"x" * (9 << 20), "larger than"),
    ],
)  # fmt: skip
def test_damage_is_one_line(folder: Path, name: str, change: Any, said: str) -> None:
    if change is None:
        (folder / name).unlink()
    elif isinstance(change, bytes):
        (folder / name).write_bytes(change)
    else:
        edited(folder, name, change)
    with pytest.raises(InputError) as caught:
        Tokenizer(folder)([PROMPT])
    assert said in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("normalizer", None),
        ("normalizer", dict(type="Sequence", normalizers=[dict(type="Lowercase")])),
        ("pre_tokenizer", dict(type="ByteLevel", add_prefix_space=False)),
        ("pre_tokenizer", dict(type="Sequence", pretokenizers=[3, None])),
        ("post_processor", None),
        ("post_processor", dict(type="RobertaProcessing", cls=["<|startoftext|>", 0], sep=["<|endoftext|>", 1])),
        ("model", dict(dropout=0.1)),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_named(folder: Path, part: str, change: Any) -> None:
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    edited(folder, CONFIG, lambda c: c | dict(tokenizer_class="TokenizersBackend"))
    edited(folder, "tokenizer.json", lambda c: c | {part: c[part] | change if part == "model" else change})
    with pytest.raises(InputError, match=rf"tokenizer\.json: its {part} is not CLIP's"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("octopus \ud83d", "character 9"),
        (b"octopus \xe9".decode("utf-8", "surrogateescape"), "not UTF-8"),
        ("a\0b", "U+0000"),
        ("a\x1b[31mb", "control character"),
        ("x" * (LONGEST_PROMPT + 1), f"{LONGEST_PROMPT} at most"),
    ],
)
def test_what_is_no_prompt(prompt: str, said: str) -> None:
    with pytest.raises(InputError, match="here: ") as caught:
        check_prompt(prompt, "here")
    assert said in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("prompt", ["", "a\tb\nc", "🐙 ünï", "x" * LONGEST_PROMPT])
def test_what_is_a_prompt(prompt: str) -> None:
    assert check_prompt(prompt, "here") == prompt


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a cat, oil painting", []),
        ("(a cat:1.3)", ["weights"]),
        ("cat (animal)", ["weights"]),
        ("[a cat]", ["lower weights or switches"]),
        ("[cat:dog:0.25]", ["lower weights or switches"]),
        ("a cat BREAK a dog", ["BREAK"]),
        ("a cat AND a dog", ["AND"]),
        ("a cat and a dog", []),
        ("a cat <lora:film:0.7>", ["LoRAs"]),
        (r"a cat \(animal\)", ["escapes"]),
        ("a smile :) or :(", []),
        ("{red|blue} car", ["choices"]),
        ("(a cat:1.2", ["weights"]),
        ("a cat <lora:film:1", ["LoRAs"]),
        ("a cat < LoRA:film:1>", ["LoRAs"]),
        ("<easynegative>", ["tags"]),
        ("<|startoftext|> cat", ["tags"]),
        ("<random:a,b>", ["tags"]),
        ("a cat AND_PERP a dog", ["AND"]),
        ("a cat ADDCOL a dog", ["AND"]),
        ("cat-- well-known", ["plus and minus signs"]),
        ("cat::2 dog", ["options"]),
        ("a cat \u2014 or two", []),
        ("5 < 6, 3:2 and a>b", []),
    ],
)
def test_syntax_of_other_programs_is_named(prompt: str, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(unsupported_syntax(prompt)) == names
