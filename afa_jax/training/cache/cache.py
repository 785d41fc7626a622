"""The cache of frozen results: the VAE's moments of k crops of every picture, and the experts' text states.

A cache is a folder named by the hash of everything that its values depend on; if any of it changes, another folder is
used. A training step on cached batches runs neither VAE nor text encoders, and still draws a fresh latent each time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from afa_jax.data.loader import Loader, Row, check_reading
from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.files import check_folder, replace_text, sweep
from afa_jax.json_files import read_object
from afa_jax.logs import LOGGER
from afa_jax.progress import progress as bar_of
from afa_jax.training.cache.encode import Encoder, ahead_of, check_finite, read_row
from afa_jax.training.cache.shards import Arrays, Bad, Shards, writing
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors

FORMAT = 1
"""The version of the shards and of the way crops are drawn; part of the cache's key."""
ALL_BAD = 8
"""The most examples of a shard that may all be bad; a larger shard without one good example is refused."""


def crop_of(seed: int, position: int, crops: int) -> int:
    """Return which cached crop the example at ``position`` of a run gets: a pure function, evenly distributed."""
    digest = hashlib.blake2b(f"crop/{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % crops


def describe(
    experts: Experts, source: PictureSource, crop: Crop | None, crops: int, dtype: DTypeLike, seed: int
) -> dict[str, Any]:
    """Return everything that the cached values depend on, as JSON."""
    return dict(
        format=FORMAT,
        experts=list(experts.hashes),
        text_encoder=dataclasses.asdict(experts.text_encoder.config),
        vae=dict(sha256=experts.vae_hash, config=dataclasses.asdict(experts.vae.config)),
        tokenizer=experts.tokenizer.sha256,
        source=source.fingerprint,
        crop=crop and dataclasses.asdict(crop),
        crops=crops,
        dtype=jnp.dtype(dtype).name,
        seed=seed,
    )


def cache_key(
    experts: Experts, source: PictureSource, crop: Crop | None, crops: int, dtype: DTypeLike, seed: int
) -> str:
    """Return the sha256 of ``describe``; its first 16 digits name the cache's folder."""
    facts = describe(experts, source, crop, crops, dtype, seed)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """A complete cache, as a random-access source; picklable, for grain's worker processes.

    Attributes:
        crops: the number of crops of each picture.
        bad: the examples that could not be read: index -> (name, reason).
        no_caption: ``[n, s, d]``, the text states of the empty caption.
    """

    shards: Shards
    crops: int
    bad: Bad
    no_caption: np.ndarray

    @functools.cached_property
    def indices(self) -> np.ndarray:
        """Return the indices of the examples that training may draw (all but the bad ones), int64, ascending."""
        return np.setdiff1d(np.arange(len(self)), np.fromiter(self.bad, np.int64, len(self.bad)))

    def __len__(self) -> int:
        """Return the number of the source's examples, bad ones included: an index means the same in both."""
        return self.shards.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example's first crop."""
        return self.example(index, 0)

    def example(self, index: int, crop: int) -> dict[str, Any]:
        """Return a crop's ``mean``, ``std`` ``[h, w, c]`` (unscaled), ``states`` ``[n, s, d]``, and the ``index``.

        The arrays have the cache's dtype.

        Raises:
            IndexError: there is no such example or crop.
            BadExample: the source could not give the example.
            InputError: a shard was damaged after it was written; the error names it.
        """
        if not 0 <= index < len(self) or not 0 <= crop < self.crops:
            raise IndexError(f"crop {crop} of example {index}: there are {self.crops} of {len(self)}")
        if index in self.bad:
            raise BadExample(*self.bad[index])
        return self.shards.read(index, crop) | dict(index=index)


def check_cache(path: str | Path, **numbers: int) -> None:
    """Raise InputError for a place where no cache can be made, or a number below one."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"cache.{name}={number}; choose 1 or more")
    if re.match(r"[\w+]+:/", str(path)):  # a Path keeps only one of a URL's two slashes
        raise InputError(f"cache.path={path}: cache.path must be a local or mounted folder")
    try:
        check_folder(Path(path))
    except InputError as error:
        raise InputError(f"cache.path: {error}") from None


def build_cache(
    experts: Experts,
    source: PictureSource,
    crop: Crop | None,
    *,
    path: Path | str,
    crops: int = 1,
    seed: int = 0,
    shard: int = 512,
    batch: int = 8,
    bad: str = "error",
    workers: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> Cache:
    """Make the missing parts of the cache of these experts and this source below ``path``, and open it.

    If it is killed at any moment, the next call continues with the missing shards. Any number of processes may run it
    at once.

    Args:
        crop: cuts pictures to one size; None takes them as they are, if all have one size.
        crops: the number of crops of each picture; crop j of example i is ``crop(image, crop_random(seed, i, j))``.
        shard: examples per file; an existing cache keeps its own number.
        batch: pictures encoded at once; best a divisor of ``shard``.
        bad: the effect of an example without a readable picture or caption: "error" stops, "skip" leaves it out of
            ``Cache.indices``.
        workers: the number of threads that read and crop pictures meanwhile.
        process_index: the share of the shards, out of ``process_count``, that this process begins with.

    Raises:
        InputError: a number below one; a size the networks cannot take; a URL as ``path``, or a folder that cannot be
            written; values that are not finite; a shard of more than ALL_BAD examples without a good one.
        BadExample: with ``bad`` "error"; finished shards stay.
    """
    check_cache(path, crops=crops, shard=shard, batch=batch, workers=workers)
    check_reading(bad)
    size = crop.size if crop else source[0]["image"].shape[:2]
    experts.check_size(size)
    dependencies = (experts, source, crop, crops, experts.vae.dtype, seed)
    key = cache_key(*dependencies)
    folder = Path(path) / key[:16]
    older = sorted(str(record.parent) for record in Path(path).glob("*/cache.json"))
    if older and not folder.is_dir():
        LOGGER.info(f"{folder} is a new cache, of other weights, data or crops than {', '.join(older)}, which stay")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(experts, size, crops, batch)
    shard = _shard_size(folder / "cache.json", key) or shard
    shards = Shards(folder, key, len(source), shard, encoder.shapes())
    readable = dict(key=key, examples=len(source), shard=shards.size, names=experts.names) | describe(*dependencies)
    with writing(folder):
        sweep(folder)
        replace_text(folder / "cache.json", json.dumps(readable, indent=2) + "\n")

    read = functools.partial(read_row, source, experts.tokenizer, crop, crops, seed)
    _check_bad(shards, bad)
    done = len(source) - sum(len(shards.examples(number)) for number in shards.missing())
    bar = bar_of(total=len(source), initial=done, desc="cache", unit="example", quiet=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:

        def make(examples: range) -> tuple[Arrays, Bad]:
            ahead, parts, failed = ahead_of(pool, read, examples, 2 * batch), [], Bad()
            for first in range(0, len(examples), batch):
                rows = list(itertools.islice(ahead, batch))
                for index, row in zip(examples[first:], rows, strict=False):
                    if isinstance(row, BadExample):
                        if bad == "error":
                            raise row
                        failed[index] = (row.name, row.reason)
                parts.append(encoder(rows))
                check_finite(parts[-1], source.name, examples[first:])
                bar.update(len(rows))
            if len(failed) == len(examples) > ALL_BAD:  # probably a mount that is gone, which must not be recorded
                name, reason = failed[examples.start]
                raise InputError(
                    f"{name} and the {len(examples) - 1} examples after it are all bad ({reason}): see whether the "
                    "data is still there, or remove them from the data set"
                )
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, failed

        shards.fill(
            make,
            process_index=process_index,
            process_count=process_count,
            others=lambda number: bar.update(len(shards.examples(number))),
        )
    return Cache(shards, crops, _check_bad(shards, bad), _no_caption(folder / "no_caption.safetensors", key, encoder))


@dataclasses.dataclass(frozen=True, eq=False)
class ReadCache:
    """Map ``(position, place in indices)`` to a row, as the loader's ReadPicture does."""

    cache: Cache
    indices: np.ndarray
    seed: int

    def __call__(self, position: int, place: int) -> Row:
        index = int(self.indices[place])
        example = self.cache.example(index, crop_of(self.seed, position, self.cache.crops))
        return example | dict(index=np.int64(index), position=np.int64(position))


def make_cached_loader(
    cache: Cache,
    *,
    batch: int,
    seed: int,
    among: np.ndarray | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Return a loader of the good examples of a cache; the other arguments are those of make_loader.

    Args:
        cache: the cache of the whole source.
        among: indices to choose from; all of them by default.

    Raises:
        InputError: as Loader.
    """
    indices = cache.indices if among is None else np.intersect1d(among, cache.indices)
    return Loader(
        ReadCache(cache, indices, seed), len(indices), batch=batch, seed=seed, workers=workers,
        process_index=process_index, process_count=process_count,
    )  # fmt: skip


def _no_caption(path: Path, key: str, encoder: Encoder) -> np.ndarray:
    """Return the empty caption's states: read them from their file, or compute them and write the file."""
    try:
        states, header = read_tensors(path)["states"], read_metadata(path)
        shape, dtype = encoder.shapes()["states"]
        known = (header["key"], header["crc32"]) == (key, str(zlib.crc32(states.tobytes())))
        if known and (states.shape, states.dtype) == (shape, dtype):
            return states
    except (WeightsError, KeyError):
        pass
    states = encoder.no_caption()
    with writing(path.parent):
        write_tensors(path, dict(states=states), dict(key=key, crc32=str(zlib.crc32(states.tobytes()))))
    return states


def _check_bad(shards: Shards, bad: str) -> Bad:
    """Return the bad examples of all existing shards; raise InputError if there are any and ``bad`` is "error"."""
    found: Bad = {}
    for number in range(shards.count):
        found |= (of_shard := shards.bad(number) or {})
        if of_shard and bad == "error":
            name, reason = next(iter(of_shard.values()))
            raise InputError(
                f"{shards.path(number)} was made without {name} ({reason}): mend that and delete this file, or set "
                "data.bad=skip"
            )
    return found


def _shard_size(record: Path, key: str) -> int | None:
    try:
        facts = read_object(record, "")
    except InputError:
        return None
    size = facts.get("shard")
    if facts.get("key") != key or not isinstance(size, int) or isinstance(size, bool):
        return None
    return size if 1 <= size <= 2**31 else None
