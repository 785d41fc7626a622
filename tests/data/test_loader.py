"""Batches: what they hold, that they follow from (seed, step) alone, and what becomes of bad examples."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from ml_collections import ConfigDict

from afa_jax.data.bad_examples import BadExamples
from afa_jax.data.emoji.scenes import SceneSource
from afa_jax.data.loader import Loader, loading, make_loader
from afa_jax.data.sources import BadExample, make_source
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests.data import formats

TOKENIZER = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji"
CROP = Crop((16, 24), flip=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    formats.write_tar(root / "good.tar")
    formats.write_tar(root / "bad.tar", broken=4)
    formats.write_txt(root / "folder")
    return root


def source_of(path: Path) -> Any:
    return make_source(ConfigDict(dict(kind="tar", paths=str(path))))


def equal(one: dict, two: dict) -> None:
    assert sorted(one) == sorted(two)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def test_a_batch_holds_what_its_positions_say(root, tokenizer):
    source = source_of(root / "good.tar")
    loader = make_loader(source, tokenizer, batch=4, seed=3, crop=CROP)
    batch = loader.at(5)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 16, 24, 3), np.uint8),
        "ids": ((4, 16), np.int32),
        "index": ((4,), np.int64),
        "position": ((4,), np.int64),
    }
    assert batch["position"].tolist() == [20, 21, 22, 23]
    for row, (index, position) in enumerate(zip(batch["index"], batch["position"], strict=True)):
        random = np.random.default_rng((3, int(position)))
        np.testing.assert_array_equal(batch["image"][row], CROP(source[int(index)]["image"], random))
        np.testing.assert_array_equal(batch["ids"][row], tokenizer([formats.CAPTIONS[index]])[0])


def test_each_epoch_is_another_permutation_and_crops_anew(root, tokenizer):
    loader = make_loader(source_of(root / "good.tar"), tokenizer, batch=3, seed=0, crop=CROP)
    epochs = [[loader.at(3 * epoch + step) for step in range(3)] for epoch in range(3)]
    orders = [tuple(np.concatenate([batch["index"] for batch in epoch]).tolist()) for epoch in epochs]
    assert all(sorted(order) == list(range(formats.COUNT)) for order in orders)
    assert len(set(orders)) == 3
    other = make_loader(source_of(root / "good.tar"), tokenizer, batch=3, seed=1, crop=CROP)
    assert tuple(other.at(0)["index"]) != orders[0][:3]
    crops = [
        {int(i): image.tobytes() for batch in epoch for i, image in zip(batch["index"], batch["image"], strict=True)}
        for epoch in epochs
    ]
    assert sum(crops[0][i] != crops[1][i] for i in range(formats.COUNT)) > formats.COUNT / 2


def test_reading_ahead_gives_the_same_batches_from_any_step(root, tokenizer):
    loader = make_loader(source_of(root / "good.tar"), tokenizer, batch=4, seed=0, crop=CROP)
    for first in (0, 7):
        batches = loader.iterate(first)
        for step, batch in zip(range(first, first + 5), batches, strict=False):
            equal(batch, loader.at(step))
        batches.close()


def test_worker_processes_give_the_same_batches(root, tokenizer):
    source = source_of(root / "bad.tar")
    arguments: dict[str, Any] = dict(batch=4, seed=0, crop=CROP, bad="skip")
    here = make_loader(source, tokenizer, **arguments)
    there = make_loader(source, tokenizer, workers=2, **arguments)
    batches = there.iterate(3)
    seen = [(step, next(batches)) for step in range(3, 8)]
    batches.close()
    for step, batch in seen:
        equal(batch, here.at(step))
    assert any(batch["bad"] for _, batch in seen)


def read_slowly(position: int, index: int) -> dict[str, Any]:
    time.sleep(60 if position >= 8 else 0)
    return dict(index=np.int64(index))


def read_badly(killed_at: int, position: int, index: int) -> dict[str, Any]:
    if position == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when there is no more memory
    raise InputError(f"{position} cannot be read")


def test_workers_that_read_for_long_are_not_waited_for():
    batches = Loader(read_slowly, 4, batch=2, seed=0, workers=2).iterate()
    next(batches), next(batches)  # one of each worker
    workers = children(os.getpid())
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 2 and not workers & children(os.getpid())


def test_what_ends_a_worker_is_said():
    with pytest.raises(InputError, match=r"^0 cannot be read"):
        next(Loader(functools.partial(read_badly, 9), 2, batch=2, seed=0, workers=1).iterate())
    with pytest.raises(InputError, match=r"ended with SIGKILL; if memory is short, choose a smaller data\.workers"):
        next(Loader(functools.partial(read_badly, 0), 2, batch=2, seed=0, workers=1).iterate())


def children(parent: int) -> set[str]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if file.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.add(file.parent.name)
    return found


@pytest.mark.parametrize("when", ["starting", "reading"])
def test_workers_end_with_a_process_that_is_killed_and_leave_nothing(root, tmp_path, when):
    """Also before they have imported anything; they have no semaphore and no shared memory to leave."""
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, threading, time
from pathlib import Path
from ml_collections import ConfigDict
from afa_jax.data.loader import loading, make_loader
from afa_jax.data.sources import make_source
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests.data.test_loader import children

def kill():
    while not (workers := children(os.getpid())):
        time.sleep(0.001)
    print(*workers, flush=True)
    for pid in (str(os.getpid()), *workers):
        assert "/dev/shm" not in Path("/proc", pid, "maps").read_text()
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = ConfigDict(dict(kind="tar", paths={str(root / "good.tar")!r}, size=(16, 24), workers=1))
    loader = make_loader(make_source(config), Tokenizer({str(TOKENIZER)!r}), batch=4, seed=0, **loading(config))
    if {when!r} == "starting":
        threading.Thread(target=kill).start()
    batches = loader.iterate()
    next(batches)
    kill()
""")
    environment = os.environ | dict(PYTHONPATH=os.getcwd())
    killed = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=environment)
    ended = time.monotonic()
    assert killed.returncode == -signal.SIGKILL and not killed.stderr
    [pid] = killed.stdout.split()  # the worker, and nobody who tracks what it leaves
    while Path("/proc", pid).exists() and "State:\tZ" not in Path("/proc", pid, "status").read_text():
        assert time.monotonic() - ended < 2, "the worker outlives its parent"
        time.sleep(0.02)


