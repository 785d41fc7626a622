"""The former place of ``python -m afa_jax.prepare``, which still runs it."""

from afa_jax.cli.commands import run
from afa_jax.prepare import main as main

if __name__ == "__main__":
    raise SystemExit(run(main))
