"""What the launchers would start, and that they start exactly that.

Write the goldens again, and read the difference: ``PYTHONPATH=. python tests/launch/test_dry_run.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Answer, Launcher, command_lines, make_launcher
from tests.launch.examples import EXAMPLES, GKE, LASTING, SLICE, SLURM

GOLDENS = Path(__file__).parent / "goldens"
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
PREEMPTED: Answer = ("tpu-vm list", "PREEMPTED\n", 0)
NONE: Answer = ("tpu-vm list", "", 0)
# What a real run needs to hear to take the path that a dry run prints.
ANSWERS: dict[str, list[Answer]] = {
    "tpu_create_queued": [("queued-resources list", "ACTIVE\n", 0), NONE],
    "tpu_create_multislice": [("queued-resources list", "ACTIVE\n", 0), NONE],
    "tpu_resume": [PREEMPTED],
    "tpu_resume_multislice": [
        *[("queued-resources list", "ACTIVE\n", 0), PREEMPTED],
        *[("queued-resources list", "ACTIVE\n", 0), ("tpu-vm list", "READY\nREADY\n", 0)],
    ],
}


def dry(name: str) -> list[str]:
    """An example's command line with --dry-run, before what is the trainer's."""
    ours = [*EXAMPLES[name], "--"].index("--")
    return [*EXAMPLES[name][:ours], "--dry-run", *EXAMPLES[name][ours:]]


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "pip install -r requirements-dev.txt brings it"
    done = subprocess.run(
        [shellcheck, "--external-sources", "--source-path=launch", "--enable=avoid-nullary-conditions", *SCRIPTS],
        cwd=ROOT / "launch", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_person_starts_is_executable() -> None:
    assert all(os.access(ROOT / "launch" / name, os.X_OK) for name in ("tpu.sh", "gke.sh", "slurm.sh"))


def test_a_golden_for_every_example_and_no_other() -> None:
    assert sorted(path.stem for path in GOLDENS.glob("*.txt")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_dry_run_prints_every_command_and_runs_none(launcher: Launcher, name: str) -> None:
    result = launcher(*dry(name))
    assert result.status == 0, result.err
    assert result.out == (GOLDENS / f"{name}.txt").read_text()
    assert result.calls == []


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not re.match("gke_apply|tpu_watch", name)])
def test_a_real_run_starts_what_the_dry_run_printed(launcher: Launcher, name: str) -> None:
    result = launcher(*EXAMPLES[name], answers=ANSWERS.get(name, []))
    assert result.status == 0, result.err
    printed = (GOLDENS / f"{name}.txt").read_text()
    assert result.calls == command_lines(printed)


def test_gke_hands_kubectl_the_manifest_that_the_dry_run_printed(launcher: Launcher) -> None:
    result = launcher(*EXAMPLES["gke_apply_multislice"])
    printed = (GOLDENS / "gke_apply_multislice.txt").read_text()
    assert result.calls == [["kubectl", "--namespace=ml", "apply", "--filename=-"]]
    assert printed == f"kubectl --namespace=ml apply --filename=- <<'END'\n{result.stdin}END\n"


def test_from_another_folder_and_by_equals_signs_it_is_the_same(launcher: Launcher) -> None:
    assert launcher("slurm.sh", *SLURM, "--dry-run").out == launcher(
        "slurm.sh", "--nodes=4", "--gpus-per-node=8", "--time=12:00:00", "--config=configs/sd15.py",
        "--workdir=runs/sd15", "--dry-run",
    ).out  # fmt: skip


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh"])
def test_help_is_the_scripts_head(launcher: Launcher, script: str) -> None:
    result = launcher(script, "--help")
    assert result.status == 0 and "Needs:" in result.out and "--dry-run" in result.out and "#!/" not in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu.sh",), "which subcommand?"),
        (("tpu.sh", "make", *SLICE), "unknown subcommand 'make'"),
        (("tpu.sh", "create", *SLICE, "--spott"), "unknown option --spott"),
        (("tpu.sh", "create", *SLICE, "extra"), "unexpected argument 'extra'"),
        (("tpu.sh", "create", *SLICE, "--zone"), "--zone needs a value"),
        (("tpu.sh", "create", *SLICE, "--zone", "--spot"), "--zone needs a value, not --spot"),
        (("tpu.sh", "create", *SLICE[2:]), "--name is required"),
        (("tpu.sh", "create", *SLICE[:-2]), "--accelerator-type is required"),
        (("tpu.sh", "create", *SLICE[:-1], "tpu7x-16"), "name it by --runtime-version"),
        (("tpu.sh", "create", *SLICE, "--name", "My TPU"), "--name My TPU: lower-case"),
        (("tpu.sh", "create", *SLICE, "--slices", "two"), "--slices two: a number"),
        (("tpu.sh", "logs", *SLICE, "--slice", "1"), "--slice 1: there is one slice"),
        (("tpu.sh", "run", *SLICE, "--config", "c.py"), "--workdir is required"),
        (("tpu.sh", "run", *SLICE, "--config.train.steps", "5"), "--config.train.steps: write"),
        (("tpu.sh", "resume", *SLICE, *LASTING, "--workdir", "runs/a"), "--workdir runs/a: lost with the machines"),
        (("tpu.sh", "watch", *SLICE, "--config", "c.py", "--workdir", "runs/a"), "--bucket is required"),
        (("gke.sh", "apply", *GKE, "--topology", "4 by 4"), "--topology 4 by 4: chips as 4x4"),
        (("gke.sh", "apply", *GKE, "--topology", "1x1"), "1 chips are not divisible by --chips-per-host 4"),
        (("gke.sh", "apply", *GKE, "--topology", "2x2", "--slices", "2"), "--slices 2: GKE joins slices of several"),
        (("gke.sh", "apply", *GKE, "--workdir", "/mnt/my-bucket/"), "put it in the bucket"),
        (("gke.sh", "apply", *GKE, "--image", "a: b"), "--image a: b: an image's name"),
        (("gke.sh", "status", "--name", "afa", "--all"), "unknown option --all"),
        (("slurm.sh", *SLURM, "--mounts", "/data"), "--mounts: of a container"),
        (("slurm.sh", *SLURM, "--pyxis", "a", "--apptainer", "b"), "exclude each other"),
        (("slurm.sh", *SLURM, "--time", "tomorrow"), "--time tomorrow: as sbatch has it"),
        (("slurm.sh", *SLURM[2:]), "--nodes is required"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_that_names_the_option(
    launcher: Launcher, arguments: tuple[str, ...], message: str
) -> None:
    result = launcher(*arguments)
    assert result.status == 2 and result.calls == [] and result.out == ""
    assert message in result.err and result.err.startswith("error: ") and result.err.count("\n") == 1


if __name__ == "__main__":
    for old in GOLDENS.glob("*.txt"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        launcher = make_launcher(Path(folder))
        for name in EXAMPLES:
            (GOLDENS / f"{name}.txt").write_text(launcher(*dry(name)).out)
