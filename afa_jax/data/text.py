"""Prompts as token ids."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afa_jax.errors import InputError

END = "</w>"  # ends the last token of a word


class Tokenizer:
    """CLIP's tokenizer from a diffusers folder, padded to the text encoder's length.

    Args:
        folder: the folder of its files, or the one that holds ``tokenizer/``.

    Raises:
        InputError: there is no tokenizer in it.
    """

    def __init__(self, folder: Path | str):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which we do not use
        from transformers import CLIPTokenizer  # takes a second, and most of the package does without it

        self._folder = folder
        path = Path(folder) if (Path(folder) / "vocab.json").is_file() else Path(folder) / "tokenizer"
        if not (path / "vocab.json").is_file():
            raise InputError(f"{path}: no tokenizer there (vocab.json and merges.txt)")
        self._tokenizer = CLIPTokenizer.from_pretrained(path)
        # Our own field of tokenizer_config.json, for a closed vocabulary of words: pieces of others mean nothing.
        self._whole_words = bool(self._tokenizer.init_kwargs.get("whole_words", False))
        self.length: int = self._tokenizer.model_max_length
        self._files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".txt"))

    @functools.cached_property
    def sha256(self) -> str:
        """Of the tokenizer's files, with their names."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path | str]]:
        return Tokenizer, (self._folder,)  # a loader's worker process reads it anew

    def __call__(self, prompts: Sequence[str], *, quiet: bool = False) -> np.ndarray:
        """Token ids ``[b, length]``, int32. Prompts that are too long are cut, with a warning that names what is lost.

        An empty prompt is the unconditional one and stands for itself.

        Args:
            prompts: texts.
            quiet: no warning: the captions of a data set are of any length, and are trained on as far as they fit.

        Raises:
            InputError: a prompt has characters that the vocabulary does not know, or, where it is closed, words.
        """
        rows = []
        for prompt in prompts:
            ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
            # CLIP's unknown token is its end of text; within a prompt it can only mean "unknown".
            if self._tokenizer.unk_token_id in ids:
                raise InputError(f"prompt {prompt!r}: the tokenizer does not know {self._unknown(prompt)!r}")
            if self._whole_words and (word := self._broken_word(ids)):
                known = [token.removesuffix(END) for token in self._tokenizer.get_vocab() if token.endswith(END)]
                close = difflib.get_close_matches(word, [word for word in known if len(word) > 2], n=1)
                hint = f"did you mean {close[0]}?" if close else "its words are in tokenizer/vocab.json"
                raise InputError(f"prompt {prompt!r}: these models never learnt the word {word!r}; {hint}")
            room = self.length - 2
            if len(ids) > room and not quiet:
                lost = self._tokenizer.decode(ids[room:]).strip()
                warnings.warn(
                    f"prompt {prompt!r} has {len(ids)} tokens, {room} fit; lost: {lost!r}", UserWarning, stacklevel=2
                )
            ids = [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]
            rows.append(ids + [self._tokenizer.pad_token_id] * (self.length - len(ids)))
        return np.asarray(rows, np.int32)

    def _broken_word(self, ids: Sequence[int]) -> str:
        """The first word that is not one token, or nothing."""
        pieces: list[str] = []
        for token in self._tokenizer.convert_ids_to_tokens(ids):
            pieces.append(token.removesuffix(END))
            if token.endswith(END):
                if len(pieces) > 1:
                    return "".join(pieces)
                pieces = []
        return "".join(pieces)

    def _unknown(self, prompt: str) -> str:
        unknown = self._tokenizer.unk_token_id
        return "".join(
            dict.fromkeys(
                character
                for character in prompt
                if unknown in self._tokenizer(character, add_special_tokens=False)["input_ids"]
            )
        )
