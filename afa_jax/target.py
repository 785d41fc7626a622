"""The devices that a program is traced for: the local ones, unless it is compiled ahead of time for others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_ahead: ContextVar[tuple[str, int] | None] = ContextVar("ahead", default=None)


def platform() -> str:
    """Return the platform of the devices, "cpu", "gpu" or "tpu": kernels are chosen by it."""
    ahead = _ahead.get()
    return jax.default_backend() if ahead is None else ahead[0]


def device_count() -> int:
    """Return the number of devices, of all processes."""
    ahead = _ahead.get()
    return jax.device_count() if ahead is None else ahead[1]


@contextlib.contextmanager
def compiling_for(platform: str, count: int) -> Iterator[None]:
    """Make this module report ``count`` devices of ``platform`` while a program is traced."""
    token = _ahead.set((platform, count))
    try:
        yield
    finally:
        _ahead.reset(token)
