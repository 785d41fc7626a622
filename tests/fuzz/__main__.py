"""The long fuzz: ``make fuzz``, or ``python -m tests.fuzz --files 100000 --keep DIR``."""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS

FINDINGS = dict(
    crash="crashes",
    hang="hangs",
    exception="unexpected exceptions",
    message="messages that are no line",
    slow="over 10 s",
    memory="over 2 x file + 300 MiB",
)


def main() -> int:
    """Print what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file; others are other files")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--target", action="append", choices=[*TARGETS], default=[])
    parser.add_argument("--keep", type=Path, help="where the files of findings are kept")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(options.first, options.first + options.files)
        figures = fuzz(Path(folder), numbers, seconds=60 * options.minutes, targets=options.target, keep=options.keep)
    kinds = collections.Counter(finding.kind for finding in figures.findings)
    seen: collections.Counter[str] = collections.Counter()
    for finding in figures.findings:
        key = f"{finding.target}: {finding.kind}: {finding.detail.split(' ')[0]}"
        seen[key] += 1
        if seen[key] <= 3:
            print(f"{finding.target} {finding.number} ({finding.file}): {finding.kind}: {finding.detail}")
    for key, count in seen.most_common():
        print(f"{count:6d}  {key}")
    found = ", ".join(f"{kinds[kind]} {what}" for kind, what in FINDINGS.items())
    print(
        f"{figures.files:,} files in {time.monotonic() - started:.0f} s, {figures.refused:,} refused in a line; "
        f"{found}; slowest {figures.slowest:.1f} s, largest {figures.largest / 2**20:.0f} MiB"
    )
    return bool(figures.findings)


if __name__ == "__main__":
    raise SystemExit(main())
