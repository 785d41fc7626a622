"""Readers of a tokenizer's files, which bound and check what they read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError, why

END_OF_WORD = "</w>"  # ends the last token of a word
LARGEST = 8 << 20  # bytes of a file: CLIP's largest has 4 MB, and 8 MiB of brackets are 200 MB of Python's objects
Merge = tuple[str, str]

_IDS = 2**31
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_GENERIC = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # classes for any tokenizer.json, which alone defines the tokenizer
_AGAIN = "fetch the file again"
_TAKE = f"take a tokenizer of CLIP ({_CLASSES[0]})"
_ENDS = r"<\|startoftext\|>|<\|endoftext\|>|"
WORDS = _ENDS + r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The pattern by which CLIP splits a text into words."""
_NORMALIZERS = (dict(type="NFC"), dict(type="Replace", pattern=dict(Regex=r"\s+"), content=" "), dict(type="Lowercase"))
_SPLITS = (
    dict(type="Split", behavior="Removed", invert=True),
    dict(type="ByteLevel", add_prefix_space=False, use_regex=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before the text is split into words; the fields of ``tokenizers.AddedToken``.

    Attributes:
        normalized: whether it is found in the normalized text; None means unless it is special.
    """

    content: str
    special: bool = False
    normalized: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the arguments of ``tokenizers.AddedToken``."""
        normalized = not self.special if self.normalized is None else self.normalized
        return dataclasses.asdict(self) | dict(normalized=normalized)


Entry = tuple[AddedToken, int, Path]
"""An added token, its id, and the file that defines it."""


def read_text(path: Path) -> str:
    """Read a file in UTF-8.

    Raises:
        InputError: it is too large, not UTF-8, or the system does not let it be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; mend that") from error
    if len(data) > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB, as no file of CLIP's tokenizer is; {_AGAIN}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); {_AGAIN}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None for a file that is not there.

    Raises:
        InputError: as read_text; or it is not JSON, or no object.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({why(error)}); {_AGAIN}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: no JSON object; {_AGAIN}")
    return data


def is_generic(config: Mapping[str, Any], path: Path) -> bool:
    """Return whether tokenizer_config.json names a class for any tokenizer.json, rather than CLIP's.

    Raises:
        InputError: it names the class of another tokenizer.
    """
    name = config.get("tokenizer_class")
    if name is None and "auto_map" in config:
        raise InputError(f"{path}: auto_map names code, which is not run; {_TAKE}")
    if name is not None and name not in (*_CLASSES, *_GENERIC):
        raise InputError(f"{path}: tokenizer_class is {name!r:.80}; Stable Diffusion 1.x/2.x takes a {_CLASSES[0]}")
    return name in _GENERIC


def own_roles(whole: Mapping[str, Any], path: Path, ids: Mapping[str, int]) -> dict[str, str]:
    """Return the roles of tokens that tokenizer.json gives by itself: the two ends, and perhaps the padding.

    Raises:
        InputError: it treats a text differently than CLIP's tokenizer does.
    """
    model, splits = whole["model"], _steps(whole, "pre_tokenizer", "pretokenizers")
    split = splits[0].get("pattern") if splits else None
    regex = split.get("Regex") if isinstance(split, dict) else None
    alike = dict(
        normalizer=_does(_steps(whole, "normalizer", "normalizers"), _NORMALIZERS),
        pre_tokenizer=_does(splits, _SPLITS) and regex in (WORDS, WORDS.removeprefix(_ENDS)),  # both have been saved
        model=not any(map(model.get, ("continuing_subword_prefix", "dropout", "byte_fallback", "ignore_merges"))),
    )
    roles = _ends(whole.get("post_processor"), ids)
    for key, is_clips in (alike | dict(post_processor=bool(roles))).items():
        if not is_clips:
            raise InputError(f"{path}: its {key} is not CLIP's; {_TAKE}")
    padding = whole.get("padding")
    fill = padding.get("pad_token") if isinstance(padding, dict) else None
    return roles | (dict(pad_token=fill) if isinstance(fill, str) else {})


def _steps(whole: Mapping[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json; none if they are damaged."""
    part = whole.get(key)
    steps = part.get(inner) if isinstance(part, dict) else None
    return steps if isinstance(steps, list) and all(isinstance(step, dict) for step in steps) else []


def _does(steps: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each step has the wanted fields; older files lack use_regex, which then counts as true."""
    known = [{"use_regex": True, **step} for step in steps]
    return len(known) == len(wanted) and all({**step, **want} == step for step, want in zip(known, wanted, strict=True))


def _ends(post: Any, ids: Mapping[str, int]) -> dict[str, str]:
    """Return the tokens that a post_processor puts at both ends of a prompt; none where it does something else."""
    match post:
        case {"type": "RobertaProcessing", "cls": [str(first), first_id], "sep": [str(last), last_id]}:
            pass
        case {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": str(first)}}, {"Sequence": _}, {"SpecialToken": {"id": str(last)}}],
            "special_tokens": dict(special),
        }:
            try:
                (first_id,), (last_id,) = special[first]["ids"], special[last]["ids"]
            except (KeyError, TypeError, ValueError):
                return {}
        case _:
            return {}
    same = first in ids and last in ids and (ids[first], ids[last]) == (first_id, last_id)
    return dict(bos_token=first, eos_token=last) if same else {}


def read_ids(data: Any, where: str) -> dict[str, int]:
    """Check a table from tokens to ids."""
    if not isinstance(data, dict) or not data:
        raise InputError(f"{where} is no table from tokens to ids, or an empty one; {_AGAIN}")
    for token, number in data.items():
        _check_token(token, where)
        _check_id(number, token, where)
    return data


def read_merges(path: Path, vocab: Mapping[str, int]) -> list[Merge]:
    """Read merges.txt: a pair of tokens a line, after a line ``#version``."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    header = bool(lines) and lines[0].startswith("#version")
    pairs = [line.split(" ") for line in lines[header:]]
    return _check_merges(pairs, vocab, lambda index: f"{path}:{index + 1 + header}")


def json_merges(data: Any, path: Path, vocab: Mapping[str, int]) -> list[Merge]:
    """Check the merges of tokenizer.json, pairs or texts with a space between."""
    if not isinstance(data, list):
        raise InputError(f"{path}: model.merges is no list; {_AGAIN}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in data]
    return _check_merges(pairs, vocab, lambda index: f"{path}: model.merges[{index}]")


def _check_merges(pairs: Sequence[Any], vocab: Mapping[str, int], where: Callable[[int], str]) -> list[Merge]:
    merges: list[Merge] = []
    for index, pair in enumerate(pairs):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(p, str) and p.split() == [p] for p in pair)
        ):
            raise InputError(f"{where(index)}: {pair!r:.80} is no pair of tokens; {_AGAIN}")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise InputError(
                    f"{where(index)}: the merge {' '.join(pair)!r:.80} wants {token!r:.80}, which is no token"
                )
        merges.append((pair[0], pair[1]))
    return merges


def decoder_tokens(config: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """Yield the added tokens of tokenizer_config.json: ``added_tokens_decoder``, a token by its id."""
    key = "added_tokens_decoder"
    table = config.get(key)
    if table is None:
        return
    if not isinstance(table, dict):
        raise InputError(f"{path}: {key} is no table from ids to tokens; {_AGAIN}")
    for number, token in table.items():
        read = _read_token(token, f"{path}: {key}.{number}")
        plain = number.isascii() and number.isdigit() and len(number) <= len(str(_IDS))
        yield read, _check_id(int(number) if plain else number, read.content, f"{path}: {key}"), path


def listed_tokens(whole: Mapping[str, Any], path: Path) -> Iterator[Entry]:
    """Yield the ``added_tokens`` of tokenizer.json."""
    entries = whole.get("added_tokens")
    if not isinstance(entries, list | None):
        raise InputError(f"{path}: added_tokens is no list; {_AGAIN}")
    for index, entry in enumerate(entries or ()):
        where = f"{path}: added_tokens[{index}]"
        token = _read_token(entry, where)
        number = entry.get("id") if isinstance(entry, dict) else None
        yield token, _check_id(number, token.content, where), path


def added_json(path: Path, special: Collection[str]) -> Iterator[Entry]:
    """Yield the tokens of added_tokens.json, an id by its token."""
    data = read_object(path)
    for token, number in read_ids(data, f"{path}").items() if data else ():
        yield AddedToken(content=token, special=token in special), number, path


def special_tokens(
    data: Mapping[str, Any], roles: Collection[str], path: Path
) -> Iterator[tuple[str, tuple[AddedToken, Path]]]:
    """Yield the special tokens of tokenizer_config.json or special_tokens_map.json, by their fields' names.

    These are ``bos_token`` and the like, any other field whose name ends in ``_token``, and lists of more.
    """
    for key, value in data.items():
        if value is None:  # not said
            continue
        if key in roles or (key.endswith("_token") and isinstance(value, str | dict)):
            yield key, (_read_token(value, f"{path}: {key}"), path)
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            if not isinstance(value, list | dict):
                raise InputError(f"{path}: {key} is no list of tokens; {_AGAIN}")
            for index, token in value.items() if isinstance(value, dict) else enumerate(value):
                where = f"{key}.{index}"
                yield where, (_read_token(token, f"{path}: {where}"), path)


def read_max_length(config: Mapping[str, Any], path: Path) -> int | None:
    """Read ``model_max_length`` of tokenizer_config.json; None if it is missing, or so large that it means no limit."""
    value = config.get("model_max_length")
    if value is None:
        return None
    whole = isinstance(value, int | float) and (value == math.inf or value % 1 == 0)  # 77.0 too, and 1e30
    if isinstance(value, bool) or not whole or value < 3:
        raise InputError(
            f"{path}: model_max_length is {value!r:.80}; write how many tokens a prompt has with its ends, such as 77"
        )
    return int(value) if value < _IDS else None


def read_flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    """Read a field of tokenizer_config.json that is true or false; return False if it is missing."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r:.80}; write true or false")
    return value


def _read_token(value: Any, where: str) -> AddedToken:
    """Read a token: a text, or an object with ``content`` and flags of how it is matched."""
    if not isinstance(value, dict):
        _check_token(value, where)
        return AddedToken(content=value)
    _check_token(value.get("content"), f"{where}.content")
    names = [field.name for field in dataclasses.fields(AddedToken)[1:]]
    flags: dict[str, Any] = {name: value[name] for name in names if value.get(name) is not None}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"{where}.{name} is {flag!r:.80}; write true or false")
    return AddedToken(content=value["content"], **flags)


def _check_token(token: Any, where: str) -> None:
    if not isinstance(token, str) or not token or has_surrogates(token):
        raise InputError(f'{where} is {token!r:.80}; write a token, such as "<|endoftext|>"')


def has_surrogates(text: str) -> bool:
    """Return whether a text has half characters (surrogates), which neither UTF-8 files nor tokenizers can hold."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _check_id(number: Any, token: str, where: str) -> int:
    if type(number) is not int or not 0 <= number < _IDS:
        raise InputError(
            f"{where}: {token!r:.80} has the id {number!r:.80}; that is a whole number from 0 to {_IDS - 1}"
        )
    return number
