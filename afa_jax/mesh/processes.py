"""Several processes, one to a host, that run one program: how they connect and how they agree.

Every process calls these functions at the same points of its program, as it runs the same jitted programs in the same
order. Only process 0 accesses the workdir. Its values and errors reach the other processes through this module. With
one process every function is the identity.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.errors import InputError, Stopped, printable
from afa_jax.logs import LOGGER
from afa_jax.mesh.cluster import FLAGS, settings
from afa_jax.mesh.cluster import add_arguments as add_arguments
from afa_jax.mesh.messages import dumps, loads

P = ParamSpec("P")
T = TypeVar("T")

START_SECONDS = 300.0
"""Seconds to wait for all processes to join; AFA_JAX_START_SECONDS overrides it."""
HEARTBEAT_SECONDS = 60.0
"""Seconds of silence after which a process counts as dead and the others end; AFA_JAX_HEARTBEAT_SECONDS overrides
it."""
LEAVE_SECONDS = 5.0
"""Seconds that a failed process waits for the others to fail alike; leaving at once would cut off their messages."""
MESSAGE = 1024
"""Bytes that one collective exchanges; a longer message takes a second one."""
CHUNK = 2**24
"""Words of four bytes that one broadcast sends."""

_state = threading.local()  # alone: whether this process is within ``alone()``
_starting: list[threading.Thread] = []


def start(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any; call it before anything asks JAX for its devices.

    The first of these decides: the options; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; a cluster that ``jax.distributed.initialize`` knows, where it has started several processes. Under
    Slurm and Open MPI a process that has its host for itself gets all devices of it, several get one device each.

    Raises:
        InputError: the numbers do not fit, or not all processes came in time.
    """
    join(settings(options))


def join(where: dict[str, Any] | None) -> None:
    """Join the other processes as ``start`` does, by the result of ``cluster.settings``; None means no others.

    Raises:
        InputError: as start.
    """
    if where is None:
        return
    _connect(where)
    if where.get("num_processes", jax.process_count()) != jax.process_count():
        raise InputError(
            f"{FLAGS[1]} {where['num_processes']}: process 0 was started with {jax.process_count()}; "
            "start all of them with one number"
        )
    int(max_over_processes(0))  # CPUs wait only briefly for each other, so they connect here, where all arrive at once


