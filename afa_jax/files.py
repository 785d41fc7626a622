"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from afa_jax.errors import InputError


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all; processes that write the same one do not meet."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file at once or not at all; processes that write the same one do not meet."""
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(path: Path, overwrite: bool = False) -> None:
    """Before any work is done, look at where an output is to be.

    Raises:
        InputError: it is there already and may not be replaced, or has a name that no file can have.
    """
    with writing(path), contextlib.suppress(FileNotFoundError):
        path.lstat()
        if not overwrite:
            raise InputError(f"{path} exists; choose another name, or --overwrite")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system has against an output's name or place into an InputError; a full disk's error stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise InputError(f"{path} cannot be written ({reason}); choose another name or place") from error


def partial_name(path: Path) -> Path:
    """Where this process makes an output before it has its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_leftovers(path: Path) -> None:
    """Remove the partial outputs at ``partial_name`` of processes that were killed, and this one's own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        match = re.fullmatch(r"(\d{1,9})\.partial", left.name.removeprefix(f".{path.name}."))
        if match and _abandoned(left, int(match[1])):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _abandoned(partial: Path, pid: int) -> bool:
    """Whether nobody works on it: its process is gone, and unlike another machine's it was at rest for a minute."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        with contextlib.suppress(OSError):
            return time.time() - partial.stat().st_mtime > 60
    except OSError:
        pass
    return pid == os.getpid()


def replace_folder(folder: Path, new: Path, overwrite: bool = True) -> None:
    """Put a complete folder where another one may be, which stays until then.

    Raises:
        InputError: something is there that is not to be overwritten, even if it came while ``new`` was made.
        OSError: it could not be renamed; what was there is there again.
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
    """Where a folder is kept while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: they outlive a power cut, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
