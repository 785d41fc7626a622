"""Processes that start in a moment: they are forked from one that has imported what they run.

There are a hundred of them, and the imports take each three seconds.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# For those that are forked.
import orbax.checkpoint  # noqa: F401
import tensorstore  # noqa: F401
from transformers import CLIPTokenizer  # noqa: F401

from afa_jax.sampling import pictures  # noqa: F401
from afa_jax.training import run  # noqa: F401

PROCESSES = multiprocessing.get_context("forkserver")
# Here and nowhere else: of a process's tests, all fork from one server, and its last list counts.
PROCESSES.set_forkserver_preload([__name__])


def run_as_command(
    file: Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, pipes: Sequence[Connection]
) -> None:
    """``python file arguments...`` in this process, with what it prints going into the pipes."""
    for number, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(file), *arguments]
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process would leave out
