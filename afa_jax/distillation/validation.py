"""The distance of a student to its teacher, on pictures that training does not see."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from afa_jax.data.pictures import grid
from afa_jax.distillation.data import HeldOut
from afa_jax.distillation.step import Frozen, Setting, path_rows, target_rows
from afa_jax.distillation.student import Student
from afa_jax.distillation.trajectories import Trajectories
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.files import partial_file, replace_text
from afa_jax.methods.distilled import style_weights
from afa_jax.methods.options import SampleOptions
from afa_jax.models.steering import SteeringConfig
from afa_jax.sampling.generation import Request, generate
from afa_jax.training.validation import FILE, read_validation
from afa_jax.trees import unflatten

NOISED, PATH = "noised", "path"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Fixed inputs and the teacher's prediction there.

    Attributes:
        x, t, ids: latents with noise ``[points, h, w, c]``, timesteps and prompts.
        target: the teacher's predictions; for the control, those that the data give.
        scale: guidance scales; 1 for a student that takes none.
        teacher: index of the teacher.
        kind: NOISED for a noised picture, PATH for a point of the teacher's path, by point.
    """

    x: np.ndarray
    t: np.ndarray
    ids: np.ndarray
    target: np.ndarray
    scale: np.ndarray
    teacher: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.t)


def noised_points(
    setting: Setting, frozen: Frozen, held_out: HeldOut, number: int, *, buckets: int, seed: int, batch: int
) -> Points:
    """Return each held-out pair with one noise and timestep in each of ``buckets`` equal parts of the schedule.

    Noises and timesteps are those of ``training.validation``; a student of few steps has its own timesteps. Guidance
    scales are spread over their range.

    Args:
        number: the index of the teacher.
    """
    schedule, few = setting.schedule, setting.few
    pairs, total = len(held_out.latents), schedule.num_train_timesteps
    index = np.tile(np.arange(pairs), buckets)
    bucket = np.repeat(np.arange(buckets), pairs)
    place = (bucket + (index + 0.5) / pairs) / buckets
    point = (place * (total if few is None else few.steps)).astype(np.int32)
    low, high = setting.guidance or (1.0, 1.0)
    scale = (low + (high - low) * np.modf(np.arange(len(index)) * 0.6180339887)[0]).astype(np.float32)

    @jax.jit
    def made(
        frozen: Frozen, latents: Array, ids: Array, point: Array, scale: Array, index: Array, bucket: Array
    ) -> Any:
        root = jax.random.key(seed)
        keys = jax.vmap(lambda i, k: jax.random.fold_in(jax.random.fold_in(root, i), k))(index, bucket)
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        rows = target_rows(setting, frozen, jnp.asarray(number), latents, noise, point, ids, scale)
        return rows.x, rows.t, rows.target

    parts = []
    for rows in split_rows(len(point), batch):
        own = index[rows]
        arguments = (held_out.latents[own], held_out.ids[own], point[rows], scale[rows], own, bucket[rows])
        parts.append(jax.device_get(made(frozen, *arguments)))
    x, t, target = (np.concatenate(arrays)[: len(point)] for arrays in zip(*parts, strict=True))
    whole = dict(scale=scale, teacher=np.full(len(t), number), kind=np.full(len(t), NOISED))
    return Points(x=x, t=t, ids=held_out.ids[index], target=target, **whole)