def _connect(where: dict[str, Any]) -> None:
    """Call ``jax.distributed.initialize`` with our own time limit; at its limit jax would end the process itself."""
    # jax's preemption service would take SIGTERM from Python; training.stopping handles that signal.
    jax.config.update("jax_enable_preemption_service", False)
    patience = _seconds("AFA_JAX_START_SECONDS", START_SECONDS)
    heartbeat = _seconds("AFA_JAX_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    failed: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **where, initialization_timeout=int(patience) + 60, heartbeat_timeout_seconds=max(int(heartbeat), 1)
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=initialize, name="starting", daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        _starting.append(thread)
        who = "not all others came" if where.get("process_id") == 0 else "process 0 does not answer, or others lack"
        raise InputError(
            f"{FLAGS[0]} {where.get('coordinator_address', 'as the cluster says')}: {who} after {patience:g} seconds; "
            "start every process, with the same address and number, on hosts that reach each other"
        )
    if failed:
        (error,) = failed
        if isinstance(error, ValueError) and not where and "should be defined" in str(error):
            return  # a machine with TPUs that belongs to no cluster
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the processes cannot join: {line}; see --help for {', '.join(FLAGS)}") from error


def _seconds(variable: str, default: float) -> float:
    try:
        seconds = float(os.environ.get(variable, default))
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise InputError(f"{variable}={os.environ[variable]}: choose a number of seconds")
    return seconds


def finish(status: int, failure: BaseException | None = None) -> int:
    """Return the exit status of a command once the other processes have come as far.

    Args:
        failure: the exception that ended the command. If the others do not know of it, this process waits only as long
            as they may take to fail alike. Then it ends at once, and so do they when they find it gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _starting:
        os._exit(status)  # the thread may still wait in initialize, which would end the process at its own limit
    if not jax.distributed.is_initialized():
        return status
    stopped = isinstance(failure, Stopped) and failure.step is not None
    if failure is None or stopped or getattr(failure, "agreed", False):
        jax.distributed.shutdown()
        return status
    if is_process_lost(failure):
        os._exit(status)
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)
    if leaving.is_alive():
        os._exit(status)
    return status


def is_process_lost(error: BaseException) -> bool:
    """Return whether an error of JAX means that another process is gone.

    On some devices only the heartbeat reports it.
    """
    told = ("Gloo", "NCCL", "Connection closed", "Connection reset", "Socket closed", "UNAVAILABLE", "heartbeat")
    raised = isinstance(error, ValueError | RuntimeError) and not isinstance(error, InputError)
    return is_multiprocess() and raised and any(word in str(error) for word in told)


def is_multiprocess() -> bool:
    """Return whether other processes run this program too."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_process_0() -> bool:
    """Return whether this is process 0."""
    return not is_multiprocess() or jax.process_index() == 0


def log_once(line: object) -> None:
    """Log a line once, not once a process, without control characters that it may quote from files."""
    if is_process_0():
        LOGGER.info(printable(line))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep everything in this context from waiting for other processes: process 0 acts alone, and the others skip."""
    before = getattr(_state, "alone", False)
    _state.alone = True
    try:
        yield
    finally:
        _state.alone = before


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order.

    Raises:
        TypeError: the value is of a type that afa_jax.mesh.messages cannot encode.
    """
    if not is_multiprocess() or getattr(_state, "alone", False):
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = dumps(value)
    data = len(data).to_bytes(8, "little") + data
    rows = process_allgather(np.frombuffer(data[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8))
    lengths = [8 + int.from_bytes(row[:8].tobytes(), "little") for row in rows]
    if (longest := max(lengths)) > MESSAGE:
        size = 1 << (longest - 1).bit_length()  # a power of two: few programs to compile
        rows = process_allgather(np.frombuffer(data.ljust(size, b"\0"), np.uint8))
    return [loads(row[8:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def raise_on_all(function: Callable[[], T]) -> T:
    """Call a function that may fail in one process only, such as reading a file; raise its error in every process.

    ``function`` must not run anything that all processes run together. ``on_process_0`` within it does not reach the
    others.
    """
    if not is_multiprocess() or getattr(_state, "alone", False):
        return function()
    value, error = _attempt(function)
    _raise_first(gather(error), error)
    return value  # type: ignore[return-value]  # without an error there is one


def on_process_0(function: Callable[[], T]) -> T:
    """Call a function on process 0; return its value, or raise its error with the same message, on every process.

    Args:
        function: as in ``raise_on_all``; its value must be one that afa_jax.mesh.messages can encode.
    """
    if not is_multiprocess():
        return function()
    if getattr(_state, "alone", False):
        return function() if is_process_0() else None  # type: ignore[return-value]  # the others go without
    value, error = _attempt(function, tell=True) if is_process_0() else (None, None)
    value, told = gather((value, error))[0]
    _raise_first([told], error)
    return value  # type: ignore[return-value]  # of process 0


def runs_on_process_0(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function or method so that process 0 runs it for all; see ``on_process_0``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_process_0(lambda: function(*args, **kwargs))

    return call


def _attempt(function: Callable[[], T], tell: bool = False) -> tuple[T | None, BaseException | None]:
    """Call a function and return its value and its error; with ``tell``, a value that cannot be encoded is an error."""
    with alone():
        try:
            value = function()
            if tell:
                dumps(value)
            return value, None
        except BaseException as error:
            return None, error


def _raise_first(errors: list[BaseException | None], own: BaseException | None) -> None:
    """Raise the first process's error: the original in that process, its copy in the others."""
    found = next(((i, error) for i, error in enumerate(errors) if error is not None), None)
    if found is None:
        return
    index, error = found
    if own is not None and index == jax.process_index():
        error = own
    elif type(error) is RuntimeError:
        error = RuntimeError(f"process {index}: {error}")
    error.agreed = True  # type: ignore[attr-defined]  # see finish
    raise error


def check_same(value: Any, what: str) -> None:
    """Check that a JSON value is the same in all processes.

    Raises:
        InputError: names the first process whose value is another than process 0's.
    """
    values = gather(json.dumps(value, sort_keys=True))
    for index, other in enumerate(values):
        if other != values[0]:
            error = InputError(f"{what}: process {index} has others than process 0; give all hosts the same files")
            error.agreed = True  # type: ignore[attr-defined]
            raise error


def wait_for_all(where: str) -> None:
    """Wait until every process is here, for an hour at most: one may still be compiling.

    A collective operation cannot be used to wait: on CPUs it gives up after half a minute.
    """
    if is_multiprocess():
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        get_barrier_sync_fn()(key=f"afa_jax {where}", timeout_ms=3_600_000)


def max_over_processes(value: int) -> Any:
    """Return the largest of the processes' values as an array that may still be computing; ``int()`` of it waits.

    Nothing else waits. Every process must call this in the same order among its training steps, as it runs on the
    devices like one of them.

    Args:
        value: one of a few, from 0 to 255.
    """
    return _largest()(_flags(value)) if is_multiprocess() else value


@functools.cache
def _everyone() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


@functools.cache
def _largest() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(_everyone(), PartitionSpec()))


@functools.cache
def _flags(value: int) -> jax.Array:
    flags = np.full(jax.device_count(), value, np.int32)
    return place(flags, NamedSharding(_everyone(), PartitionSpec("all")))


def compiled_together(jitted: Any) -> Callable[..., Any]:
    """Wrap a jitted function so that no process first runs it before all of them have compiled it.

    CPUs that exchange data for the first time wait for each other for 30 seconds, and compiling takes longer.
    """
    met = not is_multiprocess()

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        if not met:
            jitted.lower(*args, **kwargs).compile()
            gather(None)
            met = True
        return jitted(*args, **kwargs)

    return call


def place(array: np.ndarray, sharding: Any) -> jax.Array:
    """Place an array that every process has whole on its host on the devices of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather_arrays(tree: Any) -> Any:
    """Gather a tree of arrays from the devices of all processes as NumPy arrays; for process 0 only."""
    from jax.experimental.multihost_utils import process_allgather

    def whole(leaf: Any) -> np.ndarray | None:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = process_allgather(leaf, tiled=True)
        elif not is_process_0():
            return None
        elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def broadcast_arrays(arrays: Any, like: Any) -> Any:
    """Return process 0's arrays, bit for bit, as NumPy arrays on every host.

    Args:
        arrays: a tree of NumPy arrays; of process 0 only.
        like: a tree of the same shapes and dtypes, in every process.
    """
    if not is_multiprocess():
        return jax.tree.map(np.asarray, arrays)
    from jax.experimental.multihost_utils import broadcast_one_to_all

    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    begins = list(itertools.accumulate((-(-size // 16) * 16 for size in sizes), initial=0))
    spans = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
    words = max(begins[-1] // 4, 1)
    chunk = min(CHUNK, 1 << (words - 1).bit_length())
    data = np.zeros(4 * chunk * -(-words // chunk), np.uint8)
    if is_process_0():
        for leaf, (begin, end) in zip(jax.tree.leaves(arrays), spans, strict=True):
            data[begin:end] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    # As whole numbers: the broadcast adds the others' zeros, and as floats -0.0 would lose its sign.
    for part in data.view(np.uint32).reshape(-1, chunk):
        part[:] = broadcast_one_to_all(part)
    received = [
        data[begin:end].view(leaf.dtype).reshape(leaf.shape) for leaf, (begin, end) in zip(leaves, spans, strict=True)
    ]
    return jax.tree.unflatten(structure, received)
