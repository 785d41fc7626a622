"""Compiled programs in a process that compiles very many of them."""

from __future__ import annotations

from pathlib import Path

import jax

MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def release_programs(share: float = 0.5) -> bool:
    """Forget every compiled program once this process has used a share of the memory mappings that Linux allows it.

    XLA's CPU programs keep a mapping for each of their parts, 900 to 1,500 for a sampler of the emoji models, as long
    as JAX keeps the program. Linux allows 65,530 to a process (``vm.max_map_count``); at the next one LLVM aborts it
    with "Cannot allocate memory". A program that is needed again is compiled again.

    Returns:
        Whether it did. Never where the system does not say: it is not Linux.
    """
    try:
        used, most = MAPPINGS.read_bytes().count(b"\n"), int(MOST_MAPPINGS.read_text())
    except OSError:
        return False
    if used < share * most:
        return False
    jax.clear_caches()
    return True
