"""DDIM (Song et al. 2021, arXiv 2010.02502) as one scan over timesteps.

The step receives a prediction and never a network; its constants are computed once and scanned over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.types import Latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConstants:
    """Of each sampling step, ``[steps]`` each (scalars inside the scan).

    Attributes:
        t: training timestep.
        signal, sigma: sqrt(a_t), sqrt(1 - a_t).
        next_signal, next_sigma: of x at the next timestep: sqrt(a_s), sqrt(1 - a_s - std^2).
        std: of the fresh noise, eta * sqrt((1 - a_s) / (1 - a_t)) * sqrt(1 - a_t / a_s) (eq. 16).
    """

    t: Any
    signal: Any
    sigma: Any
    next_signal: Any
    next_sigma: Any
    std: Any


jax.tree_util.register_dataclass(
    StepConstants, data_fields=[f.name for f in dataclasses.fields(StepConstants)], meta_fields=[]
)


def ddim_constants(schedule: NoiseSchedule, steps: int, eta: float = 0.0, strength: float = 1.0) -> StepConstants:
    """The constants of a DDIM run.

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM.
        strength: below 1, only the last ``strength * steps`` steps, for starting from a noised picture (img2img).

    Raises:
        InputError: steps, eta or strength out of range.
    """
    if not eta >= 0:
        raise InputError(f"eta={eta}; choose 0 or more")
    if not 0 < strength <= 1:
        raise InputError(f"strength={strength}; choose more than 0, at most 1")
    t = schedule.timesteps(steps)
    # float64 here costs nothing; the constants become float32 at the end.
    alphas = schedule.alphas_cumprod.astype(np.float64)
    last = 1.0 if schedule.set_alpha_to_one else alphas[0]
    s = t - schedule.num_train_timesteps // steps
    a_t, a_s = alphas[t], np.where(s >= 0, alphas[np.maximum(s, 0)], last)
    std = eta * np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    values = (np.sqrt(a_t), np.sqrt(1 - a_t), np.sqrt(a_s), np.sqrt(np.maximum(1 - a_s - std**2, 0)), std)
    first = steps - max(1, min(steps, int(steps * strength)))
    constants = [jnp.asarray(value[first:], jnp.float32) for value in values]
    return StepConstants(
        t=jnp.asarray(t[first:]),
        signal=constants[0],
        sigma=constants[1],
        next_signal=constants[2],
        next_sigma=constants[3],
        std=constants[4],
    )


def ddim_step(
    schedule: NoiseSchedule, k: StepConstants, x: Latents, prediction: Latents, noise: Latents | None
) -> Latents:
    """X at the next timestep: ``sqrt(a_s) x_0 + sqrt(1 - a_s - std^2) eps + std noise`` (eq. 12)."""
    x0, eps = schedule.split(x, prediction, k.signal, k.sigma)
    x = k.next_signal * x0 + k.next_sigma * eps
    return x if noise is None else x + k.std * noise


def ddim(
    predict: Callable[..., Any],
    schedule: NoiseSchedule,
    x: Latents,
    *,
    steps: int,
    eta: float = 0.0,
    strength: float = 1.0,
    noise_at: Callable[[Array], Latents] | None = None,
    has_aux: bool = False,
    carry: Any = None,
) -> Any:
    """Sample: from x at the first timestep to clean latents, one ``lax.scan`` over the timesteps.

    Args:
        predict: ``(x, t [b]) -> prediction`` of the schedule's type.
        x: standard normal noise at strength 1; a noised picture below.
        steps: number of network evaluations at strength 1.
        eta: fresh noise in each step; needs ``noise_at``.
        noise_at: ``step index -> noise`` shaped like x.
        has_aux: ``predict`` returns ``(prediction, aux)``; the result is then ``(x, aux)``, aux stacked over the steps.
        carry: what a method remembers along the path, before the first step. ``predict`` is then ``(x, t, carry) ->
            (answer, carry)``, its answer what it would be without.

    Raises:
        InputError: steps, eta or strength out of range.
        ValueError: eta > 0 without noise_at.
    """
    if eta > 0 and noise_at is None:
        raise ValueError("eta > 0 needs noise_at")
    constants = ddim_constants(schedule, steps, eta, strength)

    def step(state: tuple[Latents, Any], scanned: tuple[Array, StepConstants]) -> tuple[tuple[Latents, Any], Any]:
        (x, memory), (index, k) = state, scanned
        t = jnp.broadcast_to(k.t, x.shape[:1])
        answer, memory = (predict(x, t), None) if carry is None else predict(x, t, memory)
        prediction, aux = answer if has_aux else (answer, None)
        noise = noise_at(index) if eta and noise_at is not None else None
        return (ddim_step(schedule, k, x, prediction, noise), memory), aux

    (x, _), aux = jax.lax.scan(step, (x, carry), (jnp.arange(len(constants.t)), constants))
    return (x, aux) if has_aux else x


def image_noise(key: Array, numbers: Array, shape: tuple[int, int, int]) -> Latents:
    """Standard normal noise ``[b, h, w, c]``, each picture's from ``fold_in(key, its number)`` alone.

    So a picture does not depend on its batch-mates.
    """
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)
