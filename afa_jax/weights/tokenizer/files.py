"""The files of CLIP's tokenizer: vocab.json and merges.txt, or tokenizer.json alone as transformers 5 saves it.

Beside them may be tokenizer_config.json, special_tokens_map.json and added_tokens.json. They mean what transformers
reads from them. Only these are read, as data: no other file that one of them names, and no code.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.weights.tokenizer.parts import (
    END_OF_WORD,
    AddedToken,
    Entry,
    Merge,
    added_json,
    decoder_tokens,
    is_generic,
    json_merges,
    listed_tokens,
    own_roles,
    read_flag,
    read_ids,
    read_max_length,
    read_merges,
    read_object,
    special_tokens,
)

VOCAB, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKENIZER = (VOCAB, MERGES, ADDED, CONFIG, SPECIAL, WHOLE)
"""The files of a tokenizer; the folder may hold other things too."""
_ROLES = dict(
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
)
"""The defaults of transformers' CLIPTokenizer, where no file says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The contents of a tokenizer's files.

    Attributes:
        folder: the folder of the files.
        vocab: the ids of all tokens, no two alike.
        files: for each token that the vocabulary itself lacks, the file that gives its id.
        merges: the pairs that become one token, in order; all pairs' tokens and their results are in ``vocab``.
        added: the tokens that are found in a text before all others.
        roles: the tokens that are bos_token, eos_token, pad_token and unk_token.
        max_length: the most tokens of a prompt with both its ends, if the files set a limit.
        whole_words: whether the vocabulary is closed, so that a word of several tokens is unknown; a field of this
            project in tokenizer_config.json.
    """

    folder: Path
    vocab: Mapping[str, int]
    files: Mapping[str, str]
    merges: Sequence[Merge]
    added: Sequence[AddedToken]
    roles: Mapping[str, str]
    max_length: int | None
    whole_words: bool

    def check_size(self, vocab_size: int) -> None:
        """Raise InputError for a token that a text encoder of ``vocab_size`` tokens does not know."""
        token = max(self.vocab, key=lambda token: self.vocab[token])
        if self.vocab[token] >= vocab_size:
            raise InputError(
                f"{self.folder / self.files.get(token, _main(self.folder))}: {token!r:.80} has the id "
                f"{self.vocab[token]}, and the text encoder knows 0 to {vocab_size - 1} (its vocab_size); "
                "take the tokenizer that belongs to it"
            )

    def write(self, folder: Path) -> None:
        """Copy the files into a new folder, and write vocab.json, merges.txt and added_tokens.json where they lack.

        Without these transformers before version 5, and diffusers with it, finds no tokenizer.
        """
        folder.mkdir(parents=True)
        for name in TOKENIZER:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        beside = {token: self.vocab[token] for token in self.files if token not in self.roles.values()}
        vocab = {token: number for token, number in self.vocab.items() if token not in beside}
        texts = {
            VOCAB: json.dumps(vocab, ensure_ascii=False),
            MERGES: "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]),
            ADDED: json.dumps(beside, ensure_ascii=False) if beside else "",
        }
        for name, text in texts.items():
            if text and not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")


def find_tokenizer(folder: Path | str) -> Path:
    """Return the folder of a tokenizer's files: ``folder``, or ``tokenizer/`` in it."""
    here = any((Path(folder) / name).is_file() for name in (VOCAB, WHOLE))
    return Path(folder) if here else Path(folder) / "tokenizer"


