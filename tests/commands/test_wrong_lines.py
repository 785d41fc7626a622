"""Wrong command lines, thousands of them: each ends with one line, and makes no file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_sweep_of_wrong_lines(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tests.commands.wrong_lines", str(tmp_path), "4"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["made"] == []
    assert found["count"] > 10_000 and found["seconds"][2] < 5
