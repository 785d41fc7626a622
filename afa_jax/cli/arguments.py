"""Arguments that several commands have, checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.names import DTYPES, METHODS

SEEDS = 2**31
"""Seeds are below this."""


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how weights are stored."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as they are stored)")


def add_workdir_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every trainer that say where a run lives and what to do with one that is there."""
    parser.add_argument("--workdir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="continue the run in the workdir")
    parser.add_argument(
        "--resume_step",
        type=int,
        metavar="N",
        action=_ResumeStep,
        help="continue it from the checkpoint of step N instead of the last one; later ones are removed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the workdir")
    parser.add_argument(
        "--resume_if_any",
        action="store_true",
        help="--resume if the workdir holds a run, else start it: for what is restarted by a machine",
    )


class _ResumeStep(argparse.Action):
    """Implies --resume."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.resume, namespace.resume_step = True, values


def check_workdir_arguments(options: argparse.Namespace) -> None:
    """Raise InputError for options of ``add_workdir_arguments`` that exclude each other."""
    if options.resume_if_any and (options.resume or options.overwrite):
        other = "--overwrite" if options.overwrite else "--resume, or --resume_step,"
        raise InputError(f"--resume_if_any and {other} exclude each other")
    if options.resume and options.overwrite:
        raise InputError("--resume and --overwrite exclude each other")


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that no generator takes."""
    if not 0 <= seed < SEEDS:
        raise InputError(f"--seed {seed}; choose 0 to {SEEDS - 1}")


def check_sampling(options: argparse.Namespace) -> None:
    """Raise InputError for a ``--seed``, ``--steps`` or ``--guidance`` that no sampler takes."""
    check_seed(options.seed)
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps {options.steps}; choose 1 or more")
    if options.guidance is not None and not 1 <= options.guidance < math.inf:
        raise InputError(f"--guidance {options.guidance}; choose 1 (none) or more")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError for an empty prompt."""
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("--prompt is empty; say what to draw")


def parse_size(text: str) -> tuple[int, int]:
    """Return rows and columns of a size: 512x768 is (512, 768).

    Raises:
        InputError: not of that form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise InputError(f"--size {text!r}; write rows x columns, such as 512x768")
    return int(match[1]), int(match[2])


def check_method(text: str, config: Any) -> None:
    """Raise InputError for a ``--method`` that is neither one of the config's by its name nor of a known kind."""
    named = [entry.get("name") for entry in (config.get("evaluation") or {}).get("methods", ())]
    kind = re.split("[ ,:]", text)[0]  # a method without a name of its own is called "ties density=0.3"
    if text not in named and kind not in METHODS:
        raise InputError(f"--method {text}: no method {kind!r}; there are {', '.join(METHODS)}")
