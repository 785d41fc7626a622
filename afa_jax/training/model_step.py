"""The training step of one model: a U-Net and its text encoder on latents and captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.training.losses import diffusion_loss, drop_captions
from afa_jax.training.optimizer import update_average
from afa_jax.trees import unflatten

State = dict[str, Any]
"""``params`` (by dotted path), ``opt`` (optimizer state), ``step``, and with an EMA ``average`` (of the parameters)."""


def init_state(params: Mapping[str, Array], optimizer: optax.GradientTransformation, ema: float) -> State:
    """Return the state before the first step."""
    state = dict(params=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))
    return state | dict(average=jax.tree.map(jnp.copy, params)) if ema else state


def make_model_step(
    shapes: Any,
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    *,
    no_caption: Array,
    caption_dropout: float,
    min_snr_gamma: float = 0.0,
    timesteps: tuple[int, int] | None = None,
    ema: float = 0.0,
    accumulate: int = 1,
    remat: Literal["none", "stage"] = "none",
) -> Callable[[State, dict[str, Array], Array], tuple[State, dict[str, Array]]]:
    """Return the jitted step ``(state, batch, key) -> (state, metrics)``; it reuses (donates) the state's memory.

    A batch has ``latents`` ``[b, h, w, c]`` and ``ids`` ``[b, tokens]``; metrics are loss and norm of the gradient.

    Args:
        shapes: (U-Net, text encoder) whose leaves may be shapes; they compute in their own dtype.
        no_caption: token ids of the empty prompt ``[tokens]``, which a caption becomes with probability
            ``caption_dropout``.
        timesteps: ``(low, high)``, of which ``low <= t < high`` are learnt; None for all.
        ema: decay of the parameters' average; 0 keeps none.
        accumulate: the number of parts, processed one after another, of a batch; the same step in less memory. It must
            divide b.
        remat: "stage" recomputes the inside of the U-Net's stages for the gradient instead of keeping it.
    """

    def loss_of(params: dict[str, Array], batch: dict[str, Array]) -> Array:
        unet, text_encoder = unflatten(shapes, params)
        conditioning = text_encoder.encode(drop_captions(batch["ids"], no_caption, caption_dropout, batch["drop_keys"]))
        return diffusion_loss(
            lambda x, t: unet(x, t, conditioning, remat=remat == "stage"),
            schedule,
            batch["latents"],
            batch["loss_keys"],
            min_snr_gamma=min_snr_gamma,
            timesteps=timesteps,
        )

    gradient_of = jax.value_and_grad(loss_of)

    def accumulated(params: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        # Each part has rows of all devices, which hold neighbouring rows of the batch.
        parts = jax.tree.map(lambda rows: rows.reshape(-1, accumulate, *rows.shape[1:]).swapaxes(0, 1), batch)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, gradient_of(params, part)), None), zeros, parts
        )
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def train_step(state: State, batch: dict[str, Array], key: Array) -> tuple[State, dict[str, Array]]:
        drop_keys, loss_keys = jax.random.split(key, (2, len(batch["ids"])))
        whole = batch | dict(drop_keys=drop_keys, loss_keys=loss_keys)
        loss, gradient = (accumulated if accumulate > 1 else gradient_of)(state["params"], whole)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = dict(params=params, opt=opt, step=state["step"] + 1)
        if ema:
            new["average"] = update_average(state["average"], params, state["step"], ema)
        return new, dict(loss=loss, gradient_norm=optax.tree.norm(gradient))

    return jax.jit(train_step, donate_argnums=0)


def rows_at(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """Return the indices of a step's batch among ``count`` pictures: each epoch takes all, in its own order.

    If there are fewer pictures than a batch has rows, they repeat, each time with another noise.
    """
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])
