"""The training step of a distillation: a student's prediction is drawn to its teacher's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.few_steps import FewSteps
from afa_jax.distillation.student import Student
from afa_jax.distillation.teacher import Teacher
from afa_jax.distillation.trajectories import strongest
from afa_jax.fusion.single import SingleExpert
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.unet import UNet
from afa_jax.training.losses import drop_captions
from afa_jax.training.optimizer import update_average
from afa_jax.trees import take, unflatten
from afa_jax.types import Latents, Timesteps, TokenIds

State = dict[str, Any]
"""As in ``training.model_step``: ``params``, ``opt``, ``step``, and with an EMA ``average``."""
_OF_ALL_ROWS = ("captions", "drop_keys", "teacher")
FEATURES = ("mid_block", "up_blocks")
"""The stages whose features are compared, by the beginnings of their names; the last stage is the prediction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The arguments with which a distillation's step is compiled.

    Attributes:
        student: a Student, whose leaves may be shapes.
        frozen: a Frozen, whose leaves may be shapes.
        schedule: the noise schedule of both.
        no_caption: the token ids of the empty prompt, ``[s]``.
        caption_dropout: the share of rows with the empty prompt, in place of their own; none if guidance is folded in.
        guidance: the range from which a guidance scale is drawn that the target has; None for the unguided prediction.
        styles: for each of the student's styles the index of the expert that teaches it, -1 for a style that the
            student had before; empty if it has one teacher.
        few: the steps of student and teacher, to learn to sample in few.
        features: the weight of the features' squared error, to the expert of the largest weight; 0 for none.
        min_snr_gamma, ema, accumulate, remat: as in ``make_model_step``.
    """

    student: Any
    frozen: Any
    optimizer: optax.GradientTransformation
    schedule: NoiseSchedule
    no_caption: Any
    caption_dropout: float
    guidance: tuple[float, float] | None = None
    styles: tuple[int, ...] = ()
    few: FewSteps | None = None
    features: float = 0.0
    min_snr_gamma: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    remat: bool = False


class Frozen(NamedTuple):
    """The networks that are not trained.

    Attributes:
        teacher: a Teacher; None for the control, whose target is the data's own noise.
        before: the Student of an earlier run, which teaches the styles that it had; None without.
    """

    teacher: Any = None
    before: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that the student sees, and its targets.

    Attributes:
        x, t: latents with noise, and timesteps.
        ids: prompts.
        target: the prediction to match.
        expert: the index of the expert whose features to match, ``[b]``; None without a weight on features.
        scale, style: the student's further inputs; None where it has none.
        weight: the weight of the squared error, ``[b]``; None for 1.
    """

    x: Latents
    t: Timesteps
    ids: TokenIds
    target: Latents
    expert: Any = None
    scale: Any = None
    style: Any = None
    weight: Any = None


def make_distil_step(
    setting: Setting,
) -> Callable[[State, Mapping[str, Any], Mapping[str, Any], Array], tuple[State, dict[str, Array]]]:
    """Return the jitted step ``(state, batch, flatten(frozen), key) -> (state, metrics)``.

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
        for name in _OF_ALL_ROWS:
            rows = batch.pop(name)
            batch |= {f"{name}.0": rows[: len(rows) - paths], f"{name}.1": rows[len(rows) - paths :]}
        split = jax.tree.map(lambda rows: rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1), batch)

        def joined(part: dict[str, Array]) -> dict[str, Array]:
            part = dict(part)
            for name in _OF_ALL_ROWS:
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
    frozen: Frozen = unflatten(setting.frozen, arrays)
    rows = jax.lax.stop_gradient(rows_of(setting, frozen, batch))
    prediction, stages = student.predict(rows.x, rows.t, rows.ids, rows.scale, rows.style, remat=setting.remat)
    errors = jnp.square(prediction - rows.target).mean((1, 2, 3))
    if rows.weight is not None:
        errors = errors * rows.weight
    elif setting.min_snr_gamma:
        errors = errors * setting.schedule.min_snr_weights(rows.t, setting.min_snr_gamma)
    total = errors.mean()
    if not setting.features or frozen.teacher is None:
        return total, dict(loss=total)
    own = [features for stage, features in stages if stage.name.startswith(FEATURES)]
    apart = features_error(own, jax.lax.stop_gradient(features_of(frozen.teacher, rows)), rows.expert >= 0)
    total = total + setting.features * apart
    return total, dict(loss=total, feature_error=apart)


def rows_of(setting: Setting, frozen: Frozen, batch: Mapping[str, Array]) -> Rows:
    """Return the student's rows of a batch: noised pictures first, then points of trajectories."""
    style, rate = None, 0.0 if setting.guidance else setting.caption_dropout
    chosen = batch["teacher"][0]
    if setting.styles:
        style = jax.nn.one_hot(batch["teacher"], len(setting.styles))
    ids = drop_captions(batch["captions"], setting.no_caption, rate, batch["drop_keys"])
    count = len(batch["latents"])
    parts = []
    if count:
        first = None if style is None else style[:count]
        parts.append(noised_rows(setting, frozen, chosen, batch["latents"], ids[:count], first, batch["noise_keys"]))
    if "path" in batch:
        paths = path_rows(setting, batch, ids[count:], None if style is None else style[count:])
        if setting.styles and setting.features:
            paths = dataclasses.replace(paths, expert=jnp.full_like(paths.t, jnp.asarray(setting.styles)[chosen]))
        parts.append(paths)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def path_rows(setting: Setting, batch: Mapping[str, Array], ids: TokenIds, style: Any) -> Rows:
    """Return points of trajectories, and the teacher's predictions, computed when they were made."""
    x, t, few = batch["path"], batch["path_t"], setting.few
    expert = batch["path_expert"] if setting.features else None
    u, c = batch["path_predictions"][:, 0], batch["path_predictions"][:, 1]
    if setting.guidance is None:
        dropped = (ids == jnp.asarray(setting.no_caption)).all(1)
        target = jnp.where(dropped[:, None, None, None], u, c)
        return Rows(x=x, t=t, ids=ids, target=target, expert=expert, style=style)
    scale, weight = batch["path_scale"], None
    if few is None:
        target = u + scale[:, None, None, None] * (c - u)
    else:
        target = few.target(x, batch["path_next"], batch["path_point"])
        weight = few.weights(batch["path_point"])
    return Rows(x=x, t=t, ids=ids, target=target, expert=expert, scale=scale, style=style, weight=weight)


