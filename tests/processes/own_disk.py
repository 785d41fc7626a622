"""``afa_jax.sample`` on hosts whose disks are their own: process I writes to ``--out`` with I behind its name."""

import sys

from afa_jax import sample
from afa_jax.cli.commands import run

if __name__ == "__main__":
    index = next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("--process_id="))
    raise SystemExit(run(sample.main, [a + index if a.startswith("--out=") else a for a in sys.argv[1:]]))
