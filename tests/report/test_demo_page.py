"""The demo's page, from pictures that were not sampled."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa_jax.cli.commands import load_config
from afa_jax.report import demo
from afa_jax.report.demo import PROMPTS, write_comparison, write_page
from afa_jax.sampling.generation import Picture, Request
from afa_jax.training.workdir import begin_run, open_workdir

CONFIG = Path(__file__).parents[2] / "configs" / "emoji.py"


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    experts, timesteps = ("animals", "food", "things"), [801, 601, 401, 201, 1]
    rng = np.random.default_rng(0)
    steps = len(timesteps)
    maps = [rng.dirichlet(np.ones(3), (steps, *size)).transpose(0, 3, 1, 2) for size in ((8, 16), (2, 4))]

    def picture(prompt: str, *maps: np.ndarray) -> Picture:
        pixels = rng.integers(0, 256, (32, 64, 3), np.uint8)
        return Picture(request=Request(prompt=prompt), pixels=pixels, maps=maps)

    methods = [*(f"expert:{name}" for name in experts), "uniform"]
    pictures = {method: [picture(prompt) for prompt in PROMPTS] for method in methods}
    pictures["afa"] = [picture(prompt, *maps) for prompt in PROMPTS]
    lines = [dict(step=i, loss=1 / i, entropy=0.9, weight_0=0.5, weight_1=0.3, weight_2=0.2) for i in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(
        tmp_path, pictures, experts, ["conv_in", "mid_block", "conv_out"], timesteps, batch=16, seconds=(1.0, 2.0)
    )
    page = (tmp_path / "index.html").read_text()
    # Every method and one map a prompt, and the sheets of three prompts; all of it inside the file.
    assert page.count("<img") == page.count("data:image/png;base64,") == len(PROMPTS) * 6 + 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for data in re.findall('src="data:image/png;base64,([^"]*)"', page):
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
            shown.load()
    for text in (*PROMPTS, *methods, "afa", *experts):
        assert text in page
    assert page.count("<svg") == 3
    write_comparison(tmp_path, pictures)
    with Image.open(tmp_path / "comparison.png") as sheet:
        # Columns: every method, and the maps; the first picture is there, twice as large.
        left = sheet.width - 6 * (128 + 6)
        corner = np.asarray(sheet.convert("RGB"))[20 : 20 + 64 : 2, left : left + 128 : 2]
    np.testing.assert_array_equal(corner, pictures["expert:animals"][0].pixels)


def test_no_page_of_another_run_stands_beside_new_pictures(tmp_path, monkeypatch):
    begin_run(tmp_path, '{"train": {}}')
    page = tmp_path / "index.html"
    page.write_text("of a run that is replaced")
    open_workdir(tmp_path, resume=False, overwrite=True)
    assert not page.exists()

    def stopped(*_):
        raise KeyboardInterrupt

    page.write_text("of a run that goes on")
    begin_run(tmp_path, '{"train": {}}')
    monkeypatch.setattr(demo, "train", lambda *_, **__: None)
    monkeypatch.setattr(demo, "_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.demo(load_config(str(CONFIG)), tmp_path, resume=True)
    assert not page.exists()
