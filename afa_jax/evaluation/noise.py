"""Noise MSE on fixed pairs, noises and timesteps: reported, never a verdict on pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa_jax.data.pictures import to_images
from afa_jax.diffusion.guidance import Denoiser
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts import Experts, encode_prompts
from afa_jax.models.vae import VAE


def noise_errors(
    denoiser: Denoiser,
    experts: Experts,
    pixels: np.ndarray,
    captions: Sequence[str],
    *,
    draws: int = 4,
    batch: int = 16,
) -> np.ndarray:
    """Mean squared error of the noise for each picture and draw, ``[pictures, draws]``, whatever the prediction type.

    Picture i's draw k has the timestep in the middle of one of ``pictures * draws`` equal parts of the schedule, and
    noise from ``fold_in(fold_in(key(0), i), k)``: the same for every method.

    Args:
        pixels: uint8 ``[pictures, rows, columns, 3]``; their number must be a multiple of ``batch``.
    """
    count, total = len(pixels), experts.schedule.num_train_timesteps
    if count % batch:
        raise ValueError(f"{count} pictures are not a multiple of the batch {batch}")
    ids = experts.tokenizer(captions)
    parts = np.random.default_rng(0).permutation(count * draws).reshape(count, draws)
    timesteps = ((parts + 0.5) * total / (count * draws)).astype(np.int32)

    result = np.empty((count, draws), np.float32)
    for first in range(0, count, batch):
        rows = np.arange(first, first + batch)
        for draw in range(draws):
            inputs = (pixels[rows], ids[rows], timesteps[rows, draw], rows, draw)
            result[rows, draw] = _errors(denoiser, experts.vae, experts.text_encoder, inputs, schedule=experts.schedule)
    return result


@functools.partial(jax.jit, static_argnames="schedule")
def _errors(denoiser: Any, vae: VAE, text_encoder: Any, inputs: tuple[Any, ...], *, schedule: NoiseSchedule) -> Array:
    pixels, ids, t, index, draw = inputs
    latents = vae.encode(to_images(pixels))
    key = jax.random.key(0)
    noise = jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), draw), latents.shape[1:])
    )(index)
    xt = schedule.add_noise(latents, noise, t)
    predicted = schedule.noise(xt, denoiser(xt, t, encode_prompts(text_encoder, ids)), t)
    return jnp.square(predicted - noise).mean((1, 2, 3))
