"""Half a minute of damaged files: a result, or one line that says what is wrong. ``make fuzz`` has 100,000."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.runner import fuzz


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    figures = fuzz(tmp_path, range(100_000), seconds=30)
    assert figures.files > 100
    assert figures.findings == []
