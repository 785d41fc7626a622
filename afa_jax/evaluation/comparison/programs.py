"""Release of compiled programs in a process that compiles very many of them."""

from __future__ import annotations

from pathlib import Path

import jax

MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def release_programs(share: float = 0.5) -> bool:
    """Clear all compiled programs once this process uses ``share`` of the memory mappings that Linux allows it.

    XLA's CPU programs keep a mapping for each of their parts as long as JAX keeps the program: 900 to 1,500 for a
    sampler of the emoji models. Linux allows a process 65,530 of them (``vm.max_map_count``); on one more, LLVM aborts
    the process with "Cannot allocate memory". A program that is needed again is compiled again.

    Returns:
        Whether the programs were cleared; False if the system does not state its mappings, that is, if it is not Linux.
    """
    try:
        used, most = MAPPINGS.read_bytes().count(b"\n"), int(MOST_MAPPINGS.read_text())
    except OSError:
        return False
    if used < share * most:
        return False
    jax.clear_caches()
    return True
