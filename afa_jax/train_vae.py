"""Train an autoencoder: ``python -m afa_jax.train_vae --config configs/emoji_vae.py --workdir DIR``.

Stable Diffusion's own VAE is used as it is; this command makes the small one of the emoji default.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from afa_jax.commands import parse, run
from afa_jax.data.emoji.scenes import SceneSource
from afa_jax.data.pictures import to_images
from afa_jax.models.configs import VAEConfig
from afa_jax.models.vae import VAE
from afa_jax.training.loop import run_loop
from afa_jax.training.optimizer import make_optimizer, update_average
from afa_jax.training.workdir import open_workdir, write_config
from afa_jax.weights.folders import load_vae, save_folder


def main(arguments: Sequence[str]) -> None:
    """Train and write ``workdir/model``, a diffusers folder with a VAE whose scaled latents have unit variance."""
    parser = argparse.ArgumentParser(prog="python -m afa_jax.train_vae", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    options, config = parse(parser, arguments)
    if config.init:
        vae = load_vae(config.init)
    else:
        vae = VAE(VAEConfig(**config.vae), rngs=nnx.Rngs(config.seed))
    optimizer = make_optimizer(config.optimizer, config.steps)
    source = SceneSource(**config.data)
    open_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    write_config(options.workdir, config)

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
        step, state, batch_at, steps=config.steps, seed=config.seed, workdir=options.workdir, resume=options.resume,
        log_every=config.log_every, save_every=config.save_every,
    )  # fmt: skip
    vae = state["average"]

    # Unit variance of the scaled latents, over scenes that were not trained on, is what the noise schedule expects.
    unseen = [source[len(source) - 1 - i]["image"] for i in range(256)]
    reconstruct = jax.jit(lambda vae, x: (vae.moments(x)[0], vae.decode(vae.encode(x))))
    latents, errors = [], []
    for first in range(0, len(unseen), config.batch):
        images = to_images(jnp.asarray(np.stack(unseen[first : first + config.batch])))
        mean, decoded = reconstruct(vae, images)
        latents.append(np.asarray(mean))
        errors.append(np.square(np.clip(np.asarray(decoded), -1, 1) - np.asarray(images)).mean((1, 2, 3)))
    psnr = float((10 * np.log10(4 / np.concatenate(errors))).mean())
    vae.config = VAEConfig(**{**config.vae, "scaling_factor": round(float(1 / np.concatenate(latents).std()), 5)})
    target = options.workdir / "model"
    shutil.rmtree(target, ignore_errors=True)  # of this very run, before it was resumed to more steps
    save_folder(target, vae=vae, dtype=jnp.float16)
    print(f"{target}: PSNR {psnr:.2f} dB on 256 unseen scenes, scaling factor {vae.config.scaling_factor}")


if __name__ == "__main__":
    raise SystemExit(run(main))
