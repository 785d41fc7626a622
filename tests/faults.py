"""Disks that fill up and processes that are killed, at every touch of a file below a folder, within this process."""

import contextlib
import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from afa_jax import files

_MAKES = ("os.mkdir", "os.rename", "os.link", "os.symlink")
_REMOVES = ("os.remove", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """What a killed process does no more."""


class _Hook:
    """Python's audit hook, which stays for good and asks for ``fault`` while there is one."""

    fault: Callable[[bool], None] | None = None
    folder = ""

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.fault is None or not (name == "open" or name in _MAKES or name in _REMOVES):
            return
        if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        path = str(arguments[0])  # below a folder's descriptor, where a tree is removed, it is a name alone
        if path.startswith(self.folder) or "/" not in path:
            self.fault(name in _REMOVES)


_hook: list[_Hook] = []


@contextlib.contextmanager
def fault_at(event: int, kind: str, folder: Path) -> Iterator[list[int]]:
    """From touch number ``event`` on, nothing touches a file below a folder; yields the number of touches so far.

    Args:
        kind: "full", where nothing can be made, and removed it can; or "killed", where neither is done, and what
            would put things in order does not run either.
    """
    if not _hook:
        _hook.append(_Hook())
        sys.addaudithook(_hook[0])
    touches = [0]

    def fault(removes: bool) -> None:
        if kind == "full" and removes:
            return
        touches[0] += 1
        if touches[0] > event:
            raise Killed if kind == "killed" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = _hook[0]
    hook.fault, hook.folder = fault, str(folder)
    try:
        yield touches
    finally:
        hook.fault = None
        files._entered.clear()  # as in the process of the next start


def every_fault(
    kind: str, folder: Path, prepare: Callable[[Path], object], act: Callable[[Path], object]
) -> Iterator[Path]:
    """Prepare and act in one new folder after another, with a fault at the first, second, ... touch, until all is done.

    Yields:
        The folder as the fault left it. What is done then is the next start.
    """
    for event in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder)
        with fault_at(event, kind, folder), contextlib.suppress(Killed):
            try:
                act(folder)
                return
            except OSError as error:
                if error.errno != errno.ENOSPC or not str(error.filename).startswith(str(folder)):
                    raise AssertionError(f"the full disk is not named: {error}") from error
        yield folder
