"""The objective of latent diffusion, for any predictor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.types import Latents, Timesteps, TokenIds

Predictor = Callable[[Latents, Timesteps], Any]
"""``(x_t, t) -> prediction`` of the schedule's type."""


def diffusion_loss(
    predict: Predictor,
    schedule: NoiseSchedule,
    latents: Latents,
    keys: Array,
    *,
    min_snr_gamma: float = 0.0,
    timesteps: tuple[int, int] | None = None,
    has_aux: bool = False,
    penalty: Callable[[Any, Latents], Array] | None = None,
) -> Any:
    """Return the mean squared error of a prediction at uniformly random timesteps, float32 (Ho et al. 2020, eq. 14).

    Args:
        latents: clean, scaled latents.
        keys: ``[b]``, one per row: an example's noise and timestep do not depend on the other rows.
        min_snr_gamma: weights min(SNR, gamma) / SNR of Hang et al. 2023 (arXiv 2303.09556) if positive.
        timesteps: ``(low, high)``, to draw only ``low <= t < high``; None draws all timesteps.
        has_aux: ``predict`` returns ``(prediction, aux)``; the result is then ``(loss, aux)``.
        penalty: ``(aux, target) -> [b]``, added to each row's error; the target is of the schedule's prediction type.
    """
    low, high = timesteps or (0, schedule.num_train_timesteps)

    def draw(key: Array) -> tuple[Array, Array]:
        t_key, noise_key = jax.random.split(key)
        t = jax.random.randint(t_key, (), low, high)
        return t, jax.random.normal(noise_key, latents.shape[1:], jnp.float32)

    t, noise = jax.vmap(draw)(keys)
    answer = predict(schedule.add_noise(latents, noise, t), t)
    prediction, aux = answer if has_aux else (answer, None)
    errors = squared_errors(schedule, prediction, latents, noise, t)
    if min_snr_gamma:
        errors = errors * schedule.min_snr_weights(t, min_snr_gamma)
    if penalty is not None:
        errors = errors + penalty(aux, schedule.target(latents, noise, t))
    return (errors.mean(), aux) if has_aux else errors.mean()


def squared_errors(
    schedule: NoiseSchedule, prediction: Latents, latents: Latents, noise: Latents, t: Timesteps
) -> Array:
    """Return the mean squared error of a prediction in each row, ``[b]``, float32."""
    return jnp.square(prediction.astype(jnp.float32) - schedule.target(latents, noise, t)).mean((1, 2, 3))


def drop_captions(ids: TokenIds, no_caption: Array, probability: float, keys: Array) -> TokenIds:
    """Replace each row's ids by those of the empty prompt with this probability; one key a row."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped[:, None], no_caption, ids)
