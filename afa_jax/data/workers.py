"""Worker processes that read batches. They are connected by pipes alone, so nothing outlives the main process.

Python's own pools keep named semaphores and shared memory in /dev/shm, which remain after a SIGKILL, and their
processes look for their parent only after all imports. Here a thread waits for the end of a pipe before the worker
imports anything, and then ends the worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

_PIPE = 2**20  # bytes that may lie in a pipe
_SERVE = "from afa_jax.data.workers import serve; serve()"


def read_in_processes(batches: Any, first: int, count: int, threads: int) -> Iterator[Any]:
    """Yield the batches from ``first`` on, in order, read ahead by processes. Closing the generator ends them at once.

    Args:
        batches: a grain.MapDataset, endless, that pickles.
        count: processes; number w of them reads batch ``first + w`` and every ``count``-th after it.
        threads: the number of threads of each process.

    Raises:
        InputError: a process was killed; or any error that a process raised.
    """
    from afa_jax.errors import InputError

    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker((batches, first + w, count, threads))) for w in range(count)]
        while True:
            for worker in workers:
                try:
                    batch, error = worker.replies.recv()
                except (EOFError, OSError):
                    status = worker.process.wait()
                    how = signal.Signals(-status).name if status < 0 else f"status {status}"
                    raise InputError(
                        f"a process that reads pictures ended with {how}; if memory is short, choose a smaller "
                        "data.workers, or 0 to read without processes"
                    ) from None
                if error is not None:
                    raise error
                yield batch


class _Worker(contextlib.AbstractContextManager["_Worker"]):
    """A worker process that runs ``serve``."""

    def __init__(self, task: Any):
        read, write = os.pipe()
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE)
        self.replies = Connection(read, writable=False)
        # The worker imports from the same places as this process, and leaves the accelerator alone.
        environment = os.environ | dict(
            PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path), JAX_PLATFORMS="cpu"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(write)],
                stdin=subprocess.PIPE,
                pass_fds=[write],
                env=environment,
            )
        except BaseException:
            self.replies.close()
            raise
        finally:
            os.close(write)
        data = pickle.dumps(task)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading its first batch reports that
            self.process.stdin.write(len(data).to_bytes(8, "little") + data)
            self.process.stdin.flush()

    def __exit__(self, *_: Any) -> None:
        self.process.kill()  # it has nothing to clean up
        self.process.wait()
        self.replies.close()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def serve() -> None:
    """Run a worker process: read its orders from standard input, send batches, and end when standard input does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too and ends this process
    life = os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    data = _exactly(life, int.from_bytes(_exactly(life, 8), "little"))
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    with Connection(int(sys.argv[1]), readable=False) as replies:
        try:
            batches, first, stride, threads = pickle.loads(data)
            import grain

            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
            for batch in batches[first::stride].to_iter_dataset(options):
                replies.send((batch, None))
        except BrokenPipeError:
            pass
        except Exception as error:
            replies.send((None, _portable(error)))


def _exactly(file: Any, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = file.read(count - len(parts))
        if not part:
            os._exit(1)
        parts += part
    return bytes(parts)


def _end_with(life: Any) -> None:
    life.read(1)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can raise, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    with contextlib.suppress(Exception):
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    return RuntimeError("".join(error.__notes__))
