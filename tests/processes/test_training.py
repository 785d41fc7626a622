"""``python -m afa_jax.train`` as several processes: killed, and finished by others on another mesh."""

import signal
import time
from pathlib import Path

import numpy as np

from afa_jax import train
from afa_jax.cli.commands import run
from afa_jax.training.log import TIMINGS
from afa_jax.training.workdir import read_metrics
from afa_jax.weights.tensors import read_tensors
from tests.commands.conftest import root as root
from tests.processes.conftest import Launch

STEPS = 6


def test_four_processes_one_killed_then_two_end_where_one_would(launch: Launch, root: Path, tmp_path: Path) -> None:
    """A row that was read twice, or by none, would show: all that is random about it comes from its position."""
    single = (root / "config.py").read_text().replace('("a", "b", "c")', '("a", "b")')
    (tmp_path / "single.py").write_text(single)
    (tmp_path / "mesh.py").write_text(single.replace("cache=", "mesh=dict(expert=1, data=-1, fsdp=1), cache="))
    common = ["--config.train.batch=8", "--config.sabw.sites=last", "--quiet"]
    workdir, alone, steps = tmp_path / "run", tmp_path / "alone", f"--config.train.steps={STEPS}"

    # Two processes for an expert, each with half of the rows: of each process another one has the same rows.
    on_mesh = [f"--config={tmp_path / 'mesh.py'}", f"--workdir={workdir}", "--resume_if_any", *common]
    four = launch(
        "afa_jax.train", 4, *on_mesh, "--config.mesh.expert=2", "--config.train.steps=1000", how="variables"
    )  # fmt: skip
    while not (workdir / "checkpoints" / "2").is_dir():
        assert all(process.running() for process in four), [process.said() for process in four]
        time.sleep(0.05)
    four[3].send(signal.SIGKILL)
    for process in four[:3]:
        assert process.end(60) not in (0, 2)

    # All rows and experts are on either; the weights are split within a process.
    two = launch("afa_jax.train", 2, *on_mesh, "--config.mesh.fsdp=2", steps, how="slurm", devices=2)
    assert [process.end(300) for process in two] == [0, 0], [process.said() for process in two]
    assert two[0].output[-1] == str(workdir) and not any(str(workdir) in line for line in two[1].output)

    assert run(train.main, [f"--config={tmp_path / 'single.py'}", f"--workdir={alone}", *common, steps]) == 0
    lines, expected = (
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(folder)]
        for folder in (workdir, alone)
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-3)
    arrays, expected_arrays = (read_tensors(folder / "aggregators.safetensors") for folder in (workdir, alone))
    assert arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
