"""What a process takes from its flags and its environment about the others."""

import argparse
from typing import Any

import pytest

from afa_jax.errors import InputError
from afa_jax.mesh.cluster import add_arguments, settings

SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_LOCALID="0")
NUMBERED = dict(
    coordinator_address="host:1234", num_processes=4, process_id=3, cluster_detection_method="deactivate"
)  # fmt: skip
FLAGS = ("--coordinator=host:1234", "--num_processes=4", "--process_id=3")
VARIABLES = dict(JAX_COORDINATOR_ADDRESS="host:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "JAX_LOCAL_DEVICE_IDS", *SLURM, *VARIABLES):
        monkeypatch.delenv(name, raising=False)


def found(*flags: str) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings(parser.parse_args(flags))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (VARIABLES, NUMBERED),
        (SLURM, dict(cluster_detection_method="slurm")),
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1(x2)"), dict(cluster_detection_method="slurm", local_device_ids=[])),
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="8(x2)"), dict(cluster_detection_method="slurm")),
        (
            SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1", JAX_LOCAL_DEVICE_IDS="0,1"),
            dict(cluster_detection_method="slurm"),
        ),
        (SLURM | dict(SLURM_NTASKS="1"), None),  # a shell
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # a batch script
        (
            dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="1") | SLURM,
            dict(cluster_detection_method="ompi", local_device_ids=[]),
        ),
        (dict(OMPI_COMM_WORLD_SIZE="1"), None),
        (dict(TPU_WORKER_HOSTNAMES="a,b", JAX_PLATFORMS=""), {}),
        (dict(TPU_WORKER_HOSTNAMES="a,b", JAX_PLATFORMS="cpu"), None),
        (dict(TPU_WORKER_HOSTNAMES="a", JAX_PLATFORMS="tpu,cpu"), None),
        (dict(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2", JAX_PLATFORMS="tpu"), {}),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), None),
    ],
)
def test_the_environment_says_who_is_there(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert found() == expected
    assert found(*FLAGS) == NUMBERED
    assert found("--coordinator=host:1234", "--num_processes=1", "--process_id=0") is None


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (FLAGS[:2], {}, "--coordinator, --num_processes and --process_id belong together; give all three, or none"),
        (FLAGS[:1], VARIABLES, "--coordinator, --num_processes and --process_id belong together"),
        ((), dict(JAX_COORDINATOR_ADDRESS="host:1"), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ((), dict(JAX_PROCESS_ID="1"), "belong together; give all three, or none"),
        ((), VARIABLES | dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES=two, JAX_PROCESS_ID=3: choose whole"),
        ((*FLAGS[:2], "--process_id=4"), {}, "--process_id=4 does not fit --num_processes=4; choose 0 to 3"),
        (("--coordinator=host", *FLAGS[1:]), {}, "--coordinator=host: write HOST:PORT"),
    ],
)
def test_what_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        found(*flags)
