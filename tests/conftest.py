"""The machine that the tests see: eight CPU devices, no network, caches inside the checkout."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"

# Before jax is imported; the environment hands it on to the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Nearly all of the tests' time is LLVM compiling programs that run for milliseconds.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # One LLVM module a program instead of one for each of 32 threads: a machine with few cores only pays for them.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
# With a bound the cache takes a lock: the workers of pytest-xdist must not read what another one is writing.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The first example compiles, so it may take seconds; the same examples every time, so that CI is no lottery.
settings.register_profile("afa_jax", deadline=None, derandomize=True)
settings.load_profile("afa_jax")


# Tracing makes millions of small objects that stay: to look through them all the time costs a fifth of it.
gc.set_threshold(200_000, 50, 100)
_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Every few modules their programs go: with thousands of them a worker holds gigabytes, but many are common."""
    yield
    if next(_modules) % 4 == 0:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes and what runs the launchers, by their folders."""
    for item in items:
        folder = item.path.parent.name
        if folder in ("processes", "launch"):
            item.add_marker(folder)
