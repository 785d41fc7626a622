"""What is installed works away from the repository: the wheel's files, its configs, and what it says it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from afa_jax.config import files
from afa_jax.config.files import load_config
from afa_jax.demo import main as demo
from afa_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_every_module_and_config(tmp_path: Path) -> None:
    (tmp_path / "info").mkdir()
    (tmp_path / "checkout").mkdir()
    for name in ("afa_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "checkout" / name).symlink_to(ROOT / name)
    for path in ROOT.glob("requirements*.txt"):
        (tmp_path / "checkout" / path.name).symlink_to(path)
    command = [sys.executable, "-W", "ignore", "setup.py", "-q"]
    command += ["egg_info", "--egg-base", str(tmp_path / "info"), "build", "--build-base", str(tmp_path / "build")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "build" / "lib"
    there = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    own = [path.relative_to(ROOT).as_posix() for path in (ROOT / "afa_jax").rglob("*") if path.is_file()]
    assert there >= {path for path in own if "__pycache__" not in path}
    assert there >= {f"afa_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {path.partition("/")[0] for path in there} == {"afa_jax"}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["emoji", "configs/emoji.py", "emoji:full"])
def test_a_config_that_is_not_here_is_the_packages(
    spec: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_config(spec).name == "emoji"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(ROOT / "configs" / "emoji.py") in said


def test_a_wheels_own_configs_come_before_a_checkouts(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = elsewhere / "installed"
    installed.mkdir()
    (installed / "sd15.py").write_text((ROOT / "configs" / "sd15.py").read_text())
    monkeypatch.setattr(files, "SHIPPED", (installed, ROOT / "configs"))
    load_config("sd15")
    assert str(installed) in capsys.readouterr().err


def test_a_config_that_is_here_is_taken_without_a_word(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "emoji.py").write_text((ROOT / "configs" / "sd15.py").read_text())
    assert load_config("configs/emoji.py").name == "sd15" and capsys.readouterr().err == ""


@pytest.mark.parametrize("spec", ["nonsense", "elsewhere/emoji.py", "emoji.txt", "../configs/emoji"])
def test_no_other_name_is_looked_for(spec: str, elsewhere: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_config(spec)


def test_the_demo_says_what_it_lacks(elsewhere: Path) -> None:
    with pytest.raises(InputError, match=r"models/emoji/base.*checkout") as error:
        demo([])
    assert "\n" not in str(error.value) and not [*elsewhere.iterdir()]
