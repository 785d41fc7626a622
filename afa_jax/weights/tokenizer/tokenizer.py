"""CLIP's tokenizer: from texts to token ids."""

from __future__ import annotations

import difflib
import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.models.configs import TextConfig
from afa_jax.weights.tokenizer.files import TokenizerFiles, read_tokenizer
from afa_jax.weights.tokenizer.parts import END_OF_WORD, WORDS, has_surrogates
from afa_jax.weights.tokenizer.prompts import shortened

LONGEST_CAPTION = 100_000
"""The most characters of a text; tokenizing that many takes 0.1 s. A prompt's limit is lower (prompts.py)."""


class Tokenizer:
    """CLIP's tokenizer from a diffusers folder, padded to the text encoder's length.

    Attributes:
        folder: the folder of its files.
        length: tokens of a prompt with its two ends: as the tokenizer says, at most the encoder's positions.

    Args:
        folder: the folder of its files, or the one that holds ``tokenizer/``.
        encoder: the text encoder that the ids are for.

    Raises:
        InputError: there is no tokenizer in it, one of another kind, or one that this text encoder does not fit; a file
            of it is damaged.
    """

    def __init__(self, folder: Path | str, encoder: TextConfig | None = None):
        self._made_of = folder, encoder
        files = read_tokenizer(folder)
        encoder_length = (encoder or TextConfig()).max_position_embeddings
        if encoder is not None:
            files.check_size(encoder.vocab_size)
        self.folder = files.folder
        self.length: int = min(files.max_length or encoder_length, encoder_length)
        self._tokenizer = _build(files)
        self._whole_words = files.whole_words
        self._added = {token.content for token in files.added}
        self._start, self._end, self._pad, self._unknown = (
            files.vocab[files.roles[role]] for role in ("bos_token", "eos_token", "pad_token", "unk_token")
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Return the sha256 of the tokenizer's files and their names."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".json", ".txt") and path.is_file():
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path | str, TextConfig | None]]:
        return Tokenizer, self._made_of  # a loader's worker process reads it anew

    def __call__(self, prompts: Sequence[str], *, quiet: bool = False) -> np.ndarray:
        """Return token ids ``[b, length]``, int32; cut prompts that are too long, and warn of the lost words.

        An empty prompt is the unconditional one.

        Args:
            prompts: texts.
            quiet: give no warning. A data set's captions have any length, and training uses as much as fits.

        Raises:
            InputError: a prompt is no text (half a character, NUL) or longer than LONGEST_CAPTION; it has characters
                that the vocabulary does not know, or, for a closed vocabulary, words that it does not know.
        """
        rows = []
        for prompt in prompts:
            ids = self._ids(prompt)
            room = self.length - 2
            if len(ids) > room and not quiet:
                lost = self._tokenizer.decode(ids[room:], skip_special_tokens=False).replace(END_OF_WORD, " ").strip()
                warnings.warn(
                    f"prompt {shortened(prompt)!r} has {len(ids)} tokens, {room} fit; lost: {shortened(lost)!r}",
                    UserWarning,
                    stacklevel=2,
                )
            ids = [self._start, *ids[:room], self._end]
            rows.append(ids + [self._pad] * (self.length - len(ids)))
        return np.asarray(rows, np.int32)

    def _ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt without the tokens at its ends; raise as __call__."""
        if len(prompt) > LONGEST_CAPTION:
            raise InputError(f"prompt {shortened(prompt)!r} has {len(prompt)} characters; {LONGEST_CAPTION} may be")
        if has_surrogates(prompt) or "\0" in prompt:
            raise InputError(f"prompt {shortened(prompt)!r}: it holds NUL or half a character; save it as UTF-8 text")
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        # CLIP's unknown token is its end of text; within a prompt it can only mean "unknown".
        if self._unknown in ids:
            raise InputError(f"prompt {shortened(prompt)!r}: the tokenizer does not know {self._unknown_of(prompt)!r}")
        if self._whole_words and (word := self._broken_word(ids)):
            words = [token.removesuffix(END_OF_WORD) for token in self._tokenizer.get_vocab() if END_OF_WORD in token]
            close = difflib.get_close_matches(word, [word for word in words if len(word) > 2], n=1)
            hint = f"did you mean {close[0]}?" if close else "its words are in tokenizer/vocab.json"
            raise InputError(
                f"prompt {shortened(prompt)!r}: these models never learnt the word {shortened(word)!r}; {hint}"
            )
        return ids

    def _broken_word(self, ids: Sequence[int]) -> str:
        """Return the first word that is not one token, or an empty text."""
        pieces: list[str] = []
        for token in map(self._tokenizer.id_to_token, ids):
            if token in self._added:  # whole by itself, such as a token that is a space
                continue
            pieces.append(token.removesuffix(END_OF_WORD))
            if token.endswith(END_OF_WORD):
                if len(pieces) > 1:
                    return "".join(pieces)
                pieces = []
        return "".join(pieces)

    def _unknown_of(self, prompt: str) -> str:
        return "".join(
            character
            for character in dict.fromkeys(prompt)
            if self._unknown in self._tokenizer.encode(character, add_special_tokens=False).ids
        )


def _build(files: TokenizerFiles) -> Any:
    """Build the tokenizer of these files as transformers' CLIPTokenizer does, without importing that (and torch)."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokenizer = Backend(
        models.BPE(
            vocab=dict(files.vocab),
            merges=list(files.merges),
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=files.roles["unk_token"],
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**token.to_json()) for token in files.added])
    return tokenizer
