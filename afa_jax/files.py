"""Atomic writes: an output is complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afa_jax.errors import InputError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT = r"(?s)\.(?P<name>.+)\.(?P<pid>\d{1,9})(-(?P<place>[0-9a-f]{8}))?\.partial"
"""The pattern of names from ``partial_name``; the first versions of this project wrote no ``place``."""


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically; several processes may write the same file at once."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; several processes may write the same file at once."""
    with partial_file(path) as partial, open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_output(path: Path, data: bytes) -> None:
    """Write a command's output file, create its folder if needed, and print its path."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, data)
    print(path)


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to and rename it to ``path`` at the end; remove it if anything fails.

    Raises:
        OSError: the system refused to write; the error names ``path``.
    """
    with partial_output(path) as partial, naming(path):
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def partial_output(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a file or folder; remove it at the end if it still exists.

    A process killed in this context leaves its partial output; the next process that writes there removes it first.
    """
    partial = partial_name(path)
    with _lock:
        _remove_left(path.parent)
        _written.add(partial.name)
    try:
        _remove(partial)  # of an earlier process with the same number, as happens in a container
        yield partial
    finally:
        _remove(partial)
        with _lock:
            _written.discard(partial.name)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make the system's errors name ``path``: a full disk's error has no name, or that of a source."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True)
class Kind:
    """A kind of file that commands write.

    Attributes:
        what: the kind in words.
        ending: the ending of its file names.
        mark: bytes near the start of every such file that this project wrote.
    """

    what: str
    ending: str
    mark: bytes = b""

    def check_name(self, path: Path) -> None:
        """Raise InputError if a name has another kind's ending."""
        if path.suffix.lower() != self.ending:
            raise InputError(f"{path}: {self.what} ends in {self.ending}; choose such a name")

    def check(self, path: Path) -> None:
        """Check the path of such a file before any work is done; only a file that this project wrote may be replaced.

        Raises:
            InputError: something else exists there, the name ends like another kind's, or the path cannot be written.
        """
        self.check_name(path)
        check_file(path, overwrite=True)
        if os.path.lexists(path) and not self.wrote(path):
            raise InputError(f"{path} exists and is no earlier one of this command; choose another name, or remove it")

    def wrote(self, path: Path) -> bool:
        """Return whether a file is of this kind and this project wrote it."""
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return self.mark in file.read(_HEAD)


_HEAD = 512
PAGE = Kind("a page", ".html", b'<meta name="generator" content="afa_jax">')
SHEET = Kind("a sheet of pictures", ".png", b"tEXtSoftware\0afa_jax")
FIGURES = Kind("a file of figures", ".json")
FITTING = Kind("a file of figures", ".json", b'{\n  "mode": ')  # written by afa_jax.aot
COMPARISON = Kind("a comparison", ".json", b'"version": 1,\n "afa_jax": ')
FOUND = Kind("a search's result", ".json", b'"kind": "mbw"')


def check_new(path: Path, overwrite: bool | None = None) -> None:
    """Check an output's path before any work is done, and restore an output that a killed overwriting set aside.

    An empty folder counts as nothing there.

    Args:
        overwrite: whether an existing output may be replaced; None if the user has no such option.

    Raises:
        InputError: the path exists and may not be replaced, or cannot be written.
    """
    _check_place(path)
    bring_back(path)
    if os.path.lexists(path) and not overwrite and not is_empty(path):
        how = "or remove it" if overwrite is None else "or --overwrite"
        raise InputError(f"{path} exists; choose another name, {how}")


def is_empty(path: Path) -> bool:
    """Return whether a path is an empty folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def check_file(path: Path, overwrite: bool | None = None) -> None:
    """Check the path of an output that is one file; arguments and errors as check_new."""
    check_new(path, overwrite)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")


def check_folder(path: Path) -> None:
    """Check a folder for outputs before any work is done; it need not exist.

    Raises:
        InputError: it is a file, cannot be created, or cannot be written into.
    """
    _check_place(path)
    if os.path.lexists(path):
        _check_writable(path, path)


def _check_place(path: Path) -> None:
    """Raise InputError for a name that no file can have, or a place where no file can be created."""
    if "\0" in str(path):
        raise InputError(f"{path} cannot be written (a name has no NUL); choose another name")
    for name in (path, partial_name(path)) if path.name else (path,):
        with writing(path), contextlib.suppress(FileNotFoundError):
            name.lstat()
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    _check_writable(above, path)


def _check_writable(folder: Path, path: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "a link to what is not there"
        raise InputError(f"{path} cannot be written ({folder} is {what}); choose another name or place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written ({folder} may not be written into); choose another name or place")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors about an output's name or place into InputError; a full disk's error gets the name."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, *_DISK_FULL):
            if error.errno is None or str(error.filename).startswith(str(path)):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise InputError(f"{path} cannot be written ({reason}); choose another name or place") from error


def partial_name(path: Path) -> Path:
    """Return the temporary path where this process writes an output before renaming it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_place()}.partial")