def read_tokenizer(folder: Path | str) -> TokenizerFiles:
    """Read the tokenizer of a folder, which has its files itself or in ``tokenizer/``.

    Raises:
        InputError: there is no tokenizer, or one of another kind; a file is damaged, or contradicts another.
    """
    folder = find_tokenizer(folder)
    config = read_object(folder / CONFIG) or {}
    generic = is_generic(config, folder / CONFIG)
    vocab, merges, listed, own = _read_vocabulary(folder, generic)
    named = dict(special_tokens(config, _ROLES, folder / CONFIG))
    of_map = dict(special_tokens(read_object(folder / SPECIAL) or {}, _ROLES, folder / SPECIAL))
    if config.get("added_tokens_decoder") is None:  # as in transformers: else tokenizer_config.json decides
        named |= of_map
    special = {token.content for token, _ in named.values()}
    files, tokens = dict[str, str](), dict[str, AddedToken]()
    entries = [*decoder_tokens(config, folder / CONFIG), *listed, *added_json(folder / ADDED, special)]
    for token, number, path in entries:
        content = token.content
        if content not in vocab:
            vocab[content], files[content] = number, path.name
        elif vocab[content] != number:
            raise InputError(
                f"{path}: {content!r:.80} has the id {number}, and {files.get(content, _main(folder))} says "
                f"{vocab[content]}; remove the file that is not of this tokenizer, or fetch all of them again"
            )
        tokens.setdefault(content, token)
    for key, (token, path) in named.items():
        if token.content not in vocab:
            raise InputError(
                f"{path}: {key} is {token.content!r:.80}, which is not in the vocabulary; name a token of it"
            )
        tokens[token.content] = dataclasses.replace(tokens.get(token.content, token), special=True)
    said = {role: named[role][0].content for role in _ROLES if role in named}
    ends = {role: own[role] for role in ("bos_token", "eos_token") if role in own}  # the tokens at both ends
    roles = _ROLES | own | said | ends
    for role, content in roles.items():
        if content not in vocab:
            raise InputError(f"{folder / _main(folder)}: it lacks {content!r:.80}, the {role}; fetch the file again")
        tokens.setdefault(content, AddedToken(content=content, special=True))
    _check_unique(vocab, folder)
    _check_made(vocab, merges, tokens, folder)
    return TokenizerFiles(
        folder=folder,
        vocab=vocab,
        files=files,
        merges=merges,
        added=sorted(tokens.values(), key=lambda token: vocab[token.content]),
        roles=roles,
        max_length=read_max_length(config, folder / CONFIG),
        whole_words=read_flag(config, "whole_words", folder / CONFIG),
    )


def _main(folder: Path) -> str:
    """Return the name of the file with the vocabulary."""
    return WHOLE if (folder / WHOLE).is_file() else VOCAB


def _read_vocabulary(folder: Path, generic: bool) -> tuple[dict[str, int], list[Merge], list[Entry], dict[str, str]]:
    """Read ids, merges and added tokens from tokenizer.json, or vocab.json and merges.txt; if both, they must agree.

    The fourth result is the roles of tokens that a ``generic`` tokenizer.json gives by itself.
    """
    whole, ids = read_object(folder / WHOLE), read_object(folder / VOCAB)
    has_merges = (folder / MERGES).is_file()
    if whole is None and (ids is None or not has_merges):
        if ids is not None or has_merges:
            here, missing = (VOCAB, MERGES) if ids is not None else (MERGES, VOCAB)
            raise InputError(f"{folder / missing}: not there, and {here} is; fetch both, or {WHOLE}")
        raise InputError(f"{folder}: no tokenizer there ({VOCAB} and {MERGES}, or {WHOLE}); name the folder of one")
    if generic and whole is None:
        raise InputError(f"{folder / WHOLE}: not there, and {CONFIG} wants it; fetch it")
    vocab = {} if ids is None else read_ids(ids, str(folder / VOCAB))
    if whole is None:
        return vocab, read_merges(folder / MERGES, vocab), [], {}
    path, model = folder / WHOLE, whole.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise InputError(f"{path}: its model is not CLIP's, BPE with the end_of_word_suffix {END_OF_WORD!r}")
    own, listed = read_ids(model.get("vocab"), f"{path}: model.vocab"), list(listed_tokens(whole, path))
    merges = json_merges(model.get("merges"), path, own)
    known = {token.content: number for token, number, _ in listed} | own
    for token, number in vocab.items():
        if known.get(token) != number:
            other = f"the id {known[token]}" if token in known else "no such token"
            raise InputError(
                f"{folder / VOCAB}: {token!r:.80} has the id {number}, and {WHOLE} has {other}; remove the file that "
                "is not of this tokenizer"
            )
    if has_merges and list(dict.fromkeys(read_merges(folder / MERGES, own))) != list(dict.fromkeys(merges)):
        raise InputError(f"{folder / MERGES}: not the merges of {WHOLE}; remove the file that is not of this tokenizer")
    return own, merges, listed, own_roles(whole, path, known) if generic else {}


def _check_made(vocab: Mapping[str, int], merges: Sequence[Merge], added: Collection[str], folder: Path) -> None:
    """Raise InputError for a token that no merge makes; the file may be cut, and words would get wrong tokens."""
    made = {first + second for first, second in merges}
    for token in vocab:
        if len(token.removesuffix(END_OF_WORD)) > 1 and token not in made and token not in added:
            where = _main(folder) if _main(folder) == WHOLE else MERGES
            raise InputError(
                f"{folder / where}: no merge makes the token {token!r:.80}; the file is cut or of another tokenizer, "
                "fetch it again"
            )


def _check_unique(vocab: Mapping[str, int], folder: Path) -> None:
    """Raise InputError for two tokens with one id."""
    seen = dict[int, str]()
    for token, number in vocab.items():
        if (other := seen.setdefault(number, token)) != token:
            raise InputError(
                f"{folder / _main(folder)}: {other!r:.80} and {token!r:.80} have one id, {number}; fetch the file again"
            )
