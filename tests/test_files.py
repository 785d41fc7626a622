"""Files that are whole or absent: what killed processes leave, full disks, and JSON of our own that is damaged."""

import errno
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from afa_jax.errors import InputError
from afa_jax.files import partial_file, partial_name, read_object, replace_text, sweep, writing


def test_the_next_start_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = partial_name(tmp_path / "a.png").name
    here = mine.replace(f".{os.getpid()}-", f".{dead.pid}-")
    place = here.rpartition("-")[2]
    removed = {
        mine: 0,
        here: 0,  # at once: this system knows that its process is gone
        here.replace("a.png", "b\nc"): 0,
        f".a.png.{dead.pid}.partial": 61,  # as the first versions called them
        f".a.png.{dead.pid}-00000000.partial": 61,  # of another machine
        f".a.png.{os.getppid()}-00000000.partial": 90000,
    }
    kept = {
        f".a.png.{os.getppid()}-{place}": 90000,  # alive
        f".a.png.{dead.pid}-00000000.partial2": 90000,
        f".b.png.{dead.pid}-00000000.partial": 0,
        f".b.png.{dead.pid}.partial": 0,
        f"a.png.{dead.pid}.partial": 90000,
        ".partial": 90000,
    }
    for name, age in (removed | kept).items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept}


def test_a_full_disk_is_named_by_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.json"
    with pytest.raises(FileNotFoundError):
        replace_text(path, "{}")
    path.parent.mkdir()
    for raised in (OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full", "source", None, "other")):
        for named, within in ((path, partial_file(path)), (tmp_path, writing(tmp_path))):
            with pytest.raises(OSError, match=f"'{named}'$") as error:
                fail(within, raised)
            assert error.value.errno == errno.ENOSPC and not [*path.parent.iterdir()]


def fail(within: AbstractContextManager[Path | None], error: OSError) -> None:
    with within as partial:
        if partial:
            partial.touch()
        raise error


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b'{"a": "\xff"}', b"[1]", b"null", b"\0" * 9, b"[" * 100_000, b'{"a":' * 100_000, None]
)  # fmt: skip
def test_json_of_ours_that_is_damaged_is_named_with_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path}: .*; start again") as error:
        read_object(path, "start again with --overwrite")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
