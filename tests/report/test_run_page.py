"""The page of a run, from a workdir that was not trained."""

import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa_jax.cli.commands import run
from afa_jax.report.__main__ import main

SITES, BUCKETS = ("conv_in", "mid_block"), ("t0_500", "t500_1000")


@pytest.fixture
def workdir(tmp_path):
    """Twenty steps, validated at ten and twenty."""
    workdir = tmp_path / "run"
    (workdir / "samples").mkdir(parents=True)
    config = dict(
        name="tiny <run>",
        experts=[dict(name="one"), dict(name="two")],
        train=dict(steps=40, batch=2),
        validation=dict(prompts=["octopus"]),
    )
    (workdir / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = []
    for step in range(1, 21):
        numbers: dict[str, Any] = dict(
            loss=1 / step, entropy=0.9, weight_0=0.6, weight_1=0.4, gradient_norm=1.0, update_norm=0.1
        )
        lines.append(numbers | dict(step=step, seconds_per_step=2.0, data_wait=0.01))
        if step % 10 == 0:
            scores: dict[str, Any] = {f"val_loss_{bucket}": 0.5 for bucket in BUCKETS}
            lines.append(scores | dict(step=step, val_loss=0.5, val_entropy=0.8))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validations = [
        dict(
            step=step,
            extra=False,
            loss=dict.fromkeys(BUCKETS, 0.5),
            experts=["one", "two"],
            weights={site: [[0.75, 0.25]] * 2 for site in SITES},
            entropy={site: [0.8] * 2 for site in SITES},
        )
        for step in (10, 20)
    ]
    (workdir / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validations))
    for step in (10, 20):
        Image.fromarray(np.full((8, 8, 3), step, np.uint8)).save(workdir / "samples" / f"step_{step:08d}.png")
    return workdir


def test_the_page_says_how_a_run_is_doing_and_needs_nothing_else(workdir, tmp_path):
    for _ in range(2):  # it replaces its own
        assert run(main, ["--workdir", str(workdir), "--out", str(tmp_path / "pages" / "run.html")]) == 0
    page = (tmp_path / "pages" / "run.html").read_text()
    assert "tiny &lt;run&gt;: 20 of 40 steps of 2, 2.00 s a step (median), 1.00 % of the time" in page
    assert page.count("<svg") == 5 and page.count("0.75 / 0.25") == 4
    assert page.count("<img") == page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for text in (*SITES, *BUCKETS, "step 00000020", "one", "two"):
        assert text in page


def test_a_run_without_validation_has_a_page_too(workdir, tmp_path):
    (workdir / "validation.jsonl").unlink()
    assert run(main, ["--workdir", str(workdir), "--out", str(tmp_path / "run.html")]) == 0
    assert "Whom each site trusts" not in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'{"train": {', b'{"train": 1, "experts": [{"name": "a"}]}'])
def test_a_config_that_was_damaged_is_named(workdir, tmp_path, capsys, content):
    (workdir / "config.json").write_bytes(content)
    assert run(main, ["--workdir", str(workdir), "--out", str(tmp_path / "run.html")]) == 2
    error = capsys.readouterr().err
    assert (f"error: {workdir / 'config.json'}: " in error and "restore it" in error) and error.count("\n") == 1


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert run(main, ["--workdir", str(tmp_path), "--out", str(tmp_path / "run.html")]) == 2
    assert "no run there (no metrics.jsonl)" in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()
