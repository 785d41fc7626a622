"""Optimizers from a config, and the weighted averages of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from afa_jax.errors import InputError


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a schedule.

    Config fields: ``lr``, ``schedule`` ("constant" or "cosine", which ends at ``lr / 20``), ``warmup`` steps,
    ``weight_decay``, ``clip`` (global gradient norm, 0 for none), ``b2``.
    """
    if config.schedule == "constant":
        tail = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        tail = optax.cosine_decay_schedule(config.lr, max(1, steps - config.warmup), alpha=0.05)
    else:
        raise InputError(f"optimizer.schedule={config.schedule!r}: choose constant or cosine")
    schedule = tail
    if config.warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), tail], [config.warmup])
    adamw = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def update_average(average: Any, new: Any, step: jax.Array, decay: float) -> Any:
    """Exponential moving average; young averages forget faster: decay is at most (1 + step) / (10 + step)."""
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: a + rate * (b - a), average, new)
