"""The training step of a fusion, be it AFA's aggregators or a rival.

Parameters and frozen parts enter and leave the jitted step as flat dictionaries. Taking trees of modules apart and
putting them together would cost Python 12 ms a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import Remat, routing_of
from afa_jax.fusion.registry import HasPenalty
from afa_jax.mesh.collectives import (
    EXPERT,
    ROWS,
    divided,
    mean_over_devices,
    on_each_device,
    on_mesh,
    own_experts,
    row_shares,
    sum_over_devices,
)
from afa_jax.mesh.parallel import specs_of
from afa_jax.models.conditioning import Conditioning, encode_prompts
from afa_jax.models.vae import VAE, to_images
from afa_jax.training.losses import diffusion_loss
from afa_jax.training.optimizer import update_average
from afa_jax.trees import flatten, shapes_of, unflatten
from afa_jax.types import Latents

State = dict[str, Any]
"""``params`` (the fusion's arrays by dotted path), ``opt`` (optimizer state), ``step``, and with an EMA ``average`` (of
the parameters)."""


def init_state(fusion: Any, optimizer: optax.GradientTransformation, *, average: bool = False) -> State:
    """Return the state before the first step."""
    params = flatten(fusion)
    state = dict(params=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))
    return state | dict(average=params) if average else state


def published(state: State) -> dict[str, Array]:
    """Return the parameters to sample with: the average if the run keeps one."""
    return state["average"] if "average" in state else state["params"]


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Return how the arrays of a batch are split: all by rows, a cache's text states also by the experts."""
    return {name: PartitionSpec(ROWS, EXPERT) if name == "states" else PartitionSpec(ROWS) for name in batch}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The arguments of ``make_train_step``, with which a training step is compiled."""

    fusion: Any
    frozen: Mapping[str, Any]
    optimizer: optax.GradientTransformation
    schedule: NoiseSchedule
    caption_dropout: float
    no_caption: Any
    min_snr_gamma: float
    accumulate: int
    ema: float
    remat: Remat
    vae: VAE | None
    mesh: Mesh | None


def row_keys(key: Array, position: Any) -> Array:
    """Return a key for each row ``[b]``, a function of only the run's key and the row's position in the run."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(position))


def latents_and_conditioning(
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    keys: Array,
    caption_dropout: float,
    no_caption: Any,
) -> tuple[Latents, Conditioning]:
    """Return sampled, scaled latents and the experts' conditioning, with some captions dropped; a pure function.

    With the same row key, a row gets the same sample, and its caption is dropped or kept alike, with the cache and
    without it. This function uses the first two of ``jax.random.split(key, 3)``; the third is for later use, such as
    the loss.

    Args:
        frozen: ``vae`` and ``text_encoder`` (a stack). A cached batch reads none of their arrays: ``vae`` may hold
            shapes only, for its scaling factor, and ``text_encoder`` may be missing.
        batch: ``image`` uint8 ``[b, rows, columns, 3]`` and ``ids`` ``[b, s]``; or, cached, ``mean``, ``std``
            ``[b, h, w, c]`` and ``states`` ``[b, n, s, d]``.
        keys: ``[b]``, as row_keys makes them.
        caption_dropout: probability that a row gets the empty caption.
        no_caption: the empty caption in the batch's form: ids ``[s]``, or the cache's states ``[n, s, d]``.
    """
    latent_keys, drop_keys, _ = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, caption_dropout))(drop_keys)
    if "mean" in batch:
        latents = frozen["vae"].sample(batch["mean"], batch["std"], latent_keys)
        states = jnp.moveaxis(jnp.asarray(batch["states"]), 1, 0)
        nothing = own_experts(jnp.asarray(no_caption))[:, None]
        return latents, Conditioning(text=jnp.where(dropped[:, None, None], nothing, states))
    vae = frozen["vae"]
    latents = divided(lambda pixels, keys: vae.encode(to_images(pixels), keys), batch["image"], latent_keys)
    ids = jnp.where(dropped[:, None], jnp.asarray(no_caption), batch["ids"])
    return latents, encode_prompts(frozen["text_encoder"], ids)


