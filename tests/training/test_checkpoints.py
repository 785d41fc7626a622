"""Checkpoints: what comes back, which ones stay, and how a damaged one is told."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.errors import InputError
from afa_jax.training.checkpoints import Checkpoints, NonFiniteError

TREES: dict[str, Any] = dict(
    params={
        "conv.kernel": jnp.linspace(0, 1, 3000).reshape(3, 1000),
        "half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
    },
    opt=(jnp.int32(3), dict(mu=jnp.ones((2, 2)))),
    step=jnp.zeros((), jnp.int32),
)


def save(workdir: Path, *steps: int, keep: int = 5, **scores: float) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            trees = TREES | dict(step=jnp.int32(step))
            checkpoints.save(step, trees, dict(sha="abc", at=(step, 0.1)), scores.get(f"at{step}"))


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_arrays_and_facts_come_back_exactly(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        step, trees, facts = checkpoints.restore(jax.tree.map(jnp.zeros_like, TREES))
        first = checkpoints.restore(TREES, 1)
    assert step == 2 and facts == dict(sha="abc", at=[2, 0.1]) and first[0] == 1 == first[1]["step"]
    assert repr(jax.tree.structure(trees)) == repr(jax.tree.structure(TREES))
    for restored, saved in zip(jax.tree.leaves(trees), jax.tree.leaves(TREES | dict(step=jnp.int32(2))), strict=True):
        assert restored.dtype == saved.dtype
        np.testing.assert_array_equal(restored, saved)


def test_the_last_ones_and_the_best_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, at1=0.5, at2=0.3, at4=float("nan"), at5=0.3)
    assert names(tmp_path) == ["2", "4", "5", "scores.json"]
    assert json.loads((tmp_path / "checkpoints" / "scores.json").read_text()) == {"2": 0.3, "5": 0.3}
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.best() == 2 and checkpoints.listing() == "2 (best), 4, 5"
        assert checkpoints.improves(0.2) and not checkpoints.improves(0.3) and not checkpoints.improves(float("nan"))
        checkpoints.rate(4, 0.1)
        assert checkpoints.best() == 4 and checkpoints.delete_after(4) == [5]
    assert names(tmp_path) == ["2", "4", "scores.json"]


def test_a_step_is_saved_once_and_only_if_it_is_finite(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, TREES, {})
        with pytest.raises(ValueError, match="checkpoints/4 exists"):
            checkpoints.save(4, TREES, {})
        checkpoints.save(3, TREES, {})  # orbax's own manager would have left out a step before the last one
        for number in (jnp.nan, jnp.inf):
            with pytest.raises(NonFiniteError, match=r"opt.0.x is not finite"):
                checkpoints.save(5, dict(opt=[dict(x=jnp.array([0, number], jnp.bfloat16))]), {})
    assert names(tmp_path) == ["3", "4"]


def test_another_config_is_told_by_the_first_array_that_differs(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        for params, message in (
            ({"half": TREES["params"]["half"]}, "it has params.conv.kernel, which the config lacks"),
            (TREES["params"] | dict(more=jnp.zeros(2)), "it lacks params.more"),
            (TREES["params"] | dict(half=jnp.zeros(7)), r"params.half is bfloat16 \[7\] there and float32 \[7\] here"),
        ):
            with pytest.raises(InputError, match=f"checkpoints/1 cannot be restored into this config: {message}"):
                checkpoints.restore(TREES | dict(params=params))


def damage(checkpoint: Path, how: str) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    if how == "gone":
        largest.unlink()
    if how == "facts":
        facts = checkpoint / "facts" / "metadata"
        facts.write_text(facts.read_text().replace('"abc"', '"abd"'))
    if how == "no facts":
        shutil.rmtree(checkpoint / "facts")


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone", "facts", "no facts"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, how):
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoints" / "3", how)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=r"checkpoints/3 is damaged \(.*\); --resume_step 2 ") as error:
            checkpoints.restore(TREES)
        assert "\n" not in str(error.value)
        assert checkpoints.restore(TREES, 2)[0] == 2
        checkpoints.delete_after(1)
        damage(tmp_path / "checkpoints" / "1", how)
        with pytest.raises(InputError, match=r"checkpoints/1 is damaged \(.*\); --overwrite starts again"):
            checkpoints.restore(TREES)


@pytest.mark.parametrize(
    "record", [[], dict(facts=1, arrays={}), dict(facts={}), dict(facts={}, arrays=dict(a=1)), None]
)
def test_facts_of_other_types_are_damage(tmp_path, record):
    """Their sums are right: something else wrote them."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    (folder / "facts" / "metadata").write_text(json.dumps(record))
    sums = json.loads((folder / "sums.json").read_text())
    sums["facts/metadata"] = zlib.crc32((folder / "facts" / "metadata").read_bytes())
    (folder / "sums.json").write_text(json.dumps(sums))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match=r"checkpoints/1 (is damaged|cannot be)"):
        checkpoints.restore(TREES)


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_a_checkpoint_that_memory_is_too_small_for_is_not_called_damaged(tmp_path, monkeypatch, error):
    def restore(*_: Any, **__: Any) -> None:
        raise error

    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "restore", restore)
        with pytest.raises(type(error)):
            checkpoints.restore(TREES)


def test_no_flipped_bit_is_restored_unnoticed(tmp_path):
    save(tmp_path, 1)
    files = [path for path in (tmp_path / "checkpoints" / "1").rglob("*") if path.is_file()]
    random = np.random.default_rng(0)
    with Checkpoints(tmp_path) as checkpoints:
        _, _, facts = checkpoints.restore(TREES)
        for path in files * 3:
            content = path.read_bytes()
            flipped = bytearray(content)
            flipped[random.integers(len(content))] ^= 1 << random.integers(8)
            path.write_bytes(flipped)
            if path.parent.name == "1" and path.name != "sums.json":  # orbax's notes: when it was saved and the like
                assert checkpoints.restore(TREES)[2] == facts
            else:
                with pytest.raises(InputError, match="checkpoints/1 is damaged"):
                    checkpoints.restore(TREES)
            path.write_bytes(content)


def test_what_a_killed_process_left_is_removed(tmp_path):
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "0.deleted")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    assert names(tmp_path) == ["1", "2"]


def test_unreadable_scores_are_named(tmp_path):
    save(tmp_path, 1, at1=0.5)
    for content in (b"[1", b"[]", b"\xff", b"[" * 100_000, b'{"1": NaN}', b'{"1": 1%s}' % (b"0" * 400), b'{"x": 1}'):
        (tmp_path / "checkpoints" / "scores.json").write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoints/scores.json: not readable; remove it"):
            Checkpoints(tmp_path)
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(tmp_path, 0)
