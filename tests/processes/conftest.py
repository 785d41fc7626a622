"""Real processes on this machine that find each other in every way that afa_jax.mesh.processes knows."""

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from tests.forked import PROCESSES, run_as_command

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def addressed(how: str, port: int, count: int, index: int) -> tuple[list[str], dict[str, str]]:
    """The flags and the environment by which a process finds the others."""
    address, port_only = f"127.0.0.1:{port}", dict(JAX_COORDINATOR_PORT=str(port))
    if how == "flags":
        return [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"], {}
    if how == "variables":
        return [], dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(index))
    if how == "slurm":
        slurm = dict(JOB_ID="7", STEP_NODELIST="localhost", NTASKS=count, PROCID=index, LOCALID=index)
        return [], port_only | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    assert how == "ompi"
    world = dict(SIZE=count, RANK=index, LOCAL_RANK=index)
    uri = dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911")
    return [], port_only | uri | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in world.items()}


class Process:
    """A process whose output is read as it comes."""

    def __init__(self, file: Path, arguments: list[str], environment: dict[str, str]):
        pipes = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in pipes]
        self._process = PROCESSES.Process(target=run_as_command, args=(file, arguments, environment, ROOT, writers))
        self._process.start()
        for writer in writers:
            writer.close()
        self.output, self.errors = list[str](), list[str]()
        self._said = threading.Condition()
        readers = [os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes]
        for reader, _ in pipes:
            reader.close()
        self._readers = [
            threading.Thread(target=self._read, args=pipe, daemon=True)
            for pipe in zip(readers, (self.output, self.errors), strict=True)
        ]
        for thread in self._readers:
            thread.start()

    def _read(self, pipe: TextIO, lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                with self._said:
                    lines.append(line.rstrip("\n"))
                    self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def wait_for(self, line: str) -> None:
        """Until it has printed this line."""
        with self._said:
            found = self._said.wait_for(lambda: line in self.output or not self.running(), timeout=120)
        assert found and line in self.output, self.errors

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def running(self) -> bool:
        return self._process.is_alive()

    def end(self, seconds: float = 120) -> int:
        """Its exit status, when it has ended."""
        self._process.join(seconds)
        status = self._process.exitcode
        if status is None:
            raise TimeoutError(f"still running after {seconds} seconds: {self.said()}")
        for reader in self._readers:
            reader.join()
        return status

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        for reader in self._readers:
            reader.join()

    def said(self) -> str:
        """What it wrote to stderr itself, without the lines of the libraries."""
        return "\n".join(line for line in self.errors if not re.match(r"\[Gloo\]|[EWI]\d{4} ", line))


Launch = Callable[..., list[Process]]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """``launch(script or module, count, *arguments, ...)``: the processes, or one of them (``only``).

    They find each other by ``how``, have so many CPU ``devices`` each, so many seconds of ``patience`` to start, and go
    when they have not heard of another for so many seconds (``heartbeat``). What is left is killed at the end.
    """
    started: list[Process] = []

    def start(
        program: str,
        count: int,
        *arguments: str,
        how: str = "flags",
        devices: int = 1,
        only: int | None = None,
        patience: int = 100,
        heartbeat: int = 60,
    ) -> list[Process]:
        port = free_port()
        file = ROOT / (f"{program.replace('.', '/')}.py" if program.startswith("afa_jax.") else program)
        xla = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
        common = os.environ | dict(
            PYTHONPATH=str(ROOT),
            XLA_FLAGS=f"{xla} --xla_force_host_platform_device_count={devices}",
            AFA_JAX_START_SECONDS=str(patience),
            AFA_JAX_HEARTBEAT_SECONDS=str(heartbeat),
        )
        processes = []
        for index in range(count) if only is None else [only]:
            flags, variables = addressed(how, port, count, index)
            processes.append(Process(file, [*arguments, *flags], common | variables))
            started.append(processes[-1])
        return processes

    yield start
    for process in started:
        process.kill()
