"""A run that costs little but its saving: what test_faults kills.

The real loop, checkpoints and command around a step of two lines.
"""

import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.cli.arguments import add_workdir_arguments
from afa_jax.cli.commands import Parser, run
from afa_jax.files import replace_text
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.workdir import open_workdir
from afa_jax.trees import flatten

Batch = dict[str, np.ndarray]


def batches(first: int, nan_at: int | None = None, pause: float = 0) -> Iterator[Batch]:
    print("training", flush=True)
    for step in itertools.count(first):
        x = np.random.default_rng(step).normal(size=(4, 8)).astype(np.float32)
        position = np.arange(4 * step, 4 * step + 4)
        if step == nan_at:
            x[2] = np.nan
        time.sleep(pause)
        yield dict(x=x, position=position, index=position * 5 % 97)


@jax.jit
def train_step(state: dict[str, Any], batch: Batch, key: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    def loss_of(w: jax.Array) -> jax.Array:
        return jnp.square(batch["x"] @ w - batch["x"].sum(1) + 0.1 * jax.random.normal(key, (4,))).mean()

    loss, gradient = jax.value_and_grad(loss_of)(state["params"]["w"])
    params = dict(w=state["params"]["w"] - 0.01 * gradient, big=state["params"]["big"] * (1 + 0.01 * loss))
    return dict(params=params, step=state["step"] + 1), dict(loss=loss, gradient_norm=jnp.linalg.norm(gradient))


def start(megabytes: int = 0) -> dict[str, Any]:
    """Noise, which no compression makes small."""
    big = jax.random.normal(jax.random.key(1), (1 + megabytes * 2**18,))
    return dict(params=dict(w=jnp.zeros(8), big=big), step=jnp.zeros((), jnp.int32))


def validate(state: dict[str, Any], step: int) -> dict[str, Any]:
    error = float(jnp.abs(state["params"]["w"] - 1).mean())
    return dict(validation_error=error, score=error, picture=np.zeros((2, 2, 3), np.uint8))


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="tiny_run")
    add_workdir_arguments(parser)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save_every", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--nan_at", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--largest_file", type=int, help="bytes; writing beyond it fails")
    options = parser.parse_args(list(arguments))
    if options.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest_file, options.largest_file))
    open_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    replace_text(options.workdir / "config.json", "{}\n")
    state = run_loop(
        train_step,
        start(options.megabytes),
        lambda first: batches(first, options.nan_at, options.pause),
        steps=options.steps,
        seed=3,
        workdir=options.workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        every=[Every(5, validate)],
        log_every=4,
        save_every=options.save_every,
        quiet=True,
    )
    sums = {name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest() for name, array in flatten(state).items()}
    replace_text(options.workdir / "final.json", json.dumps(sums) + "\n")


def of_its_own(arguments: Sequence[str], said: Path) -> None:
    """As a command in a process: what it says goes to a file."""
    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("error")
    sys.exit(run(main, arguments))
