"""Several processes at one cache. What they make is numpy's: nothing here imports more than it must."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa_jax.errors import InputError
from afa_jax.training.cache.shards import Arrays, Bad, Shards


def make(examples: range) -> tuple[Arrays, Bad]:
    mean = np.broadcast_to(np.array(examples, np.float32)[:, None, None, None, None], (len(examples), 1, 2, 2, 1))
    return dict(mean=mean, std=mean, states=mean[:, 0]), {}


def fill(shards: Shards, log: Path, process_index: int, inside: Any) -> None:
    first = True

    def logged(examples: range) -> tuple[Arrays, Bad]:
        nonlocal first
        if first:
            inside.wait(60)  # for the others to be making a shard, too
        first = False
        with open(log, "a") as file:
            file.write(f"{examples.start // shards.size}\n")
        return make(examples)

    shards.fill(logged, process_index=process_index % 2, process_count=2)
    assert shards.missing() == []


def hang(shards: Shards, entered: Any) -> None:
    def make(examples: range) -> tuple[Arrays, Bad]:
        entered.set()
        time.sleep(60)
        raise AssertionError("should have been killed")

    shards.fill(make)


def test_processes_write_each_shard_once(tmp_path):
    spawn, shards, log = multiprocessing.get_context("spawn"), Shards(tmp_path, "key", 39, 2), tmp_path / "log"
    inside = spawn.Barrier(3)
    # Two that share the work, and a third that has the share of the second.
    others = [spawn.Process(target=fill, args=(shards, log, index, inside), daemon=True) for index in (1, 2)]
    for process in others:
        process.start()
    fill(shards, log, 0, inside)
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(int(number) for number in log.read_text().splitlines()) == list(range(20))
    assert [shards.read(index, 0)["mean"].max() for index in range(39)] == list(range(39))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ""}


def test_a_killed_process_leaves_its_shard_to_others(tmp_path):
    spawn, shards = multiprocessing.get_context("spawn"), Shards(tmp_path, "key", 6, 2)
    entered = spawn.Event()
    process = spawn.Process(target=hang, args=(shards, entered), daemon=True)
    process.start()
    assert entered.wait(60)
    made: list[int] = []

    def kill_then_make(examples: range) -> tuple[Arrays, Bad]:
        made.append(examples.start)
        if len(made) == 2:  # the first shard is held: the others came before it
            process.kill()
        return make(examples)

    shards.fill(kill_then_make)
    process.join(60)
    assert made == [2, 4, 0] and shards.missing() == []


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    shards = Shards(tmp_path, "key", 4, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            InputError, match=r"the cache cannot be written \(.*make room there or set cache.path"
        ) as error:
            shards.fill(make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)
    assert shards.missing() == [0, 1] and not list(tmp_path.glob("*.partial"))

    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(InputError, match=r"cannot be written \(.*No locks available.*set cache.path"):
            shards.fill(make)
    with pytest.raises(OSError, match="a picture's disk"):  # is another's fault
        shards.fill(unreadable)
    shards.fill(make)
    assert shards.missing() == []


def unreadable(examples: range) -> tuple[Arrays, Bad]:
    raise OSError("a picture's disk")