def test_the_shards_of_processes_are_the_global_batch(root, tokenizer):
    source = source_of(root / "good.tar")
    whole = make_loader(source, tokenizer, batch=6, seed=0, crop=CROP)
    parts = [
        make_loader(source, tokenizer, batch=6, seed=0, crop=CROP, process_index=i, process_count=3) for i in range(3)
    ]
    for step in (0, 1, 5):
        together = whole.at(step)
        for i, part in enumerate(parts):
            equal(part.at(step), {key: value[i::3] for key, value in together.items()})
            equal(next(part.iterate(step)), part.at(step))


def test_scenes_come_in_the_order_they_always_had(tokenizer):
    """The order of runs before there were positions: they must go on as they began."""
    source = SceneSource(seed=5, length=64)
    loader = make_loader(source, tokenizer, batch=4, seed=2, **loading(ConfigDict(dict(kind="emoji", seed=5))))
    before = grain.MapDataset.source(source).seed(2).shuffle().repeat(None)
    for step in (0, 3, 40):
        batch = loader.at(step)
        rows = [before[4 * step + row] for row in range(4)]
        np.testing.assert_array_equal(batch["image"], np.stack([row["image"] for row in rows]))
        np.testing.assert_array_equal(batch["ids"], tokenizer([row["caption"] for row in rows]))
    assert source.name(3) == f"scene 3 ({source[3]['caption']})"
    assert source.fingerprint != SceneSource(seed=6, length=64).fingerprint


def test_a_bad_picture_is_named_or_the_next_one_takes_its_place(root, tokenizer):
    source = source_of(root / "bad.tar")
    strict = make_loader(source, tokenizer, batch=9, seed=0, crop=CROP)
    with pytest.raises(BadExample, match=r"bad.tar/0004: not a readable picture"):
        strict.at(0)
    skip = make_loader(source, tokenizer, batch=9, seed=0, crop=CROP, bad="skip")
    good = make_loader(source_of(root / "good.tar"), tokenizer, batch=9, seed=0, crop=CROP).at(0)
    batch = skip.at(0)
    [(name, reason)] = batch.pop("bad")
    assert name == "bad.tar/0004" and "not a readable picture" in reason
    (row,) = np.flatnonzero(good["index"] == 4)
    assert batch["index"][row] == 5
    others = np.arange(9) != row
    equal({key: value[others] for key, value in batch.items()}, {key: value[others] for key, value in good.items()})
    np.testing.assert_array_equal(
        batch["image"][row], CROP(formats.picture(5), np.random.default_rng((0, int(batch["position"][row]))))
    )


def test_the_last_example_is_replaced_by_the_first_and_none_good_is_an_error(tmp_path, tokenizer):
    formats.write_tar(tmp_path / "a.tar", range(3), broken=2)
    batch = make_loader(source_of(tmp_path / "a.tar"), tokenizer, batch=3, seed=0, crop=CROP, bad="skip").at(0)
    assert sorted(batch["index"].tolist()) == [0, 0, 1]
    formats.write_tar(tmp_path / "a.tar", range(1), broken=0)
    loader = make_loader(source_of(tmp_path / "a.tar"), tokenizer, batch=1, seed=0, crop=CROP, bad="skip")
    with pytest.raises(InputError, match=r"none of the 1 examples is good; the first: a.tar/0000"):
        loader.at(0)


