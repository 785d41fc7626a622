"""The training step of a distillation: a student's prediction is drawn to its teacher's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.student import Student
from afa_jax.distillation.teacher import Teacher
from afa_jax.distillation.trajectories import strongest
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.unet import UNet
from afa_jax.training.losses import drop_captions
from afa_jax.training.optimizer import update_average
from afa_jax.trees import unflatten
from afa_jax.types import Latents, Timesteps, TokenIds

State = dict[str, Any]
"""As in ``training.model_step``: ``params``, ``opt``, ``step``, and with an EMA ``average``."""
FEATURES = ("mid_block", "up_blocks")
"""The stages whose features are compared, by the beginnings of their names; the last stage is the prediction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The arguments with which a distillation's step is compiled.

    Attributes:
        student: a Student, whose leaves may be shapes.
        teacher: a Teacher, whose leaves may be shapes; None for the control, whose target is the data's own noise.
        schedule: the noise schedule of both.
        no_caption: the token ids of the empty prompt, ``[s]``.
        caption_dropout: the share of rows with the empty prompt, in place of their own.
        features: the weight of the features' squared error, to the expert of the largest weight; 0 for none.
        min_snr_gamma, ema, accumulate, remat: as in ``make_model_step``.
    """

    student: Any
    teacher: Any
    optimizer: optax.GradientTransformation
    schedule: NoiseSchedule
    no_caption: Any
    caption_dropout: float
    features: float = 0.0
    min_snr_gamma: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that the student sees, and its targets.

    Attributes:
        x, t: latents with noise, and timesteps.
        ids: prompts.
        target: the prediction to match.
        expert: the index of the expert whose features to match, ``[b]``; None without a weight on features.
    """

    x: Latents
    t: Timesteps
    ids: TokenIds
    target: Latents
    expert: Any = None


