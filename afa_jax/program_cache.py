"""Keep compiled programs between starts in the user's cache folder, and silence XLA's alarm about slow compiling."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

LARGEST = 4 * 2**30
"""The most bytes in the folder; the least recently used programs are removed first."""
SHORTEST = 0.1
"""The least seconds of compiling for which a program is kept; reading one back takes milliseconds."""


def keep_programs(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let JAX keep compiled programs, so that the next start of the same command need not compile them again.

    To be called before JAX is imported. Does nothing where the environment decides
    (JAX_COMPILATION_CACHE_DIR, also when empty, or JAX_ENABLE_COMPILATION_CACHE), or where the folder cannot be made.
    """
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(environ):
        return
    folder = cache_folder(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # A bound also makes JAX lock the folder, so that no process reads a program that another one is writing.
        environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LARGEST))
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SHORTEST))


def calm_compiler(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep XLA from printing the error "Very slow compile?" for everything that takes two minutes to compile.

    To be called before JAX is imported. XLA has no switch for this one message. What goes wrong in XLA comes back to
    Python as an exception all the same; TF_CPP_MIN_LOG_LEVEL in the environment decides otherwise.
    """
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def cache_folder(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Return where programs are kept for this kind of processor: under $XDG_CACHE_HOME, by default ~/.cache.

    XLA uses all instructions of the processor, and machines with other processors may share the home folder.
    """
    features = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        features += "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    home = environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(home) / "afa_jax" / f"programs-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
