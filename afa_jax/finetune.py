"""Train or fine-tune one model: ``python -m afa_jax.finetune --config configs/emoji_base.py --workdir DIR``.

The ordinary latent-diffusion objective on a U-Net and its text encoder, as the fine-tunes that people make of Stable
Diffusion are made. Used for the emoji default: one base model on everything, then experts from it, each on its domain.
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
from afa_jax.data.text import Tokenizer
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.parallel import data_mesh, replicate, split_batch
from afa_jax.training.loop import run_loop
from afa_jax.training.loss import diffusion_loss, drop_captions
from afa_jax.training.optimizer import make_optimizer, update_average
from afa_jax.training.workdir import open_workdir, write_config
from afa_jax.weights.folders import load_text_encoder, load_unet, load_vae, save_folder

Model = tuple[UNet, TextEncoder]


def main(arguments: Sequence[str]) -> None:
    """Train and write ``workdir/model``, a diffusers folder with the averaged weights in float16."""
    parser = argparse.ArgumentParser(prog="python -m afa_jax.finetune", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    options, config = parse(parser, arguments)
    vae, tokenizer = load_vae(config.vae), Tokenizer(config.tokenizer)
    schedule = NoiseSchedule.from_json(config.schedule)
    source = SceneSource(**config.data)
    if config.init:
        model: Model = (load_unet(config.init), load_text_encoder(config.init))
    else:
        rngs = nnx.Rngs(config.seed)
        model = (
            UNet(UNetConfig(**config.unet), rngs=rngs),
            TextEncoder(TextConfig(**config.text_encoder), rngs=rngs),
        )
    optimizer = make_optimizer(config.optimizer, config.steps)
    no_caption = jnp.asarray(tokenizer([""])[0])

    def loss_of(model: Model, images: jax.Array, ids: jax.Array, vae: Any, key: jax.Array) -> jax.Array:
        unet, text_encoder = model
        latent_key, drop_key, loss_key = jax.random.split(key, 3)
        latents = vae.encode(images, latent_key)
        states = text_encoder(drop_captions(ids, no_caption, config.caption_dropout, drop_key))
        return diffusion_loss(
            lambda x, t: unet(x, t, states), schedule, latents, loss_key, min_snr_gamma=config.min_snr_gamma
        )

    @jax.jit
    def train_step(
        state: dict[str, Any], batch: dict[str, jax.Array], vae: Any, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        images = to_images(batch["image"])
        loss, gradient = jax.value_and_grad(loss_of)(state["params"], images, batch["ids"], vae, key)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = update_average(state["average"], params, state["step"], config.ema)
        new = dict(params=params, average=average, opt=opt, step=state["step"] + 1)
        return new, dict(loss=loss, gradient_norm=optax.tree.norm(gradient))

    def batch_at(step: int) -> dict[str, np.ndarray]:
        scenes = [source[(step * config.batch + i) % len(source)] for i in range(config.batch)]
        return dict(
            image=np.stack([scene["image"] for scene in scenes]),
            ids=tokenizer([scene["caption"] for scene in scenes]),
        )

    open_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    write_config(options.workdir, config)
    mesh = data_mesh()
    vae = replicate(vae, mesh)
    state = dict(params=model, average=model, opt=optimizer.init(model), step=jnp.zeros((), jnp.int32))
    state = run_loop(
        lambda state, batch, key: train_step(state, split_batch(batch, mesh), vae, key),
        replicate(state, mesh),
        batch_at,
        steps=config.steps,
        seed=config.seed,
        workdir=options.workdir,
        resume=options.resume,
        log_every=config.log_every,
        save_every=config.save_every,
    )
    unet, text_encoder = state["average"]
    target = options.workdir / "model"
    shutil.rmtree(target, ignore_errors=True)  # of this very run, before it was resumed to more steps
    save_folder(
        target,
        unet=unet,
        vae=vae if config.with_vae else None,
        text_encoder=text_encoder,
        tokenizer=Path(config.tokenizer) / "tokenizer",
        scheduler=schedule.to_json(),
        dtype=jnp.float16,
        metadata=dict(trained_by=f"afa_jax.finetune, {config.name}, {config.steps} steps of {config.batch}"),
    )
    print(target)


if __name__ == "__main__":
    raise SystemExit(run(main))
