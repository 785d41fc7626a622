"""The JobSet as Kubernetes reads it, and the image."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.launch.conftest import ROOT, Launcher, make_launcher
from tests.launch.examples import AWKWARD, GKE


def manifest(launcher: Launcher, *arguments: str) -> dict[str, Any]:
    result = launcher("gke.sh", "render", *GKE, *arguments)
    assert result.status == 0, result.err
    assert not re.search("@[A-Z_]+@", result.out)
    parsed: dict[str, Any] = yaml.safe_load(result.out)
    return parsed


@pytest.mark.parametrize(
    ("arguments", "slices", "hosts", "chips"),
    [
        ((), 1, 4, 4),
        (("--slices", "2"), 2, 4, 4),
        (("--topology", "2x2x4", "--accelerator", "tpu-v5p-slice"), 1, 4, 4),
        (("--topology", "2x4", "--chips-per-host", "8"), 1, 1, 8),
    ],
)
def test_one_pod_a_host_with_all_of_its_chips(
    launcher: Launcher, arguments: tuple[str, ...], slices: int, hosts: int, chips: int
) -> None:
    [job] = manifest(launcher, *arguments)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == slices
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (hosts, hosts, "Indexed")
    [container] = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}


def test_the_command_is_the_trainer_that_resumes_and_its_arguments_survive(launcher: Launcher, tmp_path: Path) -> None:
    [job] = manifest(launcher, *AWKWARD)["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    # Kubernetes replaces $(NAME), and makes $$ a $.
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", "\n".join(container["args"]))
    arguments = [argument.replace("$$", "$") for argument in container["args"]]
    assert arguments == [
        *["python", "-m", "afa_jax.train", "--config", "configs/sd15.py"],
        *["--workdir", "/mnt/my-bucket/runs/sd15", "--resume_if_any", *AWKWARD],
    ]
    # The container's shell hands them on as they are.
    bash, c, script, name = container["command"]
    assert (bash, c, name) == ("bash", "-c", "trainer")
    (tmp_path / "pod").mkdir()
    (tmp_path / "pod" / "command.sh").write_text(script)
    pod = make_launcher(tmp_path / "pod", ("python",))
    assert pod(str(tmp_path / "pod" / "command.sh"), *arguments, folder=ROOT).calls == [arguments]


def test_it_restarts_but_not_after_an_error_to_mend(launcher: Launcher) -> None:
    spec = manifest(launcher, "--max-restarts", "3")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert spec["failurePolicy"]["rules"] == [dict(action="FailJobSet", onJobFailureReasons=["PodFailurePolicy"])]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_workdirs_bucket_is_mounted_and_the_nodes_are_chosen(launcher: Launcher) -> None:
    pod = manifest(launcher)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    [container] = pod["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys() and mounts["bucket"] == "/mnt/my-bucket"
    assert volumes["bucket"]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["spec"]["nodeSelector"] == nodes
    spot = manifest(launcher, "--spot")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert spot["spec"]["nodeSelector"] == nodes | {"cloud.google.com/gke-spot": "true"}


def test_numbers_and_words_of_yaml_stay_strings(launcher: Launcher) -> None:
    odd = ("--bucket", "1234", "--workdir", "/mnt/1234/a", "--service-account", "true", "--image", "no")
    pod = manifest(launcher, *odd)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "true" and pod["containers"][0]["image"] == "no"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "1234"


def test_the_image_has_jax_as_it_exists_no_root_and_the_trainer_as_its_command() -> None:
    text = (ROOT / "launch" / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match("[A-Z]+ ", line)]
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra") or []
    mentioned = re.findall(r"ACCELERATOR=(\w+)", text) + re.findall(r"# or ([\w, ]+)", text)[0].split(", ")
    assert mentioned and set(mentioned) <= {*extras}
    assert steps[-2:] == [["USER", "afa"], ["ENTRYPOINT", '["python", "-m", "afa_jax.train"]']]
    # What is copied exists, and is let through.
    passed = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [arguments.split()[0] for step, arguments in steps if step == "COPY"]
    assert sorted(f"!{name}" for name in copied) == sorted(line for line in passed if line.startswith("!"))
    assert all((ROOT / name).exists() for name in copied)
