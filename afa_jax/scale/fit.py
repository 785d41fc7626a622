"""Checks whether a run's program fits its devices, by compiling it."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.files import FITTING, replace_text
from afa_jax.scale.abstract import KNOWN, architecture_of, sampler, target_of, training_step
from afa_jax.scale.chips import chip_of
from afa_jax.scale.memory import arguments_of, gib, knob, required
from afa_jax.scale.report import examine
from afa_jax.training.run import check_options, configured_fusion


def cpu_devices(count: int) -> list[Any]:
    """Return ``count`` CPU devices, which share this machine's cores.

    Raises:
        InputError: jax has started with fewer devices.
    """
    with contextlib.suppress(RuntimeError):  # raised if jax has started
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError(f"--devices {count}: XLA_FLAGS or jax_num_cpu_devices gives {len(there)}; unset it")
    return list(there[:count])


def check(
    config: ConfigDict,
    mode: str,
    devices: Sequence[Any],
    *,
    architecture: str | None = None,
    experts: int | None = None,
    quick: bool = False,
    output: Path | None = None,
) -> int:
    """Compile a run's program for devices and print its costs.

    Args:
        mode: "train" or "sample".
        architecture: one of ``names.ARCHITECTURES``; otherwise that of the config's models.
        experts: the number N of experts; otherwise the config's.
        quick: compile at level O0, which is faster; temporaries then differ a little from those of the real program.
        output: a JSON file for all figures.

    Returns:
        The exit status: 0 if it fits, 1 if it does not.

    Raises:
        InputError: the config cannot be run on these devices, or its models do not exist.
    """
    if output is not None:
        FITTING.check(output)
    check_options(config)
    fusing = configured_fusion(config)
    networks = architecture_of(config) if architecture is None else KNOWN[architecture]
    if experts is not None:
        with config.unlocked():
            config.experts = [dict(name=f"expert {number}", path="") for number in range(experts)]
    target = target_of(config, fusing, devices, mode)
    call = (training_step if mode == "train" else sampler)(config, fusing, networks, target)
    held, kind = arguments_of((call.arguments, call.beside)), devices[0].device_kind
    chip = chip_of(kind)
    limit = None if chip is None else chip.memory
    facts: dict[str, Any] = dict(
        mode=mode,
        experts=len(config.experts),
        devices=len(target.devices),
        kind=kind,
        mesh=target.shape,
        held=held,
        quick=quick,
    )
    mesh = ", ".join(f"{axis}={size}" for axis, size in target.shape.items())
    print(f"{mode}: {len(config.experts)} experts on {len(target.devices)} devices ({kind}), mesh {mesh}", flush=True)

    needed = held
    # A program that cannot fit is not compiled: the compiler would search for an hour.
    if limit is None or held <= limit:
        started, cpu = time.perf_counter(), time.process_time()
        try:
            with warnings.catch_warnings():
                # A program compiled for absent devices cannot be read from jax's cache.
                warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
                compiled = call.lower(target).compile(dict(optimization_level="O0") if quick else None)
        except jax.errors.JaxRuntimeError as refusal:
            stated = required(refusal)
            if stated is None:
                raise
            needed = stated + arguments_of(call.beside)
        else:
            report = examine(compiled, target.shape, chip, held)
            needed = report.needed
            print(report)
            facts |= report.json()
        facts |= dict(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)
        print(f"compiled in {facts['seconds']:.0f} s ({facts['cpu_seconds']:.0f} s of CPU time)")
    fits = limit is None or needed <= limit
    facts |= dict(fits=fits, needed=needed, limit=limit)
    if limit is None:
        print(f"compiles; what a program may hold on {kind} is not known")
    elif fits:
        print(f"fits: {gib(needed)} of {gib(limit)}")
    else:
        facts["advice"] = knob(mode, config, target.shape, len(config.experts), arguments=held, total=needed)
        print(f"does not fit: {gib(needed)} of {gib(limit)}, of it {gib(held)} all the time; {facts['advice']}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, json.dumps(facts, indent=2) + "\n")
    return 0 if fits else 1