def test_a_caption_that_the_vocabulary_does_not_have_is_a_bad_example(tmp_path, tokenizer):
    formats.write_txt(tmp_path)
    (tmp_path / formats.name(2)).with_suffix(".txt").write_text("zeppelin, noto style")
    source = make_source(ConfigDict(dict(kind="folder", path=str(tmp_path))))
    with pytest.raises(BadExample, match=r"0/0002.png: .*zeppelin"):
        make_loader(source, tokenizer, batch=9, seed=0, crop=CROP).at(0)


def test_captions_that_are_too_long_are_cut_quietly(tokenizer):
    long = "fox and " * 20
    with pytest.warns(UserWarning, match=r"lost"):
        loud = tokenizer([long])
    np.testing.assert_array_equal(tokenizer([long], quiet=True), loud)


def test_bad_examples_are_counted_once_also_over_resumed_runs(root, tokenizer, tmp_path):
    loader = make_loader(source_of(root / "bad.tar"), tokenizer, batch=4, seed=0, crop=CROP, bad="skip")
    path = tmp_path / "bad_examples.jsonl"
    counts = BadExamples(path, loader.length, loader.batch)
    said = []
    for step in range(8):
        if step == 1:
            counts = BadExamples(path, loader.length, loader.batch)  # resumed
        batch = loader.at(step)
        said.append(counts.take(step, batch))
        assert "bad" not in batch
    # Steps 0 to 2 see all nine examples.
    assert said == [None, None, "1 of 9 examples left out: bad.tar/0004", *[None] * 5]
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["name"] == "bad.tar/0004" and "not a readable picture" in line["reason"]
    counts.add((f"x{i}", "gone") for i in range(30))
    assert counts.summary().startswith("31 of 9 examples") and "and 11 more, see" in counts.summary()
    quiet = BadExamples(tmp_path / "none.jsonl", 9, 4)
    assert quiet.take(2, {}) is None and not (tmp_path / "none.jsonl").exists()


def test_crop_covers_the_size_and_is_somewhere_in_the_picture():
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    crop = Crop((40, 30))
    cuts = [crop(image, np.random.default_rng(i)) for i in range(40)]
    lefts = {int(next(x for x in range(31) if (image[:, x : x + 30] == cut).all())) for cut in cuts}
    assert min(lefts) < 8 and max(lefts) > 22
    flipped = [Crop((40, 60), flip=True)(image, np.random.default_rng(i)) for i in range(40)]
    mirrored = sum((cut == image[:, ::-1]).all() for cut in flipped)
    assert 10 < mirrored < 30
    assert mirrored + sum((cut == image).all() for cut in flipped) == 40
    for shape, size in itertools.product(((5, 90), (90, 5), (1, 1), (33, 57)), ((16, 16), (8, 24))):
        assert crop.__class__(size)(np.zeros((*shape, 3), np.uint8), np.random.default_rng(0)).shape == (*size, 3)


def test_what_cannot_be_loaded_is_refused(root, tokenizer):
    source = source_of(root / "good.tar")

    def refuse(message: str, **options: Any) -> None:
        arguments: dict[str, Any] = dict(batch=4, seed=0, crop=CROP) | options
        with pytest.raises(InputError, match=message):
            make_loader(source, tokenizer, **arguments).at(0)

    refuse("9 pictures are fewer than a batch of 10", batch=10)
    refuse("batch=4 does not divide among 3 processes", process_count=3)
    refuse("data.bad='no': choose error or skip", bad="no")
    refuse("data.workers=-1", workers=-1)
    refuse("pictures of different sizes, .*: set data.size", crop=None)
    with pytest.raises(InputError, match=r"data.size=.* is missing; kind=tar"):
        loading(ConfigDict(dict(kind="tar")))
    for size in ((8, 0), 512, (8.5, 8), (8, 8, 3)):
        with pytest.raises(InputError, match=rf"data.size={re.escape(str(size))}: choose .rows, columns."):
            loading(ConfigDict(dict(kind="tar", size=size)))
    assert loading(ConfigDict(dict(kind="tar", size=(8, 9), flip=True, bad="skip", workers=2))) == dict(
        crop=Crop((8, 9), flip=True), bad="skip", workers=2
    )


def test_a_batch_may_be_of_one():
    loader = Loader(lambda position, index: dict(index=index), 5, batch=1, seed=0)
    ahead = loader.iterate(3)
    assert [next(ahead)["index"] for _ in range(9)] == [loader.at(step)["index"] for step in range(3, 12)]
    ahead.close()


def test_a_loader_of_anything_else():
    """As the cache uses it: rows and batches of its own."""
    loader = Loader(
        lambda position, index: dict(index=index, position=position), 5, batch=2, seed=0,
        collate=lambda rows: dict(position=[row["position"] for row in rows]),
    )  # fmt: skip
    assert loader.at(3) == dict(position=[6, 7])
