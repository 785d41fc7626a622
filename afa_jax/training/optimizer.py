"""Optimizers from a config, and the weighted averages of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from afa_jax.errors import InputError

SCHEDULES = ("constant", "cosine")


def check_optimizer(config: ConfigDict, where: str = "optimizer") -> None:
    """Raise InputError for an unknown schedule, or a number that no optimizer takes."""
    if config.schedule not in SCHEDULES:
        raise InputError(f"{where}.schedule={config.schedule!r}: choose {' or '.join(SCHEDULES)}")
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = dict(
        lr=("a finite number above 0", lambda value: 0 < value < math.inf),
        warmup=("0 steps or more", lambda value: 0 <= value < math.inf),
        weight_decay=("0 or more", lambda value: 0 <= value < math.inf),
        clip=("0 (none) or more", lambda value: 0 <= value < math.inf),
        b2=("0 or more, below 1", lambda value: 0 <= value < 1),
    )
    for field, (choice, holds) in ranges.items():
        if not holds(config[field]):
            raise InputError(f"{where}.{field}={config[field]}; choose {choice}")


def check_objective(config: ConfigDict, where: str = "") -> None:
    """Raise InputError for ``ema``, ``caption_dropout``, ``min_snr_gamma`` or a ``seed`` that no training takes."""
    if not 0 <= config.ema < 1:
        raise InputError(f"{where}ema={config.ema}; choose 0 (none) or a decay below 1")
    if not 0 <= config.get("caption_dropout", 0) <= 1:
        raise InputError(f"{where}caption_dropout={config.caption_dropout}; choose a probability")
    if not 0 <= config.get("min_snr_gamma", 0) < math.inf:
        raise InputError(f"{where}min_snr_gamma={config.min_snr_gamma}; choose 0 (none) or more")
    if config.seed < 0:
        raise InputError(f"{where}seed={config.seed}; choose 0 or more")


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Return AdamW with a warm-up and a learning rate schedule.

    Config fields: ``lr``, ``schedule`` ("constant" or "cosine", which ends at ``lr / 20``), ``warmup`` steps,
    ``weight_decay``, ``clip`` (global gradient norm, 0 for none), ``b2``.

    Raises:
        InputError: as check_optimizer, which can be called before anything is loaded.
    """
    check_optimizer(config)
    if config.schedule == "constant":
        tail = optax.constant_schedule(config.lr)
    else:
        tail = optax.cosine_decay_schedule(config.lr, max(1, steps - config.warmup), alpha=0.05)
    schedule = tail
    if config.warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), tail], [config.warmup])
    adamw = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def update_average(average: Any, new: Any, step: jax.Array, decay: float) -> Any:
    """Update an exponential moving average; early on it forgets faster: decay is at most (1 + step) / (10 + step)."""
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: a + rate * (b - a), average, new)