def noised_rows(
    setting: Setting, frozen: Frozen, chosen: Array, latents: Latents, ids: TokenIds, style: Any, keys: Array
) -> Rows:
    """Return pictures with noise at uniformly random timesteps, and the teacher's predictions of them.

    Args:
        chosen: index of the style, where there are several teachers.
        style: weights of the styles ``[b, n]``, or None.
    """
    few, count = setting.few, setting.schedule.num_train_timesteps

    def draw(key: Array) -> tuple[Array, Array, Array]:
        point_key, noise_key = jax.random.split(key)
        point = jax.random.randint(point_key, (), 0, count if few is None else few.steps)
        noise = jax.random.normal(noise_key, latents.shape[1:], jnp.float32)
        return point, noise, jax.random.uniform(jax.random.fold_in(key, 1))

    point, noise, drawn = jax.vmap(draw)(keys)
    low, high = setting.guidance or (1.0, 1.0)
    scale = low + (high - low) * drawn
    return target_rows(setting, frozen, chosen, latents, noise, point, ids, scale, style)


def target_rows(
    setting: Setting,
    frozen: Frozen,
    chosen: Array,
    latents: Latents,
    noise: Latents,
    point: Array,
    ids: TokenIds,
    scales: Array,
    style: Any = None,
) -> Rows:
    """Return pictures with the given noise, and what the teacher predicts there.

    Args:
        chosen, style: as of noised_rows; without a style, it is that of ``chosen``.
        point: timesteps ``[b]``; in few steps, numbers of steps.
        scales: guidance scales ``[b]``, which have no effect unless guidance is folded in.
    """
    schedule, few, no_caption = setting.schedule, setting.few, jnp.asarray(setting.no_caption)
    teacher, before = frozen.teacher, frozen.before
    t = point if few is None else few.at(point, few.steps).t
    x = schedule.add_noise(latents, noise, t)
    scale, weight, expert = scales if setting.guidance else None, None, None
    if setting.styles:
        if style is None:
            style = jnp.broadcast_to(jax.nn.one_hot(chosen, len(setting.styles)), (len(t), len(setting.styles)))
        expert = jnp.broadcast_to(jnp.asarray(setting.styles)[chosen], t.shape)
        teacher = teacher.of(jnp.maximum(expert[0], 0))
    if teacher is None:
        target = schedule.target(latents, noise, t)
    elif few is not None:
        target = few.target(x, few.walk(teacher, x, point, ids, no_caption, scales), point)
        weight = few.weights(point)
    elif before is not None:
        assert expert is not None
        old = style[:, : len(before.steering.config.styles)]
        target = jax.lax.cond(
            expert[0] < 0,
            lambda: before.predict(x, t, ids, scale, old)[0],
            lambda: teacher.ask(x, t, ids, no_caption, scale)[0],
        )
    else:
        wanted = bool(setting.features) and not setting.styles
        target, maps = teacher.ask(x, t, ids, no_caption, scale, has_maps=wanted)
        expert = strongest(maps) if wanted else expert
    expert = expert if setting.features else None
    return Rows(x=x, t=t, ids=ids, target=target, expert=expert, scale=scale, style=style, weight=weight)


jax.tree_util.register_dataclass(Rows, data_fields=[field.name for field in dataclasses.fields(Rows)], meta_fields=[])


def features_of(teacher: Teacher, rows: Rows) -> list[Array]:
    """Return for each row the features of its expert, alone on its own prompt, at the stages of FEATURES.

    The experts run one after another, and a row keeps what its own one makes. Several teachers have one expert for all
    rows, which runs alone.
    """
    experts = teacher.denoiser.experts
    states = encode_prompts(teacher.text_encoder, rows.ids)

    def of_expert(unet: UNet, own: Any) -> list[Array]:
        stages = unet.features(rows.x, rows.t, own)
        return [features.astype(jnp.float32) for stage, features in stages if stage.name.startswith(FEATURES)]

    if isinstance(teacher.denoiser, SingleExpert):
        return of_expert(*take((experts, states), jnp.maximum(rows.expert[0], 0)))
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
