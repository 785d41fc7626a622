"""Compiled programs are kept between starts, unless the environment or the folder forbids it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from afa_jax.program_cache import cache_folder, calm_compiler, keep_programs

COMPILES = """
import sys
from afa_jax.cli.commands import run

def main(arguments):
    import jax
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda k, x: jax.numpy.sort(jax.numpy.sin(x @ x)), x))
    f(jax.numpy.eye(8)).block_until_ready()

sys.exit(run(main))
"""


def test_a_program_is_kept_where_the_user_keeps_caches(tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    own |= dict(XDG_CACHE_HOME=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    subprocess.run([sys.executable, "-c", COMPILES], env=own, check=True)
    kept = {path.name: path.stat().st_mtime_ns for path in cache_folder(own).glob("*-cache")}
    assert kept
    subprocess.run([sys.executable, "-c", COMPILES], env=own, check=True)
    assert kept == {path.name: path.stat().st_mtime_ns for path in cache_folder(own).glob("*-cache")}


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_the_environment_decides(name: str, tmp_path: Path) -> None:
    own = {name: "", "XDG_CACHE_HOME": str(tmp_path)}
    keep_programs(own)
    assert set(own) == {name, "XDG_CACHE_HOME"}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = dict(XDG_CACHE_HOME=str(tmp_path / "file"))
    keep_programs(own)
    assert set(own) == {"XDG_CACHE_HOME"}


def test_the_compilers_alarm_is_off_unless_the_environment_says_otherwise() -> None:
    own: dict[str, str] = {}
    calm_compiler(own)
    assert own == dict(TF_CPP_MIN_LOG_LEVEL="3")
    own = dict(TF_CPP_MIN_LOG_LEVEL="0")
    calm_compiler(own)
    assert own == dict(TF_CPP_MIN_LOG_LEVEL="0")
