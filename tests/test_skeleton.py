"""The frame of the project: what an import costs, the one list of requirements, the Makefile's choice of Python."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# The audit hook sees the attempt, so a `try: import torch` is found where torch is not installed, too. Where it is,
# diffusers and much of transformers import it: they are for the inside of functions.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
tried = set()
sys.addaudithook(lambda event, args: event == "import" and tried.add(args[0].partition(".")[0]))
import afa_jax
for module in pkgutil.walk_packages(afa_jax.__path__, "afa_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({"torch", "tensorflow", "diffusers", "transformers"} & tried))
"""


def test_no_module_imports_torch_or_tensorflow() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_requirements_txt_is_the_one_list() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" in pyproject["project"]["dynamic"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    runtime, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    assert not {r.name for r in runtime} & {r.name for r in dev}
    for requirement in runtime + dev:
        assert requirement.specifier, f"{requirement} needs a range"
        assert requirement.url is None


def add_python(folder: Path, name: str, version: str) -> Path:
    """A Python that says it is of that version, in a folder that is on PATH or not."""
    *numbers, level = [*map(int, version.partition(" ")[0].split(".")), version.partition(" ")[2] or "final"]
    code = f"import sys; sys.version_info = {(*numbers, level, 0)!r}; exec(sys.argv[2])".replace("'", '"')
    return add_script(folder, name, f"exec '{sys.executable}' -c '{code}' \"$@\"")


def add_script(folder: Path, name: str, line: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    return script


MAKE = shutil.which("make")


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
class TestWhichPython:
    """`make which-python` on a PATH that holds what a test puts there and nothing else."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        folder = tmp_path / "a bin"
        folder.mkdir()
        for tool in ("expr", "head", "tail"):
            (folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"{tool} is not installed"))
        return folder

    def make(self, path: Path, *args: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(path), "HOME": str(path.parent), "LC_ALL": "C"}
        command = [MAKE or "make", "-s", f"VENV={path.parent / 'venv'}", *args]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    def chosen(self, path: Path, *args: str) -> str:
        done = self.make(path, "which-python", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def test_a_shim_that_only_answers_with_an_error_is_passed_over(self, path: Path) -> None:
        add_script(path, "python3.14", "echo 'pyenv: python3.14: command not found' >&2; exit 127")
        working = add_script(path, "python3.12", f"exec '{sys.executable}' \"$@\"")
        assert self.chosen(path) == str(working)

    def test_the_highest_version_wins_whatever_it_is_called(self, path: Path) -> None:
        add_python(path, "python3.12", "3.12.9")
        newest = add_python(path, "python3", "3.13.1")
        assert self.chosen(path) == str(newest)

    def test_the_versions_folder_of_pyenv_counts(self, path: Path) -> None:
        add_python(path, "python3", "3.11.2")
        newest = add_python(path.parent / ".pyenv" / "versions" / "3.14.0" / "bin", "python3.14", "3.14.0")
        assert self.chosen(path) == str(newest)

    def test_versions_without_wheels_of_jax_are_refused(self, path: Path) -> None:
        add_python(path, "python3", "3.15.0")
        add_python(path, "python3.14", "3.14.0 candidate")
        oldest = add_python(path, "python3.11", "3.11.0")
        assert self.chosen(path) == str(oldest)

    def test_without_a_working_python_the_error_says_what_was_tried(self, path: Path) -> None:
        shim = add_script(path, "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
        old = add_python(path, "python3", "3.10.4")
        done = self.make(path, "which-python")
        assert done.returncode != 0
        assert done.stdout == ""
        assert f"{shim}: pyenv: python3.13: command not found" in done.stderr
        assert f"{old}: 3.10.4 is older than 3.11" in done.stderr

    def test_python_names_the_only_candidate(self, path: Path) -> None:
        add_python(path, "python3.13", "3.13.1")
        mine = add_python(path.parent / "my python", "py", "3.12.1")
        assert self.chosen(path, f"PYTHON={mine}") == str(mine)
        done = self.make(path, "which-python", "PYTHON=missing")
        assert done.returncode != 0
        assert "missing" in done.stderr
        assert "python3.13" not in done.stderr

    def test_a_folder_that_is_no_environment_is_left_alone(self, path: Path) -> None:
        add_python(path, "python3", "3.13.1")
        precious = path.parent / "venv" / "precious"
        precious.mkdir(parents=True)
        done = self.make(path, "venv")
        assert done.returncode != 0
        assert "no virtual environment" in done.stderr
        assert precious.exists()


def test_jax_sees_eight_cpu_devices() -> None:
    if os.environ["JAX_PLATFORMS"] != "cpu":
        pytest.skip("JAX_PLATFORMS asks for another platform")
    assert jax.device_count() == 8
    assert jax.numpy.zeros(()).dtype == "float32"  # x64 stays off
