"""The files of a cache: safetensors shards that are complete or absent, each written by one process only.

A shard holds a fixed number of examples: ``mean`` and ``std`` ``[m, crops, h, w, c]``, ``states`` ``[m, n, s, d]``,
``bad`` ``[m]`` (examples that could not be read; their values are zero) and ``crc32`` ``[m, crops + 1]`` (of mean and
std of each crop, then of the states). Its header holds the cache's key, its first example and the bad ones' reasons.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from afa_jax.errors import InputError
from afa_jax.weights.tensors import WeightsError, open_tensors, write_tensors

Arrays = dict[str, np.ndarray]
Bad = dict[int, tuple[str, str]]
"""The name and the reason of each unreadable example, by its index."""
VALUES = ("mean", "std", "states")
OPEN_FILES = 64


@dataclasses.dataclass(frozen=True)
class Shards:
    """Examples 0 to ``length`` in shards of ``size`` examples; picklable, since files are opened only to be read.

    Attributes:
        key: the cache's key; a file with another key counts as missing.
        values: the shape and dtype of an example's VALUES, if known; a file with others counts as missing.
    """

    folder: Path
    key: str
    length: int
    size: int
    values: Mapping[str, tuple[tuple[int, ...], Any]] | None = None

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def path(self, number: int) -> Path:
        """Return the path of a shard's file."""
        return self.folder / f"shard-{number:05d}-of-{self.count:05d}.safetensors"

    def examples(self, number: int) -> range:
        """Return the indices of a shard's examples."""
        return range(number * self.size, min((number + 1) * self.size, self.length))

    def bad(self, number: int) -> Bad | None:
        """Return the bad examples of a shard; None unless its file exists, is complete and belongs to this cache."""
        examples = self.examples(number)
        try:
            # open_tensors refuses a header that does not account for every byte of the file.
            file = open_tensors(self.path(number))
            if (file.metadata.get("key"), file.metadata.get("first")) != (self.key, str(examples.start)):
                return None
            if not self._fits({name: (tensor.shape, tensor.dtype) for name, tensor in file.tensors.items()}, examples):
                return None
            entries = json.loads(file.metadata["bad"]).items()
            bad = {int(index): (str(name), str(reason)) for index, (name, reason) in entries}
            return bad if file.tensors["bad"].read().tolist() == [index in bad for index in examples] else None
        except (WeightsError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _fits(self, found: Mapping[str, tuple[tuple[int, ...], Any]], examples: range) -> bool:
        """Return whether a file's arrays have the names, shapes and dtypes of a shard's."""
        if found.keys() != {*VALUES, "bad", "crc32"} or len(found["mean"][0]) != 5:
            return False
        crops = found["mean"][0][1]
        own = {name: (shape[1:], np.dtype(dtype)) for name, (shape, dtype) in found.items()}
        return (
            all(shape[:1] == (len(examples),) for shape, _ in found.values())
            and own["bad"] == ((), np.dtype(np.bool_))
            and own["crc32"] == ((crops + 1,), np.dtype(np.uint32))
            and all(own[name] == value for name, value in (self.values or dict(std=own["mean"])).items())
        )

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have yet to be made."""
        return [number for number in range(self.count) if self.bad(number) is None]

    def fill(
        self,
        make: Callable[[range], tuple[Arrays, Bad]],
        *,
        process_index: int = 0,
        process_count: int = 1,
        others: Callable[[int], Any] = lambda number: None,
    ) -> None:
        """Make the missing shards; afterwards every shard exists, whichever process made it.

        A process first makes its share, then shards that no other process is writing. Then it waits for the rest, and
        makes those that a process left when it died. Locks are flock's, which the kernel releases when a process ends:
        processes on several machines need a file system that shares them.

        Args:
            make: returns the values (VALUES) of examples, and the bad ones among them.
            others: is called with the number of each shard that another process made meanwhile.

        Raises:
            InputError: the folder cannot be written, or has no locks.
        """
        missing = self.missing()
        finished: set[int] = set()
        for numbers, wait in ((missing[process_index::process_count], False), (missing, False), (missing, True)):
            for number in numbers:
                if number in finished:
                    continue
                with self._locked(number, wait=wait) as held:
                    if held:
                        if self.bad(number) is None:
                            self._write(number, *make(self.examples(number)))
                        else:
                            others(number)
                        finished.add(number)

    def read(self, index: int, crop: int) -> Arrays:
        """Read ``mean``, ``std`` ``[h, w, c]`` and ``states`` ``[n, s, d]`` of an example's crop, and no other bytes.

        Raises:
            InputError: the shard's file is missing, or its contents differ from what was written.
        """
        number, row = divmod(index, self.size)
        path = self.path(number)
        try:
            file = _open(path)
            mean, std = (file.get_slice(name)[row, crop] for name in ("mean", "std"))
            states, crc = (file.get_slice(name)[row] for name in ("states", "crc32"))
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise InputError(f"{path}: not readable ({error}); delete it, the next start makes it again") from error
        if (crc[crop], crc[-1]) != (_crc(mean, std), _crc(states)):
            raise InputError(
                f"{path}: example {index} differs from what was written (crc32); delete this file, the next start "
                "makes it again"
            )
        return dict(mean=mean, std=std, states=states)

    def _write(self, number: int, values: Arrays, bad: Bad) -> None:
        path, examples = self.path(number), self.examples(number)
        mean, std, states = (values[name] for name in VALUES)
        crc = [
            [_crc(m, s) for m, s in zip(means, stds, strict=True)] + [_crc(state)]
            for means, stds, state in zip(mean, std, states, strict=True)
        ]
        tensors = values | dict(
            bad=np.array([index in bad for index in examples], np.bool_), crc32=np.array(crc, np.uint32)
        )
        header = dict(key=self.key, first=str(examples.start), bad=json.dumps(bad))
        with writing(self.folder):
            for left in self.folder.glob(f".{path.name}.*.partial"):
                left.unlink()  # from a process that died, because this one holds the lock
            write_tensors(path, tensors, header)
        _open.cache_clear()  # a replaced shard may still be open

    @contextlib.contextmanager
    def _locked(self, number: int, *, wait: bool) -> Iterator[bool]:
        """Hold a shard's lock; yield False if another process has it and ``wait`` is False."""
        path = Path(f"{self.path(number)}.lock")
        with writing(self.folder):
            file = open(path, "a")  # noqa: SIM115 - closed below; what the caller does is not this disk's fault
        with file:
            with writing(self.folder):  # some network file systems have no locks
                held = _lock(file, wait)
            yield held
            if held:
                # The shard is complete: whoever waits for this lock, or takes a new one, finds it so.
                with writing(self.folder):
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of writing (a full disk, a missing permission) into an InputError that names the cache's folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error}): make room there or set cache.path; finished shards stay"
        ) from error


def _lock(file: Any, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path: Path) -> Any:
    return safe_open(path, "np")


def _crc(*arrays: np.ndarray) -> int:
    return functools.reduce(lambda crc, array: zlib.crc32(array.tobytes(), crc), arrays, 0)
