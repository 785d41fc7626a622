"""The processes of a run and this one's number, from flags, from the environment or from the cluster."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError

FLAGS = ("--coordinator", "--num_processes", "--process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that several processes can run; without them the environment decides."""
    group = parser.add_argument_group("several processes", "all three, or none: then the environment decides")
    group.add_argument(FLAGS[0], metavar="HOST:PORT", help="where process 0 listens, a free port of its host")
    group.add_argument(FLAGS[1], type=int, metavar="P", help="how many there are")
    group.add_argument(FLAGS[2], type=int, metavar="I", help="which one this is, from 0")


def settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the arguments of ``jax.distributed.initialize``, or None for a single process.

    Raises:
        InputError: some of the three options or variables are missing, or their values do not fit together.
    """
    given = [getattr(options, flag.removeprefix("--")) for flag in FLAGS]
    variables = [os.environ.get(name) for name in VARIABLES]
    if any(value is not None for value in given):
        return _numbered(FLAGS, given)
    if any(variables[1:]):
        return _numbered(VARIABLES, variables)
    found = _cluster()
    if found is None and variables[0]:
        raise _together_only(VARIABLES)
    return found


def _numbered(names: tuple[str, ...], values: list[Any]) -> dict[str, Any] | None:
    """Return the arguments of initialize from the three values; errors name the options or variables of ``names``."""
    if any(value in (None, "") for value in values):
        raise _together_only(names)
    address, count, index = values
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise InputError(f"{names[1]}={count}, {names[2]}={index}: choose whole numbers") from None
    if not 0 <= index < count:
        raise InputError(f"{names[2]}={index} does not fit {names[1]}={count}; choose 0 to {count - 1}")
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise InputError(f"{names[0]}={address}: write HOST:PORT, the host of process 0 and a free port there")
    if count == 1:
        return None
    # Not what jax finds in the environment: that is for processes that it has counted itself.
    return dict(
        coordinator_address=address, num_processes=count, process_id=index, cluster_detection_method="deactivate"
    )


def _together_only(names: tuple[str, ...]) -> InputError:
    return InputError(f"{', '.join(names[:-1])} and {names[-1]} belong together; give all three, or none")


def _cluster() -> dict[str, Any] | None:
    """Return the arguments of initialize where a cluster known to jax has started several processes; else None.

    Without this check, jax would take one process in a Slurm shell for a cluster of one process with one GPU.
    """
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return dict(cluster_detection_method="ompi") | _devices(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    if all(name in env for name in slurm) and int(env["SLURM_NTASKS"]) > 1:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", ""))
        return dict(cluster_detection_method="slurm") | _devices(tasks)
    if "tpu" in (env.get("JAX_PLATFORMS") or "tpu"):
        hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
        slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
        if "," in hosts or slices > 1 or "TPU_PROCESS_ADDRESSES_PATH" in env:
            return {}
        # A Cloud TPU virtual machine knows its neighbours from the metadata server, which jax asks.
        chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
        if chips and not hosts and importlib.util.find_spec("libtpu"):
            return {}
    indexed = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env  # a pod of an indexed Job
    if indexed and importlib.util.find_spec("kubernetes"):
        return dict(cluster_detection_method="k8s")
    return None


def _devices(processes_on_hosts: str) -> dict[str, Any]:
    """Return the argument that gives all of a host's devices to a process that is the only one there.

    By default jax gives such a process the first device only. JAX_LOCAL_DEVICE_IDS, jax's own variable, goes first.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?", processes_on_hosts) and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return dict(local_device_ids=[]) if alone else {}
