"""What happens on the hosts: what the launchers send there is executed, with a trainer that records or waits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Launcher, command_lines, environment, make_launcher
from tests.launch.examples import AWKWARD, LASTING, SLICE, SLURM

TRAINED = ["-m", "afa_jax.train", "--config", "configs/sd15.py", "--workdir"]

# A trainer's manners: SIGTERM is answered by saving, with status 0. What it is to do is in the file "manners".
TRAINER = """
import signal, sys, time
open("argv", "w").write("\\0".join(sys.argv[1:]))
manners = open("manners").read()
def save(*_):
    time.sleep(0.2)
    print("saved", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
if manners == "wait":
    open("waiting", "w").close()
    time.sleep(60)
raise SystemExit(int(manners))
"""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class Host:
    """A host's home directory that is set up, and the commands that tpu.sh sends to it."""

    def __init__(self, home: Path, launcher: Launcher) -> None:
        self.home, self.code, self.launcher = home, home / "afa_jax", launcher
        shutil.copytree(ROOT / "launch", self.code / "launch")
        python = self.code / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!{sys.executable} -IS\n{TRAINER}")
        python.chmod(0o755)
        (self.code / ".venv" / "ready").touch()

    def send(self, subcommand: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Execute what a dry run of ``launch/tpu.sh SUBCOMMAND`` would send, as ssh does: by a shell."""
        printed = self.launcher("tpu.sh", subcommand, *SLICE, *LASTING, "--dry-run", *arguments).out
        [command] = [word for line in command_lines(printed) for word in line if word.startswith("--command=")]
        return subprocess.run(
            ["bash", "-c", command.removeprefix("--command=")],
            cwd=self.home, env=environment(HOME=str(self.home), HOSTNAME="t1v-w-0"),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def state(self) -> str:
        return self.send("status").stdout.strip().removeprefix("afa_jax on t1v-w-0: ")

    def train(self, manners: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.code / "manners").write_text(manners)
        (self.code / "waiting").unlink(missing_ok=True)
        return self.send("run", *arguments)

    def log(self) -> str:
        return (self.code / ".cache" / "run" / "log").read_text()


@pytest.fixture
def host(tmp_path: Path, launcher: Launcher) -> Host:
    return Host(tmp_path / "home", launcher)


def test_arguments_reach_the_trainer_as_they_were_given(host: Host) -> None:
    assert host.train("0", *AWKWARD, "--expert", "x=it's here", "--", "--quiet").returncode == 0
    wait_for(lambda: host.state() == "finished")
    argv = (host.code / "argv").read_text().split("\0")
    assert argv == [*TRAINED, "/mnt/my-bucket/runs/sd15", *AWKWARD, "--expert", "x=it's here", "--quiet"]
    assert not (host.home / "x").exists() and not (host.code / "x").exists()


def test_a_run_outlives_its_connection_and_stops_when_it_is_told(host: Host) -> None:
    assert host.state() == "idle"
    assert host.train("wait").returncode == 0
    wait_for((host.code / "waiting").exists)
    assert host.state() == "running"
    pid = int((host.code / ".cache" / "run" / "pid").read_text())
    assert os.getsid(pid) != os.getsid(0)  # what hangs up here does not reach it

    again = host.train("0")
    assert again.returncode == 1 and "t1v-w-0 runs already" in again.stderr

    assert host.send("stop").returncode == 0
    wait_for(lambda: host.state() == "stopped")  # not finished, though the trainer left with 0
    assert "saved" in host.log()
    assert host.send("logs", "--lines", "1").stdout == "saved\n"
    assert host.send("stop").returncode == 0  # nothing to stop


def test_a_failure_says_its_status(host: Host) -> None:
    assert host.train("2").returncode == 0
    wait_for(lambda: host.state() == "failed 2")


def test_a_host_that_went_down_has_stopped(host: Host) -> None:
    host.train("wait")
    wait_for((host.code / "waiting").exists)
    run = host.code / ".cache" / "run"
    pid = int((run / "pid").read_text())
    os.killpg(os.getsid(pid), signal.SIGKILL)  # all of its session at once
    wait_for(lambda: host.state() == "stopped")


def test_a_host_without_set_up_is_told_so(host: Host) -> None:
    (host.code / ".venv" / "ready").unlink()
    assert host.state() == "bare"
    refused = host.train("0")
    assert refused.returncode == 1 and "launch/tpu.sh setup" in refused.stderr
    shutil.rmtree(host.code)
    assert host.state() == "bare"


@pytest.mark.parametrize("mounted", [False, True])
def test_set_up_installs_jax_for_tpus_and_mounts_the_bucket_once(tmp_path: Path, mounted: bool) -> None:
    """What tpu.sh setup copies and sends, executed in an empty home; installing and mounting are only recorded."""
    programs = ("python3", "sudo", "gcsfuse", "mountpoint")
    launcher = make_launcher(tmp_path, programs)
    *_, ssh = command_lines(launcher("tpu.sh", "setup", *SLICE, *LASTING, "--dry-run").out)
    home = tmp_path / "home"
    (home / "afa_jax" / ".venv").mkdir(parents=True)  # python3 -m uv venv would make it
    shutil.copytree(ROOT / "launch", tmp_path / "archive" / "launch")
    subprocess.run(["tar", "-czf", home / "afa_jax.tar.gz", "-C", tmp_path / "archive", "launch"], check=True)
    (home / "run.sh").write_text(ssh[-1].removeprefix("--command="))

    answers = [] if mounted else [("mountpoint", "", 1)]
    result = launcher(str(home / "run.sh"), answers=answers, folder=home, HOME=str(home))
    assert result.status == 0, result.err
    install = ["python3", "-m", "uv", "pip", "install", "--quiet", "--python", ".venv/bin/python"]
    assert result.calls[:4] == [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "--upgrade", "uv"],
        ["python3", "-m", "uv", "venv", "--quiet", "--python", "3.12", ".venv"],
        [*install, "-r", "requirements.txt", "jax[tpu]"],
        ["mountpoint", "-q", "/mnt/my-bucket"],
    ]
    mount = ["gcsfuse", "--implicit-dirs", "--rename-dir-limit=100000", "my-bucket", "/mnt/my-bucket"]
    assert result.calls[-1] == (result.calls[3] if mounted else mount)
    assert (home / "afa_jax" / ".venv" / "ready").exists()


@pytest.mark.parametrize(("manners", "told", "status"), [("0", False, 0), ("2", False, 2), ("wait", True, 143)])
def test_stopped_tells_a_run_that_was_stopped_from_one_that_finished(
    tmp_path: Path, manners: str, told: bool, status: int
) -> None:
    (tmp_path / "manners").write_text(manners)
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "stopped.sh"), sys.executable, "-IS", "-c", TRAINER],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if told:
        wait_for((tmp_path / "waiting").exists)
        process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert ("saved" in out) == told


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False), (1, False)])
def test_a_slurm_job_is_requeued_when_it_was_stopped_and_only_then(
    launcher: Launcher, status: int, requeued: bool
) -> None:
    [sbatch] = command_lines(launcher("slurm.sh", "--dry-run", *SLURM, *AWKWARD).out)
    job = sbatch[sbatch.index("launch/slurm_job.sh") + 1 :]
    result = launcher("slurm_job.sh", *job, answers=[("srun", "", status)], SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n1")
    assert result.status == status
    assert result.calls == [job, *([["scontrol", "requeue", "7"]] if requeued else [])]
    assert job[-len(AWKWARD) :] == list(AWKWARD)
