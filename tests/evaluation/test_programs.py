"""A process that compiles very many programs forgets them before Linux has no more memory mappings for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from afa_jax.evaluation.comparison import comparison, programs
from afa_jax.evaluation.comparison.programs import MAPPINGS, release_programs
from afa_jax.methods.method import Method

linux = pytest.mark.skipif(not MAPPINGS.exists(), reason="the system does not say what a process has mapped")


class Program:
    """A jitted function that counts how often it was traced, and so compiled."""

    def __init__(self) -> None:
        self.traced = 0
        self.run = jax.jit(self._run)

    def _run(self, x: jax.Array) -> jax.Array:
        self.traced += 1
        return jnp.sin(x) + 1


@pytest.fixture
def program() -> Program:
    program = Program()
    program.run(jnp.zeros(3))
    return program


def allow(monkeypatch, tmp_path, count):
    most = tmp_path / "max_map_count"
    most.write_text(f"{count}\n")
    monkeypatch.setattr(programs, "MOST_MAPPINGS", most)


@linux
def test_programs_are_kept_while_there_is_room(program, tmp_path, monkeypatch):
    allow(monkeypatch, tmp_path, 10**9)
    assert not release_programs()
    program.run(jnp.zeros(3))
    assert program.traced == 1


@linux
def test_all_are_forgotten_at_half_of_the_mappings_and_made_again(program, tmp_path, monkeypatch):
    allow(monkeypatch, tmp_path, 2 * len(MAPPINGS.read_text().splitlines()) - 200)
    assert release_programs()
    assert program.run(jnp.zeros(3)).tolist() == [1, 1, 1]
    assert program.traced == 2


def test_a_system_that_does_not_say_keeps_them(program, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAPPINGS", tmp_path / "no")
    assert not release_programs(share=0.0)
    program.run(jnp.zeros(3))
    assert program.traced == 1


def test_a_comparison_looks_before_every_method(monkeypatch):
    class Reached(Exception):
        pass

    def folder_of(self, method):
        raise Reached

    looked: list[bool] = []
    monkeypatch.setattr(comparison, "release_programs", lambda: looked.append(True))
    monkeypatch.setattr(comparison.Protocol, "folder_of", folder_of)
    with pytest.raises(Reached):
        object.__new__(comparison.Protocol).make(object.__new__(Method))
    assert looked == [True]