def path_points(setting: Setting, trajectories: Trajectories, number: int, buckets: int) -> Points:
    """Return ``buckets`` points of each trajectory, evenly along it, with the student's targets.

    Args:
        number: the index of the teacher.
    """
    stride = 1 if setting.few is None else setting.few.stride
    count, steps = len(trajectories), len(trajectories.t) // stride
    pictures = np.repeat(np.arange(count), buckets)
    chosen = np.tile(np.arange(buckets) * steps // buckets, count)
    batch = trajectories.rows(pictures, chosen * stride, stride=stride) | dict(path_point=chosen.astype(np.int32))
    rows = jax.device_get(
        path_rows(setting, jax.tree.map(jnp.asarray, batch), jnp.asarray(trajectories.ids[pictures]), None)
    )
    return Points(
        x=rows.x,
        t=rows.t,
        ids=trajectories.ids[pictures],
        target=rows.target,
        scale=batch["path_scale"],
        teacher=np.full(len(pictures), number),
        kind=np.full(len(pictures), PATH),
    )


def join_points(parts: Sequence[Points]) -> Points:
    """Return all points as one."""
    names = [field.name for field in dataclasses.fields(Points)]
    return Points(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class Distance:
    """The mean squared distance of a student's predictions to its teacher's, by kind of point and timestep.

    Args:
        like: a Student, whose leaves may be shapes.
        names: the names of the teachers.
    """

    def __init__(
        self, like: Student, points: Points, names: Sequence[str], *, buckets: int, timesteps: int, batch: int
    ):
        self.points, self.names, self.batch = points, names, batch
        self.edges = [bucket * timesteps // buckets for bucket in range(buckets + 1)]

        @jax.jit
        def errors(params: dict[str, Array], *rows: Array) -> Array:
            x, t, ids, target, scale, teacher = rows
            student = unflatten(like, params)
            takes = SteeringConfig(width=0, time_width=0) if student.steering is None else student.steering.config
            style = jax.nn.one_hot(teacher, len(takes.styles)) if takes.styles else None
            prediction, _ = student.predict(x, t, ids, None if takes.guidance is None else scale, style)
            return jnp.square(prediction - target).mean((1, 2, 3))

        self._errors = errors

    def __call__(self, params: dict[str, Array]) -> dict[str, Any]:
        """Return the distances.

        They are ``distance``, the mean; ``distance_KIND`` by kind of point; ``distance_NAME`` by teacher, where there
        are several; and ``loss`` by range of timesteps.
        """
        points, parts = self.points, []
        for rows in split_rows(len(points), self.batch):
            inputs = (points.x, points.t, points.ids, points.target, points.scale, points.teacher)
            own = [values[rows] for values in inputs]
            parts.append(np.asarray(self._errors(params, *own), np.float64))
        errors = np.concatenate(parts)[: len(points)]
        found: dict[str, Any] = {
            f"distance_{kind}": float(errors[points.kind == kind].mean()) for kind in np.unique(points.kind).tolist()
        }
        first = points.kind == (NOISED if (points.kind == NOISED).any() else PATH)
        if len(self.names) > 1:
            for number, name in enumerate(self.names):
                found[f"distance_{name}"] = float(errors[first & (points.teacher == number)].mean())
        spans = {}
        for low, high in itertools.pairwise(self.edges):
            within = first & (low <= points.t) & (points.t < high)
            if within.any():
                spans[f"t{low}_{high}"] = float(errors[within].mean())
        return found | dict(distance=float(errors[first].mean()), loss=spans)


class Validation:
    """A callback that measures a student and writes ``validation.jsonl`` and ``samples/step_<step>.png``.

    Args:
        experts: the student's Experts, whose networks are replaced by the trained ones.
        every: steps between validations; an extra one where a run ended is dropped when the run is continued.
        prompts: the prompts to sample; each gets a row of pictures.
        options: sampling options for them; None samples none.
    """

    def __init__(
        self,
        workdir: Path,
        like: Student,
        distance: Distance,
        experts: Experts,
        *,
        every: int,
        seed: int = 0,
        prompts: Sequence[str] = (),
        num_images: int = 1,
        options: SampleOptions | None = None,
    ):
        self.workdir, self.like, self.distance, self.experts = workdir, like, distance, experts
        self.every, self.seed, self.prompts, self.num_images, self.options = every, seed, prompts, num_images, options

    def __call__(self, params: dict[str, Array], step: int) -> dict[str, Any]:
        """Measure, write, and return the values for the run's log: the distances, ``score`` and ``samples``."""
        found = self.distance(params)
        distances = {name: value for name, value in found.items() if name != "loss"}
        line = dict(step=step, extra=step % self.every != 0, experts=[], weights={}, entropy={}, **found)
        lines = read_validation(self.workdir, keep=True)
        lines = [old for old in lines if old["step"] < step and not old["extra"]]
        replace_text(self.workdir / FILE, "".join(json.dumps(one) + "\n" for one in [*lines, line]))
        named = {f"val_{name}": value for name, value in distances.items()}
        return dict(score=found["distance"], val_loss=found["distance"]) | named | self._sample(params, step)

    def _sample(self, params: dict[str, Array], step: int) -> dict[str, np.ndarray]:
        if not self.prompts or self.options is None:
            return {}
        student = unflatten(self.like, params)
        styles = () if student.steering is None else student.steering.config.styles
        weights = style_weights(None, styles)
        denoiser, experts = student.method(self.experts, None if weights is None else jnp.asarray(weights))
        requests = [Request(prompt=prompt, number=i) for prompt in self.prompts for i in range(self.num_images)]
        try:
            sampled = generate(requests, denoiser, experts, seed=self.seed, options=self.options)
            made = [picture.pixels for picture in sampled]
        except InputError as error:  # not finite: too high a guidance, say, which is no reason to end a run
            warnings.warn(f"no samples at step {step}: {error}", stacklevel=2)
            return {}
        pixels = grid([made[i : i + self.num_images] for i in range(0, len(made), self.num_images)])
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        with partial_file(folder / f"step_{step:08d}.png") as partial:
            Image.fromarray(pixels).save(partial, format="PNG")
        return dict(samples=pixels)


def split_rows(count: int, batch: int) -> list[np.ndarray]:
    """Return the indices below ``count`` in batches of one size, the last padded with the last index."""
    return [np.minimum(np.arange(first, first + batch), count - 1) for first in range(0, count, batch)]
