"""AFA's training step: only the aggregators change.

Aggregators and frozen parts cross the jitted step as flat dictionaries: a tree of modules takes Python 12 ms to take
apart and put together, at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from afa_jax.data.pictures import to_images
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts import encode_prompts
from afa_jax.fusion.ensemble import Ensemble
from afa_jax.fusion.sabw import Aggregators, SABWConfig
from afa_jax.models.unet import UNet
from afa_jax.parallel import Mode
from afa_jax.training.loss import diffusion_loss, drop_captions
from afa_jax.weights.keys import flatten, shapes_of, unflatten

State = dict[str, Any]
"""``params`` (the aggregators' arrays by dotted path), ``opt`` (optimizer state), ``step``."""


def init_aggregators(config: SABWConfig, unet: UNet, experts: int, seed: int) -> Aggregators:
    """Fresh aggregators for a stack of ``experts`` U-Nets, float32."""
    return Aggregators(config, experts, list(unet.stages), unet.config, rngs=nnx.Rngs(seed))


def init_state(aggregators: Aggregators, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    params = flatten(aggregators)
    return dict(params=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def make_train_step(
    aggregators: Aggregators,
    frozen: dict[str, Any],
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    *,
    caption_dropout: float,
    no_caption: Array,
    min_snr_gamma: float = 0.0,
    mode: Mode | None = None,
) -> Callable[[State, dict[str, Array], dict[str, Any], Array], tuple[State, dict[str, Array]]]:
    """The jitted step ``(state, batch, flatten(frozen), key) -> (state, metrics)``.

    Gradient and optimizer see the aggregators only. Metrics: loss, norms of gradient, parameters and update, and the
    mean weight of each expert over all sites and pixels.

    Args:
        aggregators: only its structure is used; its leaves may be shapes.
        frozen: likewise; holds unet and text_encoder (stacks) and vae.
    """
    like_aggregators, like_frozen = shapes_of(aggregators), shapes_of(frozen)

    def loss_of(params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array) -> Any:
        aggregators, frozen = unflatten(like_aggregators, params), unflatten(like_frozen, arrays)
        latent_key, drop_key, loss_key = jax.random.split(key, 3)
        latents = frozen["vae"].encode(to_images(batch["image"]), latent_key)
        ids = drop_captions(batch["ids"], no_caption, caption_dropout, drop_key)
        states = encode_prompts(frozen["text_encoder"], ids, mode)
        ensemble = Ensemble(experts=frozen["unet"], aggregators=aggregators, mode=mode)
        weights: list[Array] = []

        def predict(x: Array, t: Array) -> Array:
            prediction, maps = ensemble.with_maps(x, t, states)
            weights.append(jnp.stack([m.mean((1, 2, 3)) for m in maps]).mean(0))
            return prediction

        loss = diffusion_loss(predict, schedule, latents, loss_key, min_snr_gamma=min_snr_gamma)
        return loss, weights[0]

    @jax.jit
    def train_step(
        state: State, batch: dict[str, Array], arrays: dict[str, Array], key: Array
    ) -> tuple[State, dict[str, Array]]:
        arrays = jax.lax.stop_gradient(arrays)
        (loss, weights), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["params"], batch, arrays, key)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = dict(
            loss=loss,
            gradient_norm=optax.tree.norm(gradient),
            parameter_norm=optax.tree.norm(params),
            update_norm=optax.tree.norm(updates),
        )
        metrics |= {f"weight_{i}": weights[i] for i in range(weights.shape[0])}
        return dict(params=params, opt=opt, step=state["step"] + 1), metrics

    return train_step
