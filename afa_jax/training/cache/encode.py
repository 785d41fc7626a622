"""Computation of the cached values, in batches of a fixed size."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import VAE, to_images
from afa_jax.training.cache.shards import Arrays
from afa_jax.types import Pixels
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")
Row = tuple[np.ndarray, np.ndarray] | BadExample
"""An example's crops, uint8 ``[crops, rows, columns, 3]``, and token ids ``[s]``; or why it cannot be read."""


def crop_random(seed: int, index: int, crop: int) -> np.random.Generator:
    """Return the random generator that cuts a cached crop of an example."""
    return np.random.default_rng((seed, index, crop))


def read_row(source: PictureSource, tokenizer: Tokenizer, crop: Crop | None, crops: int, seed: int, index: int) -> Row:
    """Read an example, cut its crops and tokenize its caption; return the error instead if the example is bad."""
    try:
        example = source[index]
        (ids,) = tokenizer([example["caption"]], quiet=True)
    except BadExample as error:
        return error
    except InputError as error:  # a word or character that the vocabulary does not have
        return BadExample(source.name(index), str(error))
    image = example["image"]
    return np.stack([crop(image, crop_random(seed, index, j)) if crop else image for j in range(crops)]), ids


def ahead_of(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """Yield ``function(item)`` for each item in order, computed by a pool's threads at most ``most`` items ahead."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Encoder:
    """The VAE and the text encoders, each compiled for one batch size."""

    def __init__(self, experts: Experts, size: Sequence[int], crops: int, batch: int):
        self.experts, self.batch = experts, batch
        self._blank = np.zeros((crops, *size, 3), np.uint8), experts.tokenizer([""])[0]

    def __call__(self, rows: Sequence[Row]) -> Arrays:
        """Return the cached values of at most ``batch`` examples; those of bad examples are zero."""
        bad = np.array([isinstance(row, BadExample) for row in rows])
        good = [self._blank if isinstance(row, BadExample) else row for row in rows]
        good += [self._blank] * (self.batch - len(rows))
        images, ids = zip(*good, strict=True)
        moments = [_moments(self.experts.vae, np.stack(crop)) for crop in zip(*images, strict=True)]
        mean, std = (np.stack(crops, 1) for crops in zip(*moments, strict=True))
        states = np.stack(_states(self.experts.text_encoder, np.stack(ids)), 1)
        values = {name: x[: len(rows)] for name, x in dict(mean=mean, std=std, states=states).items()}
        for array in values.values():
            array[bad] = 0
        return values

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the shape and dtype of each of an example's values, without computing them."""
        images, ids = self._blank
        mean, std = jax.eval_shape(_moments, self.experts.vae, images)
        states = jax.eval_shape(_states, self.experts.text_encoder, ids[None])
        crops = (images.shape[0], *mean.shape[1:])
        return dict(
            mean=(crops, np.dtype(mean.dtype)),
            std=(crops, np.dtype(std.dtype)),
            states=((states.shape[0], *states.shape[2:]), np.dtype(states.dtype)),
        )

    def no_caption(self) -> np.ndarray:
        """Return the text states ``[n, s, d]`` of the empty caption."""
        states = np.asarray(_states(self.experts.text_encoder, self._blank[1][None]))[:, 0]
        check_finite(dict(states=states[None]), lambda _: "the empty caption", [0])
        return states


def check_finite(values: Arrays, name: Callable[[int], str], examples: Sequence[int]) -> None:
    """Raise InputError for values that a cache must not keep.

    Args:
        values: arrays ``[m, ...]``.
        name: returns the name of an example.
        examples: the examples that the values belong to; more of them do no harm.

    Raises:
        InputError: a value is NaN or infinity; the error names the examples.
    """
    finite = np.all([np.isfinite(array.reshape(len(array), -1)).all(1) for array in values.values()], axis=0)
    if not finite.all():
        wrong = ", ".join(name(examples[int(row)]) for row in np.flatnonzero(~finite))
        raise InputError(f"{wrong}: the VAE or an expert's text encoder gives NaN or infinity; try dtype=float32")


@jax.jit
def _moments(vae: VAE, pixels: Pixels) -> Any:
    return jax.tree.map(lambda x: x.astype(vae.dtype), vae.posterior(to_images(pixels)))


_states = jax.jit(lambda text_encoder, ids: encode_prompts(text_encoder, ids).text)
