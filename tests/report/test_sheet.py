"""The pictures of a comparison as one picture, from a folder as afa_jax.evaluate leaves it."""

import json

import numpy as np
import pytest
from PIL import Image

from afa_jax.cli.commands import run
from afa_jax.data.pictures import save_png
from afa_jax.evaluation.comparison.picture_files import find_picture
from afa_jax.report.__main__ import main
from afa_jax.report.sheet import labelled_grid
from afa_jax.sampling.map_pictures import paint
from tests.report import example

METHODS = ("expert:animals", "uniform", "afa")
MAPS = np.random.default_rng(0).dirichlet(np.ones(3), (8, 16)).transpose(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    """Pictures of three methods with two seeds, and AFA's maps."""
    report = example.report()
    report["config"]["experts"] = [dict(name=name) for name in ("animals", "food", "things")]
    report["examples"]["methods"] = list(METHODS)
    for method in report["methods"]:
        if method["name"] in METHODS:
            method["folder"] = f"{method['kind']}-0123"
            own = tmp_path / "pictures" / method["folder"]
            own.mkdir(parents=True)
            for prompt in example.PROMPTS:
                for seed in (0, 1):
                    pixels = np.array(example.pictures(method["name"], prompt))
                    save_png(find_picture(own, prompt, seed), pixels // (seed + 1), dict(prompt=prompt, seed=seed))
    kept = dict(condition="", measured={prompt: MAPS.tolist() for prompt in example.PROMPTS})
    (tmp_path / "pictures" / "afa-0123" / "maps.json").write_text(json.dumps(kept))
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def tiles(path, columns, rows, legend=0):
    """The cells of a sheet, [rows][columns] of [64, 128, 3], found from its right end and its legend upwards."""
    with Image.open(path) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    left, top = sheet.shape[1] - columns * 134, sheet.shape[0] - legend - rows * 70
    return [[sheet[top + 70 * r :, left + 134 * c :][:64, :128] for c in range(columns)] for r in range(rows)]


def test_a_row_for_each_method_a_column_for_each_prompt_and_the_maps_below(folder):
    for _ in range(2):  # it replaces its own
        assert run(main, ["--sheet", str(folder), "--out", str(folder / "new" / "sheet.png")]) == 0
    cells = tiles(folder / "new" / "sheet.png", 3, 4, legend=26)
    for r, name in enumerate(METHODS):
        for c, prompt in enumerate(example.PROMPTS):
            np.testing.assert_array_equal(cells[r][c][::2, ::2], example.pictures(name, prompt))
    for c in range(3):
        np.testing.assert_array_equal(cells[3][c][::8, ::8], paint(MAPS.astype(np.float32)))


def test_some_methods_and_prompts(folder):
    arguments = ["--sheet", str(folder), "--out", str(folder / "sheet.png"), "--prompts", "2"]
    assert run(main, [*arguments, "--method", "uniform", "--method", "expert:animals"]) == 0
    first, second = tiles(folder / "sheet.png", 2, 2)
    np.testing.assert_array_equal(first[1][::2, ::2], example.pictures("uniform", example.PROMPTS[1]))
    np.testing.assert_array_equal(second[0][::2, ::2], example.pictures("expert:animals", example.PROMPTS[0]))


def test_what_cannot_be_drawn_is_one_line(folder, capsys):
    def error(*more: str) -> str:
        assert run(main, ["--sheet", str(folder), "--out", str(folder / "sheet.png"), *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (folder / "sheet.png").exists()
        return said

    assert "no method 'magic'; it has afa, expert:animals" in error("--method", "magic")
    assert "it does not say where the pictures are" in error("--method", "merge")
    assert "--prompts: 0" in error("--prompts", "0")
    find_picture(folder / "pictures" / "uniform-0123", example.PROMPTS[1], 0).unlink()
    assert "uniform-0123: no picture of 'guitar <and> owl, noto style' with seed 0" in error()


def test_a_picture_that_is_missing_leaves_a_gap_and_long_labels_are_wrapped():
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (32, 64, 3))
    name = "magicfusion general=animals experts=things k=1.0 fuse_above=600"
    sheet = np.asarray(labelled_grid([[None, red]], [name], ["one", "a prompt that is longer than its column"]))
    assert sheet.shape[1] < 2 * 134 + 6 + 7 * 32 and sheet.shape[0] == 4 + 3 * 16 + 70
    assert (sheet[-70:-6, -134:-6] == (255, 0, 0)).all() and (sheet[-70:-6, -268:-140] == 255).all()
