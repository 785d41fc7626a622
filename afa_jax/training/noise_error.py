"""Noise MSE on fixed pairs, noises and timesteps: reported, never a verdict on pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa_jax.diffusion.guidance import Denoiser
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import NotFinite
from afa_jax.experts.frozen import Experts
from afa_jax.mesh.experts import Shared, map_experts
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import VAE, to_images


def noise_errors(
    denoiser: Denoiser,
    experts: Experts,
    pixels: np.ndarray,
    captions: Sequence[str],
    *,
    draws: int = 4,
    batch: int = 16,
) -> np.ndarray:
    """Return the noise's mean squared error by picture and draw, ``[pictures, draws]``, for any prediction type.

    Picture i's draw k has the timestep in the middle of one of ``pictures * draws`` equal parts of the schedule, and
    noise from ``fold_in(fold_in(key(0), i), k)``: the same for every method.

    Args:
        pixels: uint8 ``[pictures, rows, columns, 3]``.
        batch: pictures at once; the last batch is padded.

    Raises:
        NotFinite: a prediction is not finite.
    """
    result = np.empty((len(pixels), draws), np.float32)
    for rows, draw, inputs in fixed_draws(experts, pixels, captions, draws=draws, batch=batch):
        result[rows, draw] = _errors(denoiser, experts.vae, experts.text_encoder, inputs, schedule=experts.schedule)
    check_predictions(result, experts)
    return result


def check_predictions(values: np.ndarray, experts: Experts) -> None:
    """Raise NotFinite for predictions of the noise, or their errors, that hold NaN or infinity."""
    if not np.isfinite(values).all():
        dtype = jnp.dtype(experts.text_encoder.dtype).name
        remedy = "look at the weights with afa_jax.convert --inspect" if dtype == "float32" else "choose dtype=float32"
        raise NotFinite(f"{', '.join(experts.names)} predict NaN or infinity in {dtype}; {remedy}")


def fixed_draws(
    experts: Experts, pixels: np.ndarray, captions: Sequence[str], *, draws: int, batch: int
) -> Iterator[tuple[np.ndarray, int, tuple[Any, ...]]]:
    """Yield the pictures, timesteps and noises of noise_errors in batches, the last padded with the last picture.

    Yields:
        Rows, draw, and what ``noised`` takes.
    """
    count, ids = len(pixels), experts.tokenizer(captions)
    timesteps = draw_timesteps(count, draws, experts.schedule.num_train_timesteps)
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        for draw in range(draws):
            yield rows, draw, (pixels[rows], ids[rows], timesteps[rows, draw], rows, draw)


def draw_timesteps(pictures: int, draws: int, total: int) -> np.ndarray:
    """Return the timesteps of fixed_draws, int32 ``[pictures, draws]``."""
    parts = np.random.default_rng(0).permutation(pictures * draws).reshape(pictures, draws)
    return ((parts + 0.5) * total / (pictures * draws)).astype(np.int32)


def bucket_errors(
    denoiser: Denoiser,
    experts: Experts,
    pixels: np.ndarray,
    captions: Sequence[str],
    *,
    buckets: int = 4,
    draws: int = 4,
    batch: int = 16,
) -> list[float]:
    """Average noise_errors within each of ``buckets`` equal ranges of timesteps, from little noise to much."""
    errors = noise_errors(denoiser, experts, pixels, captions, draws=draws, batch=batch)
    total = experts.schedule.num_train_timesteps
    bucket = draw_timesteps(len(pixels), draws, total) * buckets // total
    return [float(errors[bucket == i].mean()) for i in range(buckets)]


def noised(vae: VAE, inputs: tuple[Any, ...], schedule: NoiseSchedule) -> tuple[Array, Array, Array, Any]:
    """Return noise, x_t, t and token ids for one of fixed_draws' inputs; called inside jit."""
    pixels, ids, t, index, draw = inputs
    latents, root = vae.encode(to_images(pixels)), jax.random.key(0)
    noise = jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(root, i), draw), latents.shape[1:])
    )(index)
    return noise, schedule.add_noise(latents, noise, t), t, ids


