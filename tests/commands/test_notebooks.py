"""The notebooks of docs/ run, with small models and few steps, and carry what ``make notebooks`` showed."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from afa_jax import Ensemble

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def assigned(source: str) -> set[str]:
    return {
        name.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
        for name in node.targets if isinstance(name, ast.Name)
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("notebooks") / "run"
    Ensemble.from_config(f"{root}/config.py").train(run, steps=2, quiet=True)
    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    path: Path, root: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    small: dict[str, Any] = dict(ROOT=str(tmp_path), CONFIG=f"{root}/config.py", STEPS=2, IMAGES=1, TRAINING_STEPS=2)
    small |= dict(PROMPT="octopus and pizza, noto style", RUN=str(trained if path.stem == "first_pictures" else "run"))
    names: dict[str, Any] = {}
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)  # and back, whatever the notebook does
    for cell in code:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            assert assigned(source) <= small.keys()
            names |= {name: small[name] for name in assigned(source)}
        else:
            exec(compile(source, f"{path.name}:{cell['id']}", "exec"), names)
    shown = names["compared"].grid if path.stem == "first_pictures" else names["picture"]
    assert isinstance(shown, Image.Image)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_pictures_and_is_small(path: Path) -> None:
    text = path.read_text()
    assert path.stat().st_size < 1_500_000 and str(Path.home()) not in text
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert all(output.get("name") != "stderr" and output["output_type"] != "error" for output in outputs)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]  # all of it, in order


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_pictures", "train_and_maps"]
