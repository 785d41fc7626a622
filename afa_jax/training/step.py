"""The training step of a fusion, AFA's aggregators or a rival's: only the fusion changes.

Its parameters and the frozen parts cross the jitted step as flat dictionaries: a tree of modules takes Python 12 ms to
take apart and put together, at every step.
"""

from __future__ import annotations

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
from afa_jax.fusion.ensemble import Remat
from afa_jax.fusion.kinds import Fusion, assemble
from afa_jax.fusion.routing import routing_of
from afa_jax.mesh.collectives import mean_over_devices, on_each_device, row_shares, sum_over_devices
from afa_jax.mesh.parallel import EXPERT, ROWS, Mode, on_mesh, specs_of
from afa_jax.models.vae import VAE
from afa_jax.training.inputs import latents_and_states, row_keys
from afa_jax.training.loss import diffusion_loss
from afa_jax.training.optimizer import update_average
from afa_jax.trees import flatten, shapes_of, unflatten

State = dict[str, Any]
"""``params`` (the fusion's arrays by dotted path), ``opt`` (optimizer state), ``step``, and where it is asked for
``average`` (of the parameters)."""


def init_state(fusion: Fusion, optimizer: optax.GradientTransformation, *, average: bool = False) -> State:
    """The state before the first step."""
    params = flatten(fusion)
    state = dict(params=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))
    return state | dict(average=params) if average else state


def published(state: State) -> dict[str, Array]:
    """The parameters to sample with: the average if the run keeps one."""
    return state["average"] if "average" in state else state["params"]


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """How the arrays of a batch are split: all by rows, a cache's text states also by the experts that they are of."""
    return {name: PartitionSpec(ROWS, EXPERT) if name == "states" else PartitionSpec(ROWS) for name in batch}


def make_train_step(
    fusion: Fusion,
    frozen: dict[str, Any],
    optimizer: optax.GradientTransformation,
    schedule: NoiseSchedule,
    *,
    caption_dropout: float,
    no_caption: Array,
    min_snr_gamma: float = 0.0,
    accumulate: int = 1,
    ema: float = 0.0,
    mode: Mode | None = None,
    remat: Remat = "none",
    vae: VAE | None = None,
    mesh: Mesh | None = None,
) -> Callable[[State, dict[str, Array], dict[str, Any], Array], tuple[State, dict[str, Array]]]:
    """The jitted step ``(state, batch, flatten(frozen), key) -> (state, metrics)``; ``key`` is that of the run.

    Gradient and optimizer see the fusion only. All that is random about an example comes from
    ``fold_in(key, position)``, so it depends neither on the step nor on the batch-mates. Metrics: loss, norms of
    gradient, parameters and update, and over all sites and pixels the mean weight of each expert and the maps' entropy.

    Args:
        fusion: only its structure is used; its leaves may be shapes.
        frozen: likewise; holds unet (a stack) and, unless batches are cached, text_encoder (a stack) and vae. Block
            weights cannot have cached batches: the text encoder is theirs.
        vae: for cached batches, which need its configuration only; its leaves may be shapes.
        no_caption: token ids of the empty prompt ``[tokens]``, or for cached batches its text states ``[n, s, d]``.
        accumulate: parts that a batch is worked on in, one after another; the same step in less memory.
        ema: decay of the parameters' average; 0 keeps none.
        remat: of the ensemble.
        mesh: the devices to spread experts and rows over; the arguments are then placed as ``spec_of`` and
            ``batch_specs`` say, and each device works at its part of every part of ``accumulate``.

    Raises:
        InputError: when traced with a batch that ``accumulate`` does not divide.
    """
    like_fusion, like_frozen = shapes_of(fusion), shapes_of(frozen)

    def loss_of(params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array) -> Any:
        fusion, frozen = unflatten(like_fusion, params), dict(vae=vae) | unflatten(like_frozen, arrays)
        denoiser, text_encoder = assemble(fusion, frozen["unet"], frozen.get("text_encoder"), mode=mode, remat=remat)
        frozen = frozen | dict(text_encoder=text_encoder)
        keys = row_keys(key, batch["position"])
        latents, states = latents_and_states(frozen, batch, keys, caption_dropout, no_caption, mode)
        routing: list[dict[str, Array]] = []

        def predict(x: Array, t: Array) -> Array:
            prediction, maps = denoiser.with_maps(x, t, states)
            routing.append(jax.tree.map(lambda site: site.mean(0), routing_of(maps)))
            return prediction

        loss_keys = jax.vmap(lambda key: jax.random.split(key, 3)[2])(keys)  # the first two are spent on the inputs
        loss = diffusion_loss(predict, schedule, latents, loss_keys, min_snr_gamma=min_snr_gamma)
        return loss, jax.tree.map(lambda sites: sites.mean(0), routing[0])

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def accumulated(params: dict[str, Array], batch: dict[str, Array], *rest: Any) -> Any:
        size = len(batch["position"])
        if size % accumulate:
            devices = f" on each of {row_shares()} devices" if row_shares() > 1 else ""
            raise InputError(f"train.accumulate={accumulate} does not divide the batch of {size}{devices}")
        parts = jax.tree.map(lambda rows: rows.reshape(accumulate, size // accumulate, *rows.shape[1:]), batch)

        def add(total: Any, part: dict[str, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(params, part, *rest)), None

        shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda rows: rows[0], parts), *rest)
        zeros = on_each_device(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def of_a_device(
        params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array
    ) -> tuple[tuple[Array, dict[str, Array]], dict[str, Array]]:
        # Each device differentiates its own copy of the parameters, and what all of them found is summed once.
        own = on_each_device(params)
        measured, gradient = (accumulated if accumulate > 1 else gradient_of)(own, batch, arrays, key)
        return mean_over_devices(measured), jax.tree.map(lambda leaf: leaf / row_shares(), sum_over_devices(gradient))

    def loss_and_gradient(
        params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array], key: Array
    ) -> tuple[tuple[Array, dict[str, Array]], dict[str, Array]]:
        same = PartitionSpec()
        specs = None if mesh is None else (same, batch_specs(batch), specs_of(arrays, mesh), same)
        return on_mesh(of_a_device, mesh, specs, same, gradients=True)(params, batch, arrays, key)

    @functools.partial(jax.jit, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))
    def train_step(
        state: State, batch: dict[str, Array], arrays: dict[str, Array], key: Array
    ) -> tuple[State, dict[str, Array]]:
        arrays = jax.lax.stop_gradient(arrays)
        (loss, routing), gradient = loss_and_gradient(state["params"], batch, arrays, key)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = dict(params=params, opt=opt, step=state["step"] + 1)
        if ema:
            new["average"] = update_average(state["average"], params, state["step"], ema)
        metrics = dict(
            loss=loss,
            gradient_norm=optax.tree.norm(gradient),
            parameter_norm=optax.tree.norm(params),
            update_norm=optax.tree.norm(updates),
            entropy=routing["entropy"],
        )
        return new, metrics | {f"weight_{i}": weight for i, weight in enumerate(routing["weights"])}

    return train_step