@functools.cache
def _place() -> str:
    """Return a hash of the scope in which a process id is unique: the system's current boot and the pid namespace."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
        place = f"{started}{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        place = os.uname().nodename
    return hashlib.sha256(place.encode()).hexdigest()[:8]


_lock = threading.Lock()
_written = set[str]()
"""The names of the partial files that this process is writing."""
_entered = set[tuple[int, int]]()
"""The folders, by device and inode, from which this process has removed partial files that others left."""


def _remove_left(folder: Path) -> None:
    """Remove all partial outputs of killed processes from a folder when this process first writes there."""
    with contextlib.suppress(OSError, ValueError):
        found = folder.stat()
        if (found.st_dev, found.st_ino) not in _entered:
            _entered.add((found.st_dev, found.st_ino))
            sweep(folder, patience=86400)  # other machines may write other outputs there


def sweep(folder: Path, patience: float = 60) -> None:
    """Remove the partial outputs of any name that killed processes left in a folder.

    Args:
        patience: seconds that another machine's partial output must be unchanged before it may be removed.
    """
    for left in folder.glob(".*.partial"):
        match = re.fullmatch(_LEFT, left.name)
        if match and left.name not in _written:
            _remove_abandoned(left, match, patience)


def is_partial(path: Path) -> bool:
    """Return whether a file has the name of a partial output."""
    return re.fullmatch(_LEFT, path.name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove the partial outputs of a path that killed processes, or an earlier one with this process's id, left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        match = re.fullmatch(_LEFT, left.name)
        if match and match["name"] == path.name:
            _remove_abandoned(left, match)


def _remove_abandoned(partial: Path, match: re.Match[str], patience: float = 60) -> None:
    """Remove a partial output unless its process may still work on it."""
    with contextlib.suppress(OSError):
        if _abandoned(int(match["pid"]), match["place"], time.time() - _changed(partial), patience):
            _remove(partial)


def _changed(partial: Path) -> float:
    """Return the time of the last change of a file, or of a folder and anything in it."""
    within = partial.rglob("*") if partial.is_dir() and not partial.is_symlink() else ()
    return max(path.lstat().st_mtime for path in (partial, *within))


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _abandoned(pid: int, place: str | None, seconds: float, patience: float) -> bool:
    """Return whether the process behind a partial output, unchanged for ``seconds``, is gone, here or elsewhere."""
    gone = pid == os.getpid() or _gone(pid)  # or an earlier process had this one's id
    if place == _place():
        return gone
    return (seconds > patience and gone) or (place is not None and seconds > 86400)


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def replace_folder(folder: Path, new: Path, overwrite: bool = True) -> None:
    """Move a complete folder to a path and replace an existing folder, which stays until then.

    Raises:
        InputError: the path exists and may not be overwritten, even if it appeared while ``new`` was made.
        OSError: the folder could not be renamed; the old one is restored.
    """
    check_new(folder, overwrite)
    old = aside(folder)
    if overwrite and folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def aside(folder: Path) -> Path:
    """Return the path where a folder is kept while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def bring_back(folder: Path) -> None:
    """Restore the name of a folder whose replace_folder was killed between its two renames."""
    if folder.name and not os.path.lexists(folder) and aside(folder).is_dir():
        with contextlib.suppress(OSError):  # where it cannot be restored, nothing can be written either
            aside(folder).rename(folder)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that use this context: reading and rewriting there is not interrupted.

    The system releases the lock when a process ends in any way; nothing is written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
