"""Batches through grain, a pure function of (source, seed, step): a resumed run continues with the next batch.

Position ``step * batch + row`` of a run is mapped to an index of the source, by a shuffle that differs in each epoch.
All randomness of an example follows from (seed, position), so there is no state to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.data.workers import read_in_processes
from afa_jax.errors import InputError
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

MOST_WORKERS = 1024
EXAMPLES = 2**50
"""An upper bound of the examples that a run draws."""

Row = dict[str, Any]
"""One example: the fields of Batch without the axis b. Its ``bad`` lists the examples that it replaces."""

Batch = dict[str, Any]
"""``b`` examples of this process:

* ``image`` uint8 ``[b, rows, columns, 3]`` and ``ids`` int32 ``[b, tokens]``; or, from a cache, ``mean`` and ``std``
  float32 ``[b, h, w, c]`` (the VAE's moments, unscaled) and ``states`` ``[b, n, tokens, d]`` (of N text encoders);
* ``index`` int64 ``[b]``, into the source, and ``position`` int64 ``[b]``, the number of the example in the run;
* with bad="skip" also ``bad``, a list of (name, reason) of examples that were replaced: BadExamples takes it out.
"""


def loading(config: ConfigDict) -> dict[str, Any]:
    """Return the arguments of make_loader that are in ``config.data``: ``size``, ``flip``, ``bad`` and ``workers``.

    Only emoji scenes, which are all of one size, may go without ``size``.

    Raises:
        InputError: the size is missing or no size, or a value of ``bad`` or ``workers`` that no loader takes.
    """
    check_reading(config.get("bad", "error"), config.get("workers", 0))
    size = config.get("size")
    if size is None and config.kind != "emoji":
        raise InputError(f"data.size=(rows, columns) is missing; kind={config.kind} has pictures of any size")
    if size is not None and not (
        isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(number, int) for number in size)
    ):
        raise InputError(f"data.size={size}: choose (rows, columns)")
    return dict(
        crop=None if size is None else Crop(tuple(size), bool(config.get("flip", False))),
        bad=config.get("bad", "error"),
        workers=config.get("workers", 0),
    )


def check_reading(bad: object, workers: object = 0) -> None:
    """Raise InputError unless ``bad`` is a known way to treat bad examples and ``workers`` a possible number."""
    if bad not in ("error", "skip"):
        raise InputError(f"data.bad={bad!r}: choose error or skip")
    if not isinstance(workers, int) or isinstance(workers, bool) or not 0 <= workers <= MOST_WORKERS:
        raise InputError(f"data.workers={workers!r}; choose 0 to {MOST_WORKERS} processes")


def make_loader(
    source: PictureSource,
    tokenizer: Tokenizer,
    *,
    batch: int,
    seed: int,
    crop: Crop | None = None,
    bad: str = "error",
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Make a loader of pictures and token ids; with ``crop`` None the source's pictures must be of one size.

    Args:
        source: the source to read.
        tokenizer: the tokenizer of the captions.
        batch: the number of examples of a step, over all processes.
        seed: the seed of the order and the crops.
        crop: cuts pictures to one size.
        bad: "error" stops at an example without a readable picture or a caption; "skip" takes the next good one of the
            source in its place and says so in the batch.
        workers: processes that read ahead; 0 reads ahead with threads of this one.
        process_index: the number of this process.
        process_count: the number of processes of the run.

    Raises:
        InputError: as Loader, or ``bad`` has another value.
    """
    check_reading(bad)
    read = ReadPicture(source, tokenizer, crop, seed, bad == "skip")
    return Loader(
        read, len(source), batch=batch, seed=seed, workers=workers,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReadPicture:
    """``(position, index) -> row`` with ``image`` and ``ids``; picklable, as worker processes need it."""

    source: Any
    tokenizer: Tokenizer
    crop: Crop | None
    seed: int
    skip: bool

    def __call__(self, position: int, index: int) -> Row:
        bad: list[tuple[str, str]] = []
        for offset in range(len(self.source)):
            number = (index + offset) % len(self.source)
            try:
                row = self._read(position, number)
            except BadExample as error:
                if not self.skip:
                    raise
                bad.append((error.name, error.reason))
                continue
            return row | (dict(bad=bad) if self.skip else {})
        raise InputError(f"none of the {len(self.source)} examples is good; the first: {bad[0][0]}: {bad[0][1]}")

    def _read(self, position: int, index: int) -> Row:
        example = self.source[index]
        image = example["image"]
        if self.crop is not None:
            image = self.crop(image, np.random.default_rng((self.seed, position)))
        try:
            (ids,) = self.tokenizer([example["caption"]], quiet=True)
        except InputError as error:  # a word or character that the vocabulary does not have
            raise BadExample(self.source.name(index), str(error)) from error
        return dict(image=image, ids=ids, index=np.int64(index), position=np.int64(position))


def collate(rows: Sequence[Row]) -> Batch:
    """Make a batch of rows: join ``bad`` and stack everything else.

    Raises:
        InputError: pictures of different sizes.
    """
    if len(shapes := {row["image"].shape for row in rows if "image" in row}) > 1:
        raise InputError(f"pictures of different sizes, {sorted(shapes)[0]} and {sorted(shapes)[1]}: set data.size")
    batch: Batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "bad"}
    if "bad" in rows[0]:
        batch["bad"] = [named for row in rows for named in row["bad"]]
    return batch


class Loader:
    """Endless batches of a data set, shuffled anew in each epoch.

    Process i of p reads the rows ``i::p`` of each global batch: so all processes read what a single one would.

    Args:
        read: ``(position, index) -> row``; with workers it must be picklable.
        length: the number of examples of the data set.
        batch: the number of examples of a step, over all processes.
        seed: the seed of the order.
        collate: rows -> batch.
        workers: processes that read ahead; with 0, ``threads`` of this process do.
        threads: the number of batches read at the same time, by each worker if there are any.
        process_index: the number of this process.
        process_count: the number of processes of the run.

    Raises:
        InputError: a data set smaller than a batch, or a batch that does not divide among the processes.
    """

    def __init__(
        self,
        read: Callable[[int, int], Row],
        length: int,
        *,
        batch: int,
        seed: int,
        collate: Callable[[Sequence[Row]], Batch] = collate,
        workers: int = 0,
        threads: int = 4,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if length < batch:
            raise InputError(f"{length} pictures are fewer than a batch of {batch}")
        if batch % process_count:
            raise InputError(f"batch={batch} does not divide among {process_count} processes")
        check_reading("error", workers)
        self.length, self.batch, self.workers, self.threads = length, batch, workers, threads
        # A finite number of epochs, because grain cannot batch an endless dataset, whose length is the largest integer.
        order = grain.MapDataset.range(length).seed(seed).shuffle().repeat(EXAMPLES // length + 1)
        rows = order.map_with_index(read)[process_index::process_count]
        self._batches = rows.batch(batch // process_count, batch_fn=collate)

    def at(self, step: int) -> Batch:
        """Read and return the batch of a step."""
        return self._batches[step]

    def iterate(self, first_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches from a step on, read ahead; closing the generator ends its threads or processes."""
        if self.workers:
            batches: Any = read_in_processes(self._batches, first_step, self.workers, self.threads)
        else:
            options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
            batches = iter(self._batches[first_step:].to_iter_dataset(options))
        with contextlib.closing(batches):
            yield from batches
