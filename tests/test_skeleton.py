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


def test_every_list_of_requirements_is_an_extra() -> None:
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    lists = {path.name for path in ROOT.glob("requirements-*.txt")}
    assert {f"requirements-{name}.txt" for name in dynamic["optional-dependencies"]} == lists
    for name, extra in dynamic["optional-dependencies"].items():
        assert extra == {"file": [f"requirements-{name}.txt"]}
        assert all(requirement.specifier for requirement in requirements(f"requirements-{name}.txt"))


def test_commits_are_checked_as_make_checks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert "entry: make lint\n" in hooks and "entry: make types\n" in hooks


def add_script(folder: Path, name: str, line: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    return script


MAKE = shutil.which("make")


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
class TestWhichPython:
    """`make which-python` and `make venv` on a PATH that holds what a test puts there and nothing else."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        folder = tmp_path / "a bin"
        folder.mkdir()
        return folder

    def make(self, path: Path, *args: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(path), "HOME": str(path.parent), "LC_ALL": "C"}
        command = [MAKE or "make", "-s", f"VENV={path.parent / 'venv'}", *args]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    def chosen(self, path: Path, *args: str) -> str:
        done = self.make(path, "which-python", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def test_the_first_that_runs_and_has_wheels_is_chosen(self, path: Path) -> None:
        add_script(path, "python3.14", "echo 'pyenv: python3.14: command not found' >&2; exit 127")
        add_script(path, "python3.13", f"exec '{sys.executable}' -c 'raise SystemExit(1)'")  # as one that is too new
        working = add_script(path, "python3.12", f"exec '{sys.executable}' \"$@\"")
        assert self.chosen(path) == str(working)

    def test_the_versions_folder_of_pyenv_counts(self, path: Path) -> None:
        folder = path.parent / ".pyenv" / "versions" / "3.14.0" / "bin"
        newest = add_script(folder, "python3", f"exec '{sys.executable}' \"$@\"")
        assert self.chosen(path) == str(newest)

    def test_what_does_not_fit_is_no_choice(self, path: Path) -> None:
        for version, wanted in ((("3", "10"), 1), (("3", "15"), 1), (("3", "13"), 0)):
            fake = f"import sys; sys.version_info = ({', '.join(version)}, 0, 'final', 0)"
            recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("fits = "))
            code = f"{fake}; {recipe.removeprefix('fits = ')}"
            assert subprocess.run([sys.executable, "-c", code], check=False).returncode == wanted, version
        done = self.make(path, "which-python")
        assert done.returncode != 0 and done.stdout == ""
        assert "PYTHON=path" in done.stderr

    def test_python_names_the_only_candidate(self, path: Path) -> None:
        add_script(path, "python3.13", f"exec '{sys.executable}' \"$@\"")
        mine = add_script(path.parent / "my python", "py", f"exec '{sys.executable}' \"$@\"")
        assert self.chosen(path, f"PYTHON={mine}") == str(mine)
        assert self.make(path, "which-python", "PYTHON=missing").returncode != 0

    def test_uv_makes_the_environment_where_it_is_there(self, path: Path) -> None:
        add_script(path, "uv", 'echo "uv $@"; exit 3')
        assert "uv venv" in self.make(path, "venv").stdout
        python = add_script(path.parent, "mine", 'echo "mine $@" >&2; exit 0')
        assert "uv venv" not in self.make(path, "venv", f"PYTHON={python}").stdout

    def test_a_folder_that_is_no_environment_is_left_alone(self, path: Path) -> None:
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


def test_former_places_that_scripts_know_still_work() -> None:
    from afa_jax import prepare
    from afa_jax.data import prepare as former
    from afa_jax.weights import checkpoint, expected, ldm_keys
    from afa_jax.weights.formats import ldm_keys as tables

    assert former.main is prepare.main
    assert checkpoint.expected_shapes is expected.expected_shapes
    assert (ldm_keys.ldm_table, ldm_keys.ldm_shape) == (tables.ldm_table, tables.ldm_shape)
