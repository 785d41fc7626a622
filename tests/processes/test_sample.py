"""A file of prompts, sampled by real processes: the same files whoever makes them, also after a kill in the middle."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afa_jax import sample
from afa_jax.cli.commands import run
from tests.commands.conftest import root as root
from tests.processes.conftest import ROOT, Launch, Process

COUNT, IMAGES = 12, 2
SECONDS = 400


@pytest.fixture(scope="module")
def arguments(root: Path) -> list[str]:
    animals = ("octopus", "fox", "owl", "car")
    prompts = [f"{animals[i % 4]}, {('noto', 'blob', 'fluent')[i % 3]} style" for i in range(COUNT)]
    (root / "many.txt").write_text("\n".join(prompts))
    config = (root / "config.py").read_text().replace("dtype=", "mesh=dict(data=-1, fsdp=1, expert=1), dtype=", 1)
    (root / "mesh.py").write_text(config)
    return [
        f"--config={root}/mesh.py", "--method=uniform", f"--prompts={root}/many.txt", f"--num_images={IMAGES}",
        "--seed=3", "--steps=8", "--size=16x16",
    ]  # fmt: skip


def ended(processes: list[Process], status: int = 0) -> None:
    assert [process.end(SECONDS) for process in processes] == [status] * len(processes), [p.said() for p in processes]


def contents(*outs: Path) -> dict[str, bytes]:
    """Of the pictures, and of nothing that looks like one."""
    return {path.name: path.read_bytes() for out in outs for path in sorted(out.rglob("[!.]*.png"))}


@pytest.fixture(scope="module")
def folder(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by one process on one device."""
    out = tmp_path_factory.mktemp("whole")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | dict(PYTHONPATH=str(ROOT), XLA_FLAGS=flags)
    command = [sys.executable, "-m", "afa_jax.sample", *arguments, f"--out={out}"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=SECONDS)
    return out


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    found = contents(folder)
    assert len(found) == COUNT * IMAGES
    return found


def test_the_files_are_the_same_on_eight_devices(arguments, whole, tmp_path):
    assert run(sample.main, [*arguments, f"--out={tmp_path}", "--config.sample.batch=3"]) == 0
    assert contents(tmp_path) == whole


def test_two_processes_killed_in_the_middle_go_on_where_they_were(
    launch: Launch, arguments: list[str], whole: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*arguments, f"--out={tmp_path}"]
    processes = launch("afa_jax.sample", 2, *arguments, devices=2)
    deadline = time.monotonic() + SECONDS
    while not contents(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.send(signal.SIGKILL)
    ended(processes, -signal.SIGKILL)
    left = contents(tmp_path)
    assert 0 < len(left) < len(whole) and left.items() <= whole.items()
    processes = launch("afa_jax.sample", 2, *arguments, devices=2)
    ended(processes)
    assert contents(tmp_path) == whole
    said = f"{tmp_path}: {len(whole) - len(left)} pictures made, {len(left)} were there already; "
    assert processes[0].output[-1].startswith(said) and processes[0].output[-1].endswith(" on each of 4 devices")
    assert [line for line in processes[1].output if not line.startswith("[Gloo]")] == []


def test_hosts_with_disks_of_their_own_make_what_no_disk_has(
    launch: Launch, arguments: list[str], folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first, second = (tmp_path / f"out{index}" for index in range(2))
    shutil.copytree(folder, first)
    for name in whole:
        if int(name[:8]) % 2 or name == "00000004.png":
            (first / "00000" / name).unlink()
    arguments = [*arguments, f"--out={tmp_path / 'out'}"]
    processes = launch("tests/processes/own_disk.py", 2, *arguments)
    ended(processes)
    assert f": 13 pictures made, {len(whole) - 13} were there already" in processes[0].output[-1]
    assert sorted(contents(first)) == sorted(whole)[::2] and sorted(contents(second)) == sorted(whole)[1::2]
    assert contents(first, second) == whole
    assert (first / "recipe.json").read_bytes() == (second / "recipe.json").read_bytes()
    (second / "recipe.json").write_text('{"prompts_sha256": "", "num_images": 2}')
    processes = launch("tests/processes/own_disk.py", 2, *arguments)
    ended(processes, 2)
    for process in processes:
        assert process.said().startswith(f"error: {second}/recipe.json: prompts_sha256 is '' there and ")
