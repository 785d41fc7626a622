"""Train a small autoencoder whose scaled latents have unit variance."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from afa_jax.data.sources import make_source
from afa_jax.errors import InputError
from afa_jax.models.configs import VAEConfig
from afa_jax.models.layers import Conv
from afa_jax.models.vae import VAE, to_images
from afa_jax.training.loop import run_loop
from afa_jax.training.optimizer import make_optimizer, update_average
from afa_jax.training.start import check_start, data_of
from afa_jax.training.workdir import open_workdir, save_model, write_config
from afa_jax.weights.load import load_vae

MAX_GAIN = 5.0  # the most that whitening amplifies a direction of the latents over the strongest one

UNSEEN = 256  # pictures of the end of the data, to measure on
NO_QUANT_CONV = "an autoencoder is whitened through use_quant_conv and use_post_quant_conv; set both"


def train_vae(
    config: ConfigDict,
    workdir: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
) -> None:
    """Train and write ``workdir/model``, a diffusers folder with a VAE whose scaled latents have unit variance.

    Raises:
        InputError: the config, its models, its data or the workdir cannot be used.
        Stopped: SIGTERM or SIGINT stopped the run, which was saved.
    """
    check_start(config, workdir, resume=resume, overwrite=overwrite, untrained="which only whitens")
    source = make_source(data_of(config))
    if len(source) < (needed := config.steps * config.batch + UNSEEN):
        raise InputError(f"data has {len(source):,} pictures; {config.steps} steps and the test need {needed:,}")
    if config.init:
        vae = load_vae(config.init)
    else:
        vae = VAE(VAEConfig(**config.vae), rngs=nnx.Rngs(config.seed))
    optimizer = make_optimizer(config.optimizer, config.steps)
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise InputError(NO_QUANT_CONV)
    open_workdir(workdir, resume=resume, overwrite=overwrite)
    if not resume:
        write_config(workdir, config)

    def loss_of(vae: VAE, images: jax.Array, key: jax.Array) -> jax.Array:
        mean, logvar = vae.moments(images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.decode(latents * vae.config.scaling_factor) - images
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return jnp.abs(error).mean() + 2 * jnp.square(error).mean() + config.kl * divergence

    @jax.jit
    def step(state: dict[str, Any], batch: jax.Array, key: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        loss, gradient = jax.value_and_grad(loss_of)(state["params"], to_images(batch), key)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = update_average(state["average"], params, state["step"], config.ema)
        new = dict(params=params, average=average, opt=opt, step=state["step"] + 1)
        return new, dict(loss=loss, gradient_norm=optax.tree.norm(gradient))

    def batch_at(step: int) -> np.ndarray:
        return np.stack([source[step * config.batch + i]["image"] for i in range(config.batch)])

    state = dict(params=vae, average=vae, opt=optimizer.init(vae), step=jnp.zeros((), jnp.int32))
    state = run_loop(
        step, state, lambda first: map(batch_at, itertools.count(first)), steps=config.steps, seed=config.seed,
        workdir=workdir, resume=resume, resume_step=resume_step,
        on_resume=lambda facts: write_config(workdir, config),
        log_every=config.log_every, save_every=config.save_every,
    )  # fmt: skip
    vae = state["average"]

    # Unit variance, which the noise schedule expects, measured on scenes that were not trained on.
    unseen = [source[len(source) - 1 - i]["image"] for i in range(UNSEEN)]
    images = [to_images(jnp.asarray(np.stack(unseen[i : i + 32]))) for i in range(0, len(unseen), 32)]
    moments = jax.jit(lambda vae, x: vae.moments(x))
    vae.config = whiten(vae, *(np.concatenate(parts) for parts in zip(*(moments(vae, x) for x in images), strict=True)))
    reconstruct = jax.jit(lambda vae, x: jnp.square(jnp.clip(vae.decode(vae.encode(x)), -1, 1) - x).mean((1, 2, 3)))
    psnr = float((10 * np.log10(4 / np.concatenate([reconstruct(vae, x) for x in images]))).mean())
    target = save_model(workdir, vae=vae, dtype=jnp.float16)
    print(f"{target}: PSNR {psnr:.2f} dB on {UNSEEN} unseen scenes, scaling factor {vae.config.scaling_factor}")


def whiten(vae: VAE, mean: np.ndarray, logvar: np.ndarray) -> VAEConfig:
    """Rotate and scale the latents, in place, so that their main directions have equal variance; return the new config.

    The loss does not decorrelate the latents. On the emoji four directions of the eight channels carried all but
    0.3 dB, and the strongest had 25 times the variance of the fourth: a diffusion model saw little of the colours. The
    change goes into the 1x1 convolutions around the latents, so pictures are decoded as before. MAX_GAIN limits how far
    weak directions are amplified: they would only give a diffusion model more to predict. The posterior variances
    are tiny and cannot be rotated; each becomes its average over the pictures in the new directions.

    Args:
        mean: means of some pictures' posteriors, ``[b, h, w, c]``, unscaled.
        logvar: log variances of the same posteriors.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise InputError(NO_QUANT_CONV)
    channels = mean.shape[-1]
    points = mean.reshape(-1, channels).astype(np.float64)
    center = points.mean(0)
    variances, directions = np.linalg.eigh(np.cov((points - center).T))
    gains = np.minimum(1, MAX_GAIN * np.sqrt(variances / variances[-1])) / np.sqrt(variances)
    forth, back = directions * gains, (directions / gains).T  # whitened = (point - center) @ forth
    kernel, bias = _read(vae.quant_conv)
    kernel[..., :channels] = kernel[..., :channels] @ forth
    bias[:channels] = (bias[:channels] - center) @ forth
    kernel[..., channels:] = 0
    bias[channels:] = np.log(np.square(forth).T @ np.exp(logvar).reshape(-1, channels).mean(0))
    _write(vae.quant_conv, kernel, bias)
    kernel, bias = _read(vae.post_quant_conv)
    _write(vae.post_quant_conv, back @ kernel, bias + center @ kernel[0, 0])
    scale = 1 / ((points - center) @ forth).std()
    return dataclasses.replace(vae.config, scaling_factor=round(float(scale), 5))


def _read(conv: Conv) -> tuple[np.ndarray, np.ndarray]:
    assert conv.bias is not None
    return np.array(conv.kernel[...], np.float64), np.array(conv.bias[...], np.float64)


def _write(conv: Conv, kernel: np.ndarray, bias: np.ndarray) -> None:
    assert conv.bias is not None
    conv.kernel[...], conv.bias[...] = jnp.float32(kernel), jnp.float32(bias)
