"""A run of several processes that costs little: ``python tests/processes/toy.py --workdir DIR --coordinator ...``.

The real loop, checkpoints and command around a step of two lines, whose state lies on a mesh of all devices.
"""

import errno
import itertools
import json
import math
import resource
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.cli.arguments import add_workdir_arguments
from afa_jax.cli.commands import Parser, run
from afa_jax.errors import InputError
from afa_jax.files import replace_text
from afa_jax.mesh import processes as distributed
from afa_jax.training.checkpoints import NonFiniteError
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.workdir import keep_config, open_workdir, resume_if_any
from afa_jax.trees import flatten

BATCH = 8


def batches(
    first: int, share: int = 0, shares: int = 1, nan_at: int | None = None, pause: float = 0
) -> Iterator[dict[str, np.ndarray]]:
    """One of the shares of each batch; a step's batch as a whole does not depend on their number."""
    for step in itertools.count(first):
        print(f"batch {step}", flush=True)
        x = np.random.default_rng(step).normal(size=(BATCH, 4)).astype(np.float32)
        if step == nan_at:
            x[-1] = np.nan
        time.sleep(pause)
        rows = slice(share * BATCH // shares, (share + 1) * BATCH // shares)
        yield dict(x=x[rows], index=np.arange(BATCH * step, BATCH * step + BATCH)[rows])


def make(columns: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The step and the first state on a mesh of so many columns: ``big`` lies in pieces, the rest on every device."""
    shape = (jax.device_count() // columns, columns)
    mesh = jax.make_mesh(shape, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    replicated, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), (("rows", "columns"),)))

    @jax.jit
    def step(state: dict[str, Any], x: jax.Array, key: jax.Array) -> Any:
        def loss_of(w: jax.Array) -> jax.Array:
            return jnp.square(x @ w - x.sum(1) + 0.1 * jax.random.normal(key, (BATCH,))).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state["w"])
        big = state["big"] * (1 + 0.01 * loss).astype(jnp.bfloat16)
        return dict(w=state["w"] - 0.1 * gradient, big=big, step=state["step"] + 1), dict(
            loss=loss, gradient_norm=jnp.linalg.norm(gradient)
        )

    def placed(state: dict[str, Any], batch: dict[str, np.ndarray], key: jax.Array) -> Any:
        return step(state, jax.make_array_from_process_local_data(rows, batch["x"], (BATCH, 4)), key)

    big = np.random.default_rng(0).normal(size=(8, 8)).astype(jnp.bfloat16)
    big[0, 0] = -0.0
    start = dict(
        w=distributed.place(np.zeros(4, np.float32), replicated),
        big=distributed.place(big, NamedSharding(mesh, PartitionSpec("columns", "rows"))),
        step=distributed.place(np.zeros((), np.int32), replicated),
    )
    return placed, start


def validate(state: dict[str, Any], step: int) -> dict[str, Any]:
    error = float(jnp.abs(state["w"] - 1).mean())
    return dict(validation_error=error, score=error)


def sums(state: dict[str, Any]) -> dict[str, int]:
    whole = distributed.gather_arrays(flatten(state))
    return {name: zlib.crc32(array.tobytes()) for name, array in whole.items()} if distributed.is_process_0() else {}


def agree() -> dict[str, Any]:
    """What the functions of afa_jax.mesh.processes give in this process."""
    me, errors = jax.process_index(), []

    def fail(process: int, error: Exception | None = None) -> str:
        if me == process:
            raise error or InputError(f"process {process} cannot read its file")
        return f"read by {me}"

    for function in (
        lambda: distributed.on_process_0(lambda: fail(0)),
        lambda: distributed.raise_on_all(lambda: fail(2)),
        lambda: distributed.on_process_0(lambda: fail(0, NonFiniteError("loss is nan"))),
        lambda: distributed.raise_on_all(lambda: fail(1, OSError(errno.ENOSPC, "full", "/a"))),
        lambda: distributed.raise_on_all(lambda: fail(3, ZeroDivisionError("by zero"))),
        lambda: distributed.on_process_0(object),
        lambda: distributed.check_same(dict(experts=min(me, 1)), "experts"),
    ):
        try:
            function()
        except (InputError, OSError, RuntimeError, ZeroDivisionError, TypeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    like = dict(a=np.zeros((3, 5), jnp.bfloat16), b=np.zeros((), np.int8), c=np.zeros(70000))
    sent = jax.tree.map(lambda leaf: np.full_like(leaf, -0.0 if leaf.ndim else 7) if me == 0 else None, like)
    received = distributed.broadcast_arrays(sent, like)
    return dict(
        process=me,
        processes=jax.process_count(),
        errors=errors,
        first=distributed.on_process_0(lambda: dict(me=me, long="x" * 5000)),
        exact=repr(distributed.on_process_0(lambda: (None, math.nan, -0.0, b"\xff", [me]))),
        nested=distributed.on_process_0(lambda: distributed.on_process_0(lambda: distributed.gather(me))),
        own=distributed.raise_on_all(lambda: fail(9)),
        gathered=distributed.gather("y" * 600 * me),
        largest=[int(distributed.max_over_processes(value)) for value in (0, 9 if me == 1 else 0, me)],
        negative_zeros=bool(np.signbit(received["a"]).all() and np.signbit(received["c"]).all()),
        received=[received["a"].shape, str(received["a"].dtype), int(received["b"]), received["c"].shape],
    )


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="toy")
    add_workdir_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument("--agree", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--columns", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--nan_at", type=int)
    parser.add_argument("--largest_file", type=int, help="bytes that process 0 can write to a file")
    options = parser.parse_args(list(arguments))
    distributed.start(options)
    if options.agree:
        print(json.dumps(agree()), flush=True)
        return
    if options.largest_file and distributed.is_process_0():
        jax.config.update("jax_enable_compilation_cache", False)  # whose files would grow too, and only warn
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest_file, options.largest_file))
    state = train(options)
    final = sums(state)
    distributed.on_process_0(lambda: replace_text(options.workdir / "final.json", json.dumps(final)))


def train(options: Any) -> dict[str, Any]:
    resume_if_any(options)
    # Only process 0 may look at the workdir: the others are told of one that is not there.
    workdir = options.workdir if distributed.is_process_0() else Path("/nowhere/at/all")
    open_workdir(workdir, resume=options.resume, overwrite=options.overwrite)
    keep_config(workdir, ConfigDict(dict(name="toy")))
    step, state = make(options.columns)
    processes, me = jax.process_count(), jax.process_index()
    return run_loop(
        step,
        state,
        lambda first: batches(first, me, processes, options.nan_at, options.pause),
        steps=options.steps,
        seed=3,
        workdir=workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        facts=dict(data="toy"),
        every=[Every(5, validate)],
        save_every=3,
        shares=processes,
        quiet=True,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