def make_distil_step(
    setting: Setting,
) -> Callable[[State, Mapping[str, Any], Mapping[str, Any], Array], tuple[State, dict[str, Array]]]:
    """Return the jitted step ``(state, batch, flatten(teacher), key) -> (state, metrics)``.

    It reuses (donates) the state's memory. A batch is as ``Batches`` makes it. Metrics are the loss, the norm of the
    gradient and, where the features are compared, their squared error.
    """

    def of_part(params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array]) -> Any:
        return loss(setting, unflatten(setting.student, params), batch, arrays)

    gradient_of = jax.value_and_grad(of_part, has_aux=True)

    def gradient(params: dict[str, Array], batch: dict[str, Array], arrays: dict[str, Array]) -> Any:
        parts = setting.accumulate
        if parts == 1:
            return gradient_of(params, batch, arrays)
        # Captions are of two kinds of rows, of which each part has its share.
        paths = len(batch.get("path_t", ()))
        batch = dict(batch)
        for name in ("captions", "drop_keys"):
            rows = batch.pop(name)
            batch |= {f"{name}.0": rows[: len(rows) - paths], f"{name}.1": rows[len(rows) - paths :]}
        split = jax.tree.map(lambda rows: rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1), batch)

        def joined(part: dict[str, Array]) -> dict[str, Array]:
            part = dict(part)
            for name in ("captions", "drop_keys"):
                part[name] = jnp.concatenate([part.pop(f"{name}.0"), part.pop(f"{name}.1")])
            return part

        def add(total: Any, part: dict[str, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(params, joined(part), arrays)), None

        first = jax.tree.map(lambda rows: rows[0], split)
        shapes = jax.eval_shape(gradient_of, params, jax.eval_shape(joined, first), arrays)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, split)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    def step(
        state: State, batch: Mapping[str, Any], arrays: Mapping[str, Any], key: Array
    ) -> tuple[State, dict[str, Array]]:
        drop, noise = jax.random.split(key)
        keys = dict(
            drop_keys=jax.random.split(drop, len(batch["captions"])),
            noise_keys=jax.random.split(noise, len(batch["latents"])),
        )
        (_, metrics), found = gradient(state["params"], dict(batch) | keys, dict(arrays))
        updates, opt = setting.optimizer.update(found, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = dict(params=params, opt=opt, step=state["step"] + 1)
        if setting.ema:
            new["average"] = update_average(state["average"], params, state["step"], setting.ema)
        return new, metrics | dict(gradient_norm=optax.tree.norm(found))

    return jax.jit(step, donate_argnums=0)


def loss(
    setting: Setting, student: Student, batch: Mapping[str, Array], arrays: Mapping[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of a batch, float32, and its metrics: ``|student - teacher|^2``, and the features' part.

    DMM (arXiv 2504.12364) has both parts, with a weight of 1e-3 on the features.
    """
    teacher = None if setting.teacher is None else unflatten(setting.teacher, arrays)
    rows = jax.lax.stop_gradient(rows_of(setting, teacher, batch))
    prediction, stages = student.predict(rows.x, rows.t, rows.ids, remat=setting.remat)
    errors = jnp.square(prediction - rows.target).mean((1, 2, 3))
    if setting.min_snr_gamma:
        errors = errors * setting.schedule.min_snr_weights(rows.t, setting.min_snr_gamma)
    total = errors.mean()
    if not setting.features or teacher is None:
        return total, dict(loss=total)
    own = [features for stage, features in stages if stage.name.startswith(FEATURES)]
    apart = features_error(own, jax.lax.stop_gradient(features_of(teacher, rows)), rows.expert >= 0)
    total = total + setting.features * apart
    return total, dict(loss=total, feature_error=apart)


def rows_of(setting: Setting, teacher: Teacher | None, batch: Mapping[str, Array]) -> Rows:
    """Return the student's rows of a batch: noised pictures first, then points of trajectories."""
    ids = drop_captions(batch["captions"], setting.no_caption, setting.caption_dropout, batch["drop_keys"])
    count = len(batch["latents"])
    parts = [noised_rows(setting, teacher, batch["latents"], ids[:count], batch["noise_keys"])] if count else []
    if "path" not in batch:
        return parts[0]
    dropped = (ids[count:] == jnp.asarray(setting.no_caption)).all(1)
    u, c = batch["path_predictions"][:, 0], batch["path_predictions"][:, 1]
    paths = Rows(
        x=batch["path"],
        t=batch["path_t"],
        ids=ids[count:],
        target=jnp.where(dropped[:, None, None, None], u, c),
        expert=batch["path_expert"] if setting.features else None,
    )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts, paths)


def noised_rows(setting: Setting, teacher: Teacher | None, latents: Latents, ids: TokenIds, keys: Array) -> Rows:
    """Return pictures with noise at uniformly random timesteps, and the teacher's predictions of them."""
    schedule = setting.schedule

    def draw(key: Array) -> tuple[Array, Array]:
        t_key, noise_key = jax.random.split(key)
        t = jax.random.randint(t_key, (), 0, schedule.num_train_timesteps)
        return t, jax.random.normal(noise_key, latents.shape[1:], jnp.float32)

    t, noise = jax.vmap(draw)(keys)
    x, expert = schedule.add_noise(latents, noise, t), None
    if teacher is None:
        target = schedule.target(latents, noise, t)
    elif setting.features:
        target, maps = teacher.denoiser.with_maps(x, t, encode_prompts(teacher.text_encoder, ids))
        expert = strongest(maps)
    else:
        target = teacher.predict(x, t, ids)
    return Rows(x=x, t=t, ids=ids, target=target, expert=expert)


jax.tree_util.register_dataclass(Rows, data_fields=["x", "t", "ids", "target", "expert"], meta_fields=[])


def features_of(teacher: Teacher, rows: Rows) -> list[Array]:
    """Return for each row the features of its expert, alone on its own prompt, at the stages of FEATURES.

    The experts run one after another, and a row keeps what its own one makes.
    """
    experts = teacher.denoiser.experts
    states = encode_prompts(teacher.text_encoder, rows.ids)

    def of_expert(unet: UNet, own: Any) -> list[Array]:
        stages = unet.features(rows.x, rows.t, own)
        return [features.astype(jnp.float32) for stage, features in stages if stage.name.startswith(FEATURES)]

    shapes = jax.eval_shape(lambda: of_expert(*jax.tree.map(lambda leaf: leaf[0], (experts, states))))

    def add(total: list[Array], one: tuple[Any, Any, Array]) -> tuple[list[Array], None]:
        unet, own, number = one
        mine = (rows.expert == number)[:, None, None, None]
        return [jnp.where(mine, new, old) for new, old in zip(of_expert(unet, own), total, strict=True)], None

    zeros = [jnp.zeros(shape.shape, jnp.float32) for shape in shapes]
    numbers = jnp.arange(len(jax.tree.leaves(states)[0]))
    return jax.lax.scan(add, zeros, (experts, states, numbers))[0]


def features_error(own: list[Array], wanted: list[Array], counted: Array) -> Array:
    """Return the mean squared difference of features, the mean over the stages, float32.

    Args:
        counted: ``[b]``, the rows that have an expert; the others count as 0.
    """
    apart = [
        jnp.square(one.astype(jnp.float32) - other).mean((1, 2, 3)) for one, other in zip(own, wanted, strict=True)
    ]
    return (jnp.stack(apart).mean(0) * counted).mean()
