"""The objective of latent diffusion, for any predictor."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.types import Latents, Timesteps, TokenIds


def diffusion_loss(
    predict: Callable[[Latents, Timesteps], Latents],
    schedule: NoiseSchedule,
    latents: Latents,
    key: Array,
    *,
    min_snr_gamma: float = 0.0,
) -> Array:
    """Mean squared error of a prediction at a uniformly random timestep, in float32 (Ho et al. 2020, eq. 14).

    Args:
        predict: ``(x_t, t) -> prediction`` of the schedule's type.
        latents: clean, scaled latents.
        min_snr_gamma: weights min(SNR, gamma) / SNR of Hang et al. 2023 (arXiv 2303.09556) if positive.
    """
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, (latents.shape[0],), 0, schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    prediction = predict(schedule.add_noise(latents, noise, t), t)
    errors = jnp.square(prediction.astype(jnp.float32) - schedule.target(latents, noise, t)).mean((1, 2, 3))
    if min_snr_gamma:
        errors = errors * schedule.min_snr_weights(t, min_snr_gamma)
    return errors.mean()


def drop_captions(ids: TokenIds, no_caption: Array, probability: float, key: Array) -> TokenIds:
    """Replace each sample's ids by those of the empty prompt with this probability, independently per sample."""
    dropped = jax.random.bernoulli(key, probability, (ids.shape[0], 1))
    return jnp.where(dropped, no_caption, ids)