def expert_errors(
    experts: Experts,
    pixels: np.ndarray,
    captions: Sequence[str],
    *,
    buckets: int,
    draws: int,
    seed: int = 0,
    batch: int = 8,
) -> Iterator[np.ndarray]:
    """Yield each expert's own element-wise squared errors of the noise, a few pictures at a time.

    The schedule is cut into ``buckets`` equal ranges of timesteps. In each, every picture gets one timestep
    (``bucket_timesteps``) and ``draws`` noises at it, from ``key(seed)`` folded with picture, bucket and draw: the same
    for every expert, and whatever the batch.

    Args:
        pixels: uint8 ``[pictures, rows, columns, 3]``.
        batch: pictures at once; the last batch is padded.

    Yields:
        ``[n, b, buckets, draws, h, w, c]``, float32, for the next ``b <= batch`` pictures; in the noise's units
        whatever the prediction type.
    """
    count, ids = len(pixels), experts.tokenizer(captions)
    timesteps = bucket_timesteps(count, buckets, experts.schedule.num_train_timesteps, seed)
    frozen = (experts.unet, experts.text_encoder, experts.vae)
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        inputs = (pixels[rows], ids[rows], timesteps[rows], rows, jax.random.key(seed))
        errors = _expert_errors(frozen, inputs, draws=draws, schedule=experts.schedule)
        yield np.asarray(errors[:, : count - first])


def bucket_timesteps(pictures: int, buckets: int, total: int, seed: int) -> np.ndarray:
    """Return a timestep below ``total`` for each picture and bucket, int32 ``[pictures, buckets]``.

    The pictures' timesteps are the middles of equal parts of a bucket, shuffled differently in each bucket.
    """
    parts = np.random.default_rng(seed).permuted(np.tile(np.arange(pictures), (buckets, 1)), axis=1).T
    halves = 2 * (np.arange(buckets) * pictures + parts) + 1  # integers: a middle on a whole timestep stays there
    return (halves * total // (2 * buckets * pictures)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("draws", "schedule"))
def _expert_errors(frozen: Any, inputs: tuple[Any, ...], *, draws: int, schedule: NoiseSchedule) -> Array:
    (unets, text_encoder, vae), (pixels, ids, timesteps, index, key) = frozen, inputs
    latents, states = vae.encode(to_images(pixels)), encode_prompts(text_encoder, ids)
    buckets = timesteps.shape[1]

    def noise_of(picture: Array, bucket: Array, draw: Array) -> Array:
        own = functools.reduce(jax.random.fold_in, (picture, bucket, draw), key)
        return jax.random.normal(own, latents.shape[1:])

    def errors(number: Array) -> Array:
        """Return the squared errors ``[n, b, h, w, c]`` of one bucket and draw."""
        bucket, draw = number // draws, number % draws
        t = timesteps[:, bucket]
        noise = jax.vmap(noise_of, (0, None, None))(index, bucket, draw)
        xt = schedule.add_noise(latents, noise, t)

        def one(unet: Any, states: Any, xt: Array, t: Array) -> Array:
            return schedule.noise(xt, unet(xt, t, states), t)

        return jnp.square(map_experts(one, unets, states, Shared(xt), Shared(t)) - noise)

    # One after the other: the program and its memory are those of a single forward.
    result = jnp.moveaxis(jax.lax.map(errors, jnp.arange(buckets * draws)), 0, 2)
    return result.reshape(*result.shape[:2], buckets, draws, *latents.shape[1:])


@functools.partial(jax.jit, static_argnames="schedule")
def _errors(denoiser: Any, vae: VAE, text_encoder: Any, inputs: tuple[Any, ...], *, schedule: NoiseSchedule) -> Array:
    noise, xt, t, ids = noised(vae, inputs, schedule)
    predicted = schedule.noise(xt, denoiser(xt, t, encode_prompts(text_encoder, ids)), t)
    return jnp.square(predicted - noise).mean((1, 2, 3))
