"""Files that are whole or absent: what killed processes leave, full disks, and JSON of our own that is damaged."""

import errno
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from afa_jax.errors import InputError
from afa_jax.files import (
    aside,
    check_file,
    check_folder,
    check_new,
    partial_file,
    partial_name,
    replace_folder,
    replace_text,
    sweep,
    writing,
)
from afa_jax.json_files import is_number, read_lines, read_object


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


def test_the_first_output_in_a_folder_removes_what_killed_processes_left_there(tmp_path: Path) -> None:
    """Of any name, files and folders; not what others work on, here or on another machine, nor this process itself."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    place = partial_name(Path("a")).stem.rpartition("-")[2]
    removed = [f".a.png.{dead.pid}-{place}.partial", f".b.{os.getpid()}-{place}.partial", f".c.{os.getpid()}.partial"]
    alive, elsewhere = f".a.png.{os.getppid()}-{place}.partial", f".m.{dead.pid}-00000000.partial"
    with partial_file(tmp_path / "before" / "first") as first:  # where no folder is yet
        first.parent.mkdir()
        first.touch()
        for name in (*removed, alive, elsewhere):
            (first.parent / name / "unet").mkdir(parents=True)
            for path in (first.parent / name / "unet", first.parent / name):
                os.utime(path, (time.time() - (90000 if name == removed[2] else 3600),) * 2)
        replace_text(first.parent / "second", "2")
        assert {path.name for path in first.parent.iterdir()} == {first.name, "second", alive, elsewhere}
        (first.parent / removed[0]).touch()
        replace_text(first.parent / "third", "3")  # it was looked at: of many outputs each would list all
        assert (first.parent / removed[0]).exists()
    assert {path.name for path in first.parent.iterdir()} == {"first", "second", "third", alive, elsewhere, removed[0]}


def test_a_folder_set_aside_by_a_killed_overwriting_is_back(tmp_path: Path) -> None:
    out, new = tmp_path / "pair", tmp_path / "new"
    for folder in (out, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    out.rename(aside(out))
    with pytest.raises(InputError, match=f"{out} exists"):
        check_new(out)
    assert (out / "name").read_text() == "pair" and not aside(out).exists()
    out.rename(aside(out))
    check_new(out, overwrite=True)
    replace_folder(out, new)
    assert (out / "name").read_text() == "new" and [*tmp_path.iterdir()] == [out]


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


@pytest.mark.parametrize("check", [check_new, check_file, check_folder])
@pytest.mark.parametrize(
    "name", ["file/out", "file/a/b", "nowhere/out", "sealed/out", "sealed/a/b", "n" * 250, "a\0b", "there/" + "n" * 300]
)
def test_a_place_where_nothing_can_be_written_is_named_and_not_touched(check, name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    (tmp_path / "sealed").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    access = os.access  # for root, who runs some of these tests, no folder is sealed
    monkeypatch.setattr(os, "access", lambda path, mode: "sealed" not in str(path) and access(path, mode))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"cannot be written.*choose another name"):
        check(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    check_folder(tmp_path / "folder")
    check_folder(tmp_path / "new" / "one")
    check_file(tmp_path / "file", overwrite=True)
    check_file(tmp_path / "nowhere", overwrite=True)  # the link is replaced
    check_new(tmp_path / "new" / "one")
    check_new(tmp_path / "folder")  # it is empty
    for check in (check_folder, check_new, lambda path: check_file(path, False)):
        for name in ("file", "nowhere"):
            with pytest.raises(InputError, match=r"exists|cannot be written"):
                check(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path / "folder")


def test_what_was_torn_off_a_file_of_lines_is_left_out_and_other_damage_kept_in_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def good(line: dict[str, Any]) -> bool:
        return isinstance(line.get("step"), int) and is_number(line.get("loss"))

    assert read_lines(path, good) == []
    lines = [b'{"step": %d, "loss": NaN}\n' % step for step in range(4)]
    for torn in (b"", b'{"step": 4, "lo', b"\0" * 512, b"\xff\xfe"):
        path.write_bytes(b"".join(lines) + torn)
        assert [line["step"] for line in read_lines(path, good, keep=True)] == [0, 1, 2, 3]
    huge = b'{"step": 1, "loss": 1' + b"0" * 400 + b"}"
    for bad in (b"\xff\xfe", b'{"step": "1", "loss": 1}', b"[1]", b'{"step"', b"[" * 100_000, huge, b'{"step": 1}'):
        path.write_bytes(b"".join([lines[0], bad + b"\n", *lines[2:]]))
        with pytest.warns(UserWarning, match=rf"^{path}: line 2 is damaged and left out$"):
            read_lines(path, good)
        with pytest.warns(UserWarning, match=rf"^{path}: line 2 is .*; the file as it was is {path}.damaged$"):
            assert [line["step"] for line in read_lines(path, good, keep=True)] == [0, 2, 3]
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == path.read_bytes()
