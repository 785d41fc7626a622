"""What the cache keeps of an example, computed a fixed batch at a time."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from afa_jax.data.pictures import to_images
from afa_jax.data.shards import Arrays
from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.experts import Experts, encode_prompts
from afa_jax.models.vae import VAE
from afa_jax.types import Pixels

T = TypeVar("T")
R = TypeVar("R")
Row = tuple[np.ndarray, str] | BadExample
"""The crops uint8 ``[crops, rows, columns, 3]`` and the caption of an example."""


def crop_random(seed: int, index: int, crop: int) -> np.random.Generator:
    """The generator that cuts a cached crop of an example."""
    return np.random.default_rng((seed, index, crop))


def read_row(source: PictureSource, crop: Crop, crops: int, seed: int, index: int) -> Row:
    """Read an example and cut its crops; the error instead, where it is a bad one."""
    try:
        example = source[index]
    except BadExample as error:
        return error
    return np.stack([crop(example["image"], crop_random(seed, index, j)) for j in range(crops)]), example["caption"]


def ahead_of(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """``map`` by a pool's threads, in order, at most ``most`` ahead of what was taken."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Encoder:
    """VAE and text encoders, each compiled for one batch."""

    def __init__(self, experts: Experts, size: Sequence[int], crops: int, batch: int):
        self.experts, self.batch = experts, batch
        self._blank = np.zeros((crops, *size, 3), np.uint8)

    def __call__(self, rows: Sequence[Row]) -> Arrays:
        """The values of at most ``batch`` examples, zero for bad ones."""
        bad = np.array([isinstance(row, BadExample) for row in rows])
        images = [self._blank if isinstance(row, BadExample) else row[0] for row in rows]
        images += [self._blank] * (self.batch - len(rows))
        moments = [_moments(self.experts.vae, np.stack(crop)) for crop in zip(*images, strict=True)]
        mean, std = (np.stack(crops, 1)[: len(rows)] for crops in zip(*moments, strict=True))
        states = self.states(["" if isinstance(row, BadExample) else row[1] for row in rows])
        values = dict(mean=mean, std=std, states=states)
        for array in values.values():
            array[bad] = 0
        return values

    def states(self, captions: Sequence[str]) -> np.ndarray:
        """The text states ``[b, n, s, d]`` of at most ``batch`` captions."""
        ids = self.experts.tokenizer([*captions, *[""] * (self.batch - len(captions))])
        return np.stack(np.asarray(_states(self.experts.text_encoder, ids)), 1)[: len(captions)]


@jax.jit
def _moments(vae: VAE, pixels: Pixels) -> Any:
    return jax.tree.map(lambda x: x.astype(vae.dtype), vae.posterior(to_images(pixels)))


_states = jax.jit(encode_prompts)
