"""The evaluator as a user runs it, on tiny experts: what it writes, and that its figures are those of the methods."""

import json

import pytest

from afa_jax import evaluate
from afa_jax.commands import run


def test_every_method_is_measured_and_the_figures_are_kept(root, tmp_path, capsys):
    out = tmp_path / "figures" / "evaluation.json"
    arguments = ["--config", f"{root}/config.py", "--out", str(out), "--prompts", "4", "--scenes", "16"]
    methods = ("expert:a", "inside:a")
    arguments += [f"--method={method}" for method in methods] + ["--group=food", "--group=held-out combinations"]
    assert run(evaluate.main, arguments) == 0
    results = json.loads(out.read_text())
    assert list(results["groups"]) == ["food", "held-out combinations"]
    table = capsys.readouterr().out
    for group, row in results["groups"].items():
        assert group in table
        assert set(row) == {*methods, "real scenes (ceiling)", "reconstructions", "other captions (floor)"}
        # One expert alone and inside the ensemble are the same network.
        alone, inside = (row[method]["noise_mse"] for method in methods)
        assert alone == pytest.approx(inside, rel=1e-4) and alone > 0
        for method in methods:
            assert 0 <= row[method]["subject"] <= row[method]["subject_top5"] <= 1
        assert row["real scenes (ceiling)"]["subject"] > row["other captions (floor)"]["subject"]
    assert run(evaluate.main, arguments) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
