"""Pairs of pictures and captions to measure on; for emoji scenes, pairs that nothing is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Iterator

import numpy as np

from afa_jax.data.emoji.scenes import UNSEEN, SceneSource
from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError


def unseen(source: PictureSource) -> PictureSource:
    """Return emoji scenes that nothing trains on; for any other data, the source itself."""
    return dataclasses.replace(source, seed=UNSEEN) if isinstance(source, SceneSource) else source


def choose_pairs(source: PictureSource, crop: Crop | None, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Return pictures, uint8 ``[count, rows, columns, 3]``, and captions, chosen by a hash of ``seed``.

    An example that cannot be read is named in a warning, and the next one takes its place.

    Raises:
        InputError: the data has fewer readable examples.
    """
    pictures, captions = [], []
    for index in by_hash(len(source), seed):
        try:
            example = source[index]
        except BadExample as error:
            warnings.warn(f"left out: {error.name}: {error.reason}", stacklevel=2)
            continue
        image = example["image"]
        pictures.append(image if crop is None else crop(image, np.random.default_rng((seed, index))))
        captions.append(example["caption"])
        if len(pictures) == count:
            return np.stack(pictures), captions
    raise InputError(f"--pairs {count}: the data has only {len(pictures)} examples that can be read")


def by_hash(length: int, seed: int) -> Iterator[int]:
    """Yield all indices below ``length`` in the order of a hash of the seed, the same on every machine."""
    seen: set[int] = set()
    for number in itertools.count():
        if len(seen) == length:
            return
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        index = int.from_bytes(digest, "big") % length
        if index not in seen:
            seen.add(index)
            yield index
