"""The launchers as a person runs them, with recording stand-ins for everything that they would start."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake.sh"
CLUSTER = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "git", "mkdir", "sleep")

Answer = tuple[str, str, int]


def command_lines(dry_run: str) -> list[list[str]]:
    """The command lines that a dry run prints, each split as a shell splits it. Arguments may hold newlines."""
    found: list[list[str]] = []
    unfinished = ""
    for line in dry_run.splitlines(keepends=True):
        if not unfinished and line.startswith("#"):
            continue
        unfinished += line
        with contextlib.suppress(ValueError):  # a quotation that is still open
            found.append(shlex.split(unfinished))
            unfinished = ""
    assert not unfinished
    return found


def environment(**more: str) -> dict[str, str]:
    """This process' environment without what a cluster or the tests put into it."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | more


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a script ended, and what it started: argv of each call, in order, and the manifest that one of them read."""

    status: int
    out: str
    err: str
    calls: list[list[str]]
    stdin: str


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Runs scripts of launch/ with stand-ins on PATH (tests/launch/fake.sh)."""

    folder: Path

    def __call__(
        self,
        script: str,
        *arguments: str,
        answers: Sequence[Answer] = (),
        folder: Path | None = None,
        **env: str,
    ) -> Result:
        calls, stdin, left = self.folder / "calls", self.folder / "stdin", self.folder / "answers"
        calls.write_text("")
        stdin.write_text("")
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for index, (part, text, status) in enumerate(answers):
            (left / f"{index:03}").write_text(f"{part}\n{status}\n{text}")
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments],
            cwd=folder or self.folder,
            env=environment(FAKE_CALLS=str(calls), FAKE_STDIN=str(stdin), FAKE_ANSWERS=str(left), **env)
            | dict(PATH=f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(
            status=done.returncode,
            out=done.stdout,
            err=done.stderr,
            calls=[call.split("\0") for call in calls.read_text().split("\0\0")[:-1]],
            stdin=stdin.read_text(),
        )


def make_launcher(folder: Path, commands: Sequence[str] = CLUSTER) -> Launcher:
    """A launcher whose stand-ins are in ``folder``; no command of a cloud or a cluster is real."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name in commands:
        (binaries / name).symlink_to(FAKE)
    return Launcher(folder=folder)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Scripts of launch/, started from a folder of the test's own."""
    return make_launcher(tmp_path)
