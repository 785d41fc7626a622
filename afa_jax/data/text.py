"""Prompts as token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afa_jax.errors import InputError


class Tokenizer:
    """CLIP's tokenizer from a diffusers folder, padded to the text encoder's length.

    Args:
        folder: the folder that holds ``tokenizer/``.

    Raises:
        InputError: there is no tokenizer in it.
    """

    def __init__(self, folder: Path | str):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which we do not use
        from transformers import CLIPTokenizer  # takes a second, and most of the package does without it

        path = Path(folder) / "tokenizer"
        if not (path / "vocab.json").is_file():
            raise InputError(f"{path}: no tokenizer there (vocab.json and merges.txt)")
        self._tokenizer = CLIPTokenizer.from_pretrained(path)
        self.length: int = self._tokenizer.model_max_length

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids ``[b, length]``, int32. Prompts that are too long are cut, with a warning that names what is lost.

        An empty prompt is the unconditional one and stands for itself.

        Raises:
            InputError: a prompt has characters that the vocabulary does not know.
        """
        rows = []
        for prompt in prompts:
            ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
            # CLIP's unknown token is its end of text; within a prompt it can only mean "unknown".
            if self._tokenizer.unk_token_id in ids:
                raise InputError(f"prompt {prompt!r}: the tokenizer does not know {self._unknown(prompt)!r}")
            room = self.length - 2
            if len(ids) > room:
                lost = self._tokenizer.decode(ids[room:]).strip()
                warnings.warn(
                    f"prompt {prompt!r} has {len(ids)} tokens, {room} fit; lost: {lost!r}", UserWarning, stacklevel=2
                )
            ids = [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]
            rows.append(ids + [self._tokenizer.pad_token_id] * (self.length - len(ids)))
        return np.asarray(rows, np.int32)

    def _unknown(self, prompt: str) -> str:
        unknown = self._tokenizer.unk_token_id
        return "".join(
            dict.fromkeys(
                character
                for character in prompt
                if unknown in self._tokenizer(character, add_special_tokens=False)["input_ids"]
            )
        )