def loss(
    setting: Setting, params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of a batch, and the means of ``routing_of`` over its rows and sites.

    Everything random about an example comes from ``fold_in(key, position)``, so it depends neither on the step nor on
    the other rows of the batch.
    """
    fusion = unflatten(setting.fusion, params)
    frozen = dict(vae=setting.vae) | unflatten(setting.frozen, arrays)
    denoiser, text_encoder = fusion.assemble(
        frozen["unet"], frozen.get("text_encoder"), setting.schedule, setting.remat
    )
    keys = row_keys(key, batch["position"])
    latents, conditioning = latents_and_conditioning(
        frozen | dict(text_encoder=text_encoder), batch, keys, setting.caption_dropout, setting.no_caption
    )
    loss_keys = jax.vmap(lambda key: jax.random.split(key, 3)[2])(keys)  # the first two keys are used for the inputs

    def predict(x: Latents, t: Array) -> tuple[Latents, Any]:
        if isinstance(denoiser, HasPenalty):
            own_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(loss_keys)
            return denoiser.training_pass(x, t, conditioning, own_keys)
        prediction, maps = denoiser.with_maps(x, t, conditioning)
        return prediction, (maps, ())

    def penalty(aux: Any, target: Latents) -> Array:
        return denoiser.penalty(*aux, target, batch["position"])

    loss, (maps, _) = diffusion_loss(
        predict,
        setting.schedule,
        latents,
        loss_keys,
        min_snr_gamma=setting.min_snr_gamma,
        has_aux=True,
        penalty=penalty if isinstance(denoiser, HasPenalty) else None,
    )
    return loss, jax.tree.map(lambda of_sites: of_sites.mean((0, 1)), routing_of(maps))


def gradient(
    setting: Setting, params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Array]]:
    """Return ``loss`` over all devices' rows, and its gradient, from ``accumulate`` parts of the rows in turn."""
    # Each device differentiates its own copy of the parameters; the gradients are summed over the devices once.
    own, rows, parts = on_each_device(params), len(batch["position"]), setting.accumulate
    of_part = jax.value_and_grad(functools.partial(loss, setting), has_aux=True)
    if rows % parts:
        devices = f" on each of {row_shares()} devices" if row_shares() > 1 else ""
        raise InputError(f"train.accumulate={parts} does not divide the batch of {rows}{devices}")
    if parts == 1:
        measured, found = of_part(own, batch, arrays, key)
    else:
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, rows // parts, *leaf.shape[1:]), batch)
        shapes = jax.eval_shape(of_part, own, jax.tree.map(lambda leaf: leaf[0], split), arrays, key)
        zeros = on_each_device(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, of_part(own, part, arrays, key)), None), zeros, split
        )
        measured, found = jax.tree.map(lambda leaf: leaf / parts, total)
    return mean_over_devices(measured), jax.tree.map(lambda leaf: leaf / row_shares(), sum_over_devices(found))


def update(
    setting: Setting, state: State, batch: dict[str, Array], arrays: dict[str, Array], key: Array
) -> tuple[State, dict[str, Array]]:
    """Return the state after a step and its metrics: run ``gradient`` on every device, then the optimizer."""
    same, mesh = PartitionSpec(), setting.mesh
    specs = None if mesh is None else (same, batch_specs(batch), specs_of(arrays, mesh), same)
    of_devices = on_mesh(functools.partial(gradient, setting), mesh, specs, same, gradients=True)
    (loss, routing), found = of_devices(state["params"], batch, jax.lax.stop_gradient(arrays), key)
    updates, opt = setting.optimizer.update(found, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = dict(params=params, opt=opt, step=state["step"] + 1)
    if setting.ema:
        new["average"] = update_average(state["average"], params, state["step"], setting.ema)
    metrics = dict(
        loss=loss,
        gradient_norm=optax.tree.norm(found),
        parameter_norm=optax.tree.norm(params),
        update_norm=optax.tree.norm(updates),
        entropy=routing["entropy"],
    )
    return new, metrics | {f"weight_{i}": weight for i, weight in enumerate(routing["weights"])}


def make_train_step(
    fusion: Any,
    frozen: dict[str, Any],
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    *,
    caption_dropout: float,
    no_caption: Array,
    min_snr_gamma: float = 0.0,
    accumulate: int = 1,
    ema: float = 0.0,
    remat: Remat = "none",
    vae: VAE | None = None,
    mesh: Mesh | None = None,
) -> Callable[[State, dict[str, Array], dict[str, Any], Array], tuple[State, dict[str, Array]]]:
    """Return the jitted step ``(state, batch, flatten(frozen), key) -> (state, metrics)``; ``key`` is that of the run.

    Only the fusion is trained. Metrics: loss, norms of gradient, parameters and update, and over all
    sites and pixels the mean weight of each expert and the maps' entropy.

    Args:
        fusion: a TrainedFusion; only its structure is used, its leaves may be shapes.
        frozen: likewise only used for its structure; holds unet (a stack) and, unless batches are cached, text_encoder
            (a stack) and vae. Block weights cannot have cached batches, because they train the text encoder, too.
        vae: the VAE. Cached batches need its configuration only, so its leaves may be shapes.
        no_caption: token ids of the empty prompt ``[tokens]``, or for cached batches its text states ``[n, s, d]``.
        accumulate: the number of parts, processed one after another, of a batch; the same step in less memory.
        ema: decay of the parameters' average; 0 keeps none.
        remat: the ensemble's rematerialisation.
        mesh: the devices to spread experts and rows over. The arguments are then placed by ``spec_of`` and
            ``batch_specs``, and each device processes its share of every part of a batch.

    Raises:
        InputError: when traced with a batch that ``accumulate`` does not divide.
    """
    setting = Setting(
        fusion=shapes_of(fusion),
        frozen=shapes_of(frozen),
        optimizer=optimizer,
        schedule=schedule,
        caption_dropout=caption_dropout,
        no_caption=no_caption,
        min_snr_gamma=min_snr_gamma,
        accumulate=accumulate,
        ema=ema,
        remat=remat,
        vae=vae,
        mesh=mesh,
    )
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(update, setting), out_shardings=everywhere)
