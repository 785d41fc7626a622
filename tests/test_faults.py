"""What commands write at their end, on a disk that fills up and killed, at every touch of a file.

Trainers' starts are in training/test_workdir.py, their steps in training/test_faults.py.
"""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa_jax.evaluation.comparison import pictures
from afa_jax.evaluation.comparison.picture_files import write_index
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.files import check_new, partial_output, replace_folder, replace_text, writing
from afa_jax.methods.method import Method
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Picture
from afa_jax.training.workdir import MODEL, begin_run, check_model, open_workdir, save_model
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats.single_file import write_single_file
from tests import tiny
from tests.faults import every_fault

OLD, NEW = tiny.text_encoder(0), tiny.text_encoder(1)


def of_a_trainer(folder: Path, text_encoder: Any = NEW) -> None:
    """As finetune and train_vae end, of a run that was done and goes on."""
    check_model(folder, resume=True)
    open_workdir(folder, resume=True, overwrite=False)
    save_model(folder, text_encoder=text_encoder)


def trained(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    begin_run(folder, '{"train": {}}')
    of_a_trainer(folder, OLD)


def of_convert(folder: Path, text_encoder: Any = NEW) -> None:
    """A single file in another's place."""
    write_single_file(folder / "a.safetensors", MemoryCheckpoint.of(text_encoder=text_encoder), overwrite=True)


def converted(folder: Path) -> None:
    folder.mkdir()
    of_convert(folder, OLD)


def of_export(folder: Path, text: str = "new") -> None:
    """A folder of small files in another's place."""
    out = folder / "pair"
    check_new(out, overwrite=True)
    with writing(out), partial_output(out) as partial:
        partial.mkdir()
        for name in ("README.md", "ensemble.json"):
            replace_text(partial / name, text)
        replace_folder(out, partial)


def exported(folder: Path) -> None:
    folder.mkdir()
    of_export(folder, "old")


def of_a_comparison(folder: Path) -> None:
    """As evaluate and the demo make pictures, keep what they measured, and write a page."""
    items = [Item(prompt=prompt) for prompt in "ab"]
    write_index(folder / "pictures", methods=["m"], prompts=["a", "b"], examples=["a"], seeds=[0])
    made = pictures.PictureFolder(folder / "pictures", dict(method=dict(kind="uniform")))
    made.make(Unloaded(), SampleOptions(size=(8, 8)), items, [0])
    made.kept("scores", dict(of=1), lambda: dict(mean=0.5))
    replace_text(folder / "report.json", "{}")


class Unloaded(Method):
    """A method without networks."""

    denoiser = experts = None  # type: ignore[assignment]

    def __init__(self) -> None:
        object.__setattr__(self, "name", "m")


def drawn(requests: Any, *_: Any, **__: Any) -> Any:
    return (Picture(request=r, pixels=np.full((8, 8, 3), len(r.prompt), np.uint8)) for r in requests)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def whole(name: str) -> Callable[[Path, Path, Path], None]:
    """A check that what was there is there as a whole, or what takes its place, or both wait for the next start."""

    def check(found: Path, old: Path, new: Path) -> None:
        there = found / name if (found / name).exists() else found / f".{name}.replaced"
        either = [(path / name).read_bytes() if (path / name).is_file() else tree(path / name) for path in (old, new)]
        assert (there.read_bytes() if there.is_file() else tree(there)) in either

    return check


@pytest.mark.parametrize("kind", ["full", "killed"])
@pytest.mark.parametrize(
    ("prepare", "act", "check", "touches"),
    [
        (trained, of_a_trainer, whole(MODEL), 12),
        (converted, of_convert, whole("a.safetensors"), 3),
        (exported, of_export, whole("pair"), 6),
        (Path.mkdir, of_a_comparison, lambda *_: None, 10),
    ],
    ids=["trainer", "convert", "export", "comparison"],
)
def test_the_next_start_gives_the_same_and_nothing_is_lost(kind, prepare, act, check, touches, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "generate", drawn)
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    prepare(old)
    prepare(new)
    act(new)
    expected, count = tree(new), itertools.count()
    for found in every_fault(kind, folder, prepare, act):
        check(found, old, new)
        act(found)
        assert tree(found) == expected
        next(count)
    assert next(count) >= touches  # what is not met is not tested
