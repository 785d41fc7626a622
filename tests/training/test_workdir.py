"""Going on only if there is something to go on with, whatever a kill has left there."""

import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from afa_jax.cli.arguments import add_workdir_arguments, check_workdir_arguments
from afa_jax.errors import InputError
from afa_jax.files import replace_text, sweep
from afa_jax.training.workdir import (
    Metrics,
    check_workdir,
    holds_run,
    keep_config,
    locked,
    open_workdir,
    resume_if_any,
)
from tests.forked import PROCESSES


def options(workdir: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workdir_arguments(parser)
    parsed = parser.parse_args([f"--workdir={workdir}", *arguments])
    check_workdir_arguments(parsed, here=False)
    resume_if_any(parsed)
    return parsed


def test_a_run_is_continued_if_there_is_one_and_started_if_not(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert not options(workdir, "--resume_if_any").resume
    open_workdir(workdir, resume=False, overwrite=False)
    assert not options(workdir, "--resume_if_any").resume  # killed before there was a config
    keep_config(workdir, ConfigDict(dict(name="first", train={})))
    assert options(workdir, "--resume_if_any").resume and not options(workdir).resume
    keep_config(workdir, ConfigDict(dict(name="other")))
    assert "other" in (workdir / "config.json").read_text()
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    keep_config(workdir, ConfigDict(dict(name="last")))
    assert "other" in (workdir / "config.json").read_text()


@pytest.mark.parametrize("other", ["--resume", "--resume_step=3", "--overwrite"])
def test_one_way_to_treat_what_is_there_is_chosen(tmp_path: Path, other: str) -> None:
    with pytest.raises(InputError, match=f"--resume_if_any and .*{other.partition('=')[0]}.* exclude each other"):
        options(tmp_path, "--resume_if_any", other)


@pytest.mark.parametrize("cache", ["run/cache", "run/data/cache", "link/cache", "run/../run/cache"])
def test_a_cache_in_the_workdir_is_made_before_the_run_and_kept(tmp_path: Path, cache: str) -> None:
    workdir, where = tmp_path / "run", tmp_path / cache
    (tmp_path / "link").symlink_to(workdir, target_is_directory=True)
    workdir.mkdir()
    how: dict[str, Any] = dict(resume=False, cache=str(where))
    check_workdir(workdir, overwrite=False, **how)
    (where / "0123").mkdir(parents=True)
    for overwrite in (False, True):  # what a start did that was killed while it made the cache
        check_workdir(workdir, overwrite=overwrite, **how)
        open_workdir(workdir, overwrite=overwrite, **how)
    keep_config(workdir, ConfigDict(dict(train={})))
    with pytest.raises(InputError, match="is not empty"):
        open_workdir(workdir, overwrite=False, **how)
    open_workdir(workdir, overwrite=True, **how)
    assert (where / "0123").is_dir() and not (workdir / "config.json").exists()
    (workdir / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        open_workdir(workdir, overwrite=False, **how)


@pytest.mark.parametrize("cache", [".", "checkpoints/cache", "best", "model", ".lock", "../run"])
def test_a_cache_where_a_run_writes_is_refused(tmp_path: Path, cache: str) -> None:
    with pytest.raises(InputError, match=r"cache\.path=.*choose another folder"):
        check_workdir(tmp_path / "run", resume=False, overwrite=False, cache=str(tmp_path / "run" / cache))
    assert not [*tmp_path.iterdir()]


def begin(workdir: Path, resume: bool, overwrite: bool) -> None:
    """What every trainer does before its first step."""
    open_workdir(workdir, resume=resume, overwrite=overwrite)
    keep_config(workdir, ConfigDict(dict(train=dict(steps=3))))
    with locked(workdir):
        (workdir / "checkpoints").mkdir(exist_ok=True)
        sweep(workdir / "checkpoints")  # as Checkpoints do
        replace_text(workdir / "checkpoints" / "scores.json", "{}")
        Metrics(workdir).close()
        replace_text(workdir / "validation.jsonl", "")


def killed_at(event: int, workdir: Path, overwrite: bool) -> bool:
    """Whether a start ended, as by SIGKILL, just before it touched a file for so many times."""
    child = os.fork()
    if child == 0:
        countdown = itertools.count(event, -1)

        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            touches = name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
            path = str(arguments[0])  # below a folder's descriptor, where a tree is removed, it is a name alone
            if touches and (path.startswith(str(workdir)) or "/" not in path):
                next(countdown) or os._exit(9)

        sys.addaudithook(hook)
        begin(workdir, False, overwrite)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kill_at_every_touch(folder: Path) -> None:
    """In a process of its own, of one thread, which may fork."""
    before = folder / "before"
    begin(before, False, False)
    (before / "checkpoints" / "3").mkdir()
    (before / "checkpoints" / "3" / "sums.json").write_text("{}")
    (before / "config.json").write_text('{"train": {"steps": 2}}')
    old = tree(before)
    for overwrite in (False, True):
        for event in itertools.count():
            workdir = folder / f"{overwrite}{event}"
            if overwrite:
                shutil.copytree(before, workdir)
                (workdir / "mine.txt").touch()
            if not killed_at(event, workdir, overwrite):
                assert event > (15 if overwrite else 8), event
                break
            for how in ("--resume_if_any", "--overwrite", "--resume"):
                again = folder / "again"
                shutil.copytree(workdir, again) if workdir.exists() else again.mkdir()
                if how == "--resume" and not holds_run(again):
                    with pytest.raises(InputError, match="holds no run"):
                        check_workdir(again, resume=True, overwrite=False)
                else:
                    chosen = options(again, how)
                    if chosen.resume and "2" in (again / "config.json").read_text():
                        assert old <= tree(again)  # nothing of it was removed
                    begin(again, chosen.resume, chosen.overwrite)
                    assert holds_run(again) and (again / "mine.txt").exists() == overwrite
                    if how == "--overwrite":
                        assert "3" in (again / "config.json").read_text()
                        assert not (again / "checkpoints" / "3").exists()
                    left = [name for name in tree(again) if name.endswith((".partial", ".overwritten", "damaged"))]
                    assert not left, left
                shutil.rmtree(again)


def test_a_start_that_is_killed_at_any_touch_of_a_file_can_be_gone_on_with(tmp_path: Path) -> None:
    process = PROCESSES.Process(target=kill_at_every_touch, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_overwriting_removes_runs_only_and_of_them_what_runs_write(tmp_path: Path) -> None:
    model, mine = tmp_path / "unet", tmp_path / "mine"
    for folder, name, content in (
        (model, "config.json", '{"_class_name": "UNet2DConditionModel"}'),
        (model, "diffusion_pytorch_model.safetensors", ""),
        (mine, "photo.png", ""),
        (mine, ".a.png.1.partial", ""),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    for folder in (model, mine):
        before = tree(folder)
        for how, message in (
            ("--overwrite", "does not look like a run"),
            ("--resume", "no run"),
            ("--resume_if_any", ""),
        ):
            chosen = options(folder, how)
            with pytest.raises(InputError, match=message or "is not empty"):
                open_workdir(folder, resume=chosen.resume, overwrite=chosen.overwrite)
        assert tree(folder) == before

    run, disk = tmp_path / "link", tmp_path / "disk"
    run.symlink_to(disk, target_is_directory=True)
    disk.mkdir()
    for damaged in (b"\xff", b"[1]", b"{}", b"", b'{"train": 1'):
        begin(run, False, False)
        (run / "config.json").write_bytes(damaged)  # of a run, and damaged
        open_workdir(run, resume=False, overwrite=True)
        assert run.is_symlink() and tree(disk) == {".lock", ".overwritten"}


@pytest.mark.parametrize("torn", ["", "\0" * 40, '{"train": {"st'])
def test_a_torn_config_alone_is_nothing_that_was_begun(tmp_path: Path, torn: str) -> None:
    for how in ("--resume_if_any", "--overwrite", ""):
        run = tmp_path / f"run{how}"
        run.mkdir()
        (run / "config.json").write_text(torn)
        chosen = options(run, *([how] if how else []))
        begin(run, chosen.resume, chosen.overwrite)
        assert holds_run(run) and "3" in (run / "config.json").read_text()
