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
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.data import HeldOut
from afa_jax.distillation.student import Student
from afa_jax.distillation.teacher import Teacher
from afa_jax.distillation.trajectories import Trajectories
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.files import partial_file, replace_text
from afa_jax.fusion.single import SingleExpert
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate
from afa_jax.training.validation import FILE, read_validation
from afa_jax.trees import stack, unflatten

NOISED, PATH = "noised", "path"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Fixed inputs and the teacher's prediction there.

    Attributes:
        x, t, ids: latents with noise ``[points, h, w, c]``, timesteps and prompts.
        target: the teacher's predictions; for the control, those that the data give.
        kind: NOISED for a noised picture, PATH for a point of the teacher's path, by point.
    """

    x: np.ndarray
    t: np.ndarray
    ids: np.ndarray
    target: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.t)


def noised_points(
    teacher: Teacher | None, schedule: NoiseSchedule, held_out: HeldOut, *, buckets: int, seed: int, batch: int
) -> Points:
    """Return each held-out pair with one noise and timestep in each of ``buckets`` equal parts of the schedule.

    Noises and timesteps are those of ``training.validation``.
    """
    pairs, total = len(held_out.latents), schedule.num_train_timesteps
    index = np.tile(np.arange(pairs), buckets)
    bucket = np.repeat(np.arange(buckets), pairs)
    t = ((bucket + (index + 0.5) / pairs) * total / buckets).astype(np.int32)

    @jax.jit
    def made(teacher: Any, latents: Array, ids: Array, t: Array, index: Array, bucket: Array) -> tuple[Array, Array]:
        root = jax.random.key(seed)
        keys = jax.vmap(lambda i, k: jax.random.fold_in(jax.random.fold_in(root, i), k))(index, bucket)
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        x = schedule.add_noise(latents, noise, t)
        return x, schedule.target(latents, noise, t) if teacher is None else teacher.predict(x, t, ids)

    parts = []
    for rows in _rows(len(t), batch):
        own = index[rows]
        parts.append(
            jax.device_get(made(teacher, held_out.latents[own], held_out.ids[own], t[rows], own, bucket[rows]))
        )
    x, target = (np.concatenate(arrays)[: len(t)] for arrays in zip(*parts, strict=True))
    return Points(x=x, t=t, ids=held_out.ids[index], target=target, kind=np.full(len(t), NOISED))


def path_points(trajectories: Trajectories, buckets: int) -> Points:
    """Return ``buckets`` points of each trajectory, evenly along it, with the conditional prediction."""
    count, steps = len(trajectories), len(trajectories.t)
    pictures = np.repeat(np.arange(count), buckets)
    chosen = np.tile(np.arange(buckets) * steps // buckets, count)
    rows = trajectories.rows(pictures, chosen)
    return Points(
        x=rows["path"],
        t=rows["path_t"],
        ids=trajectories.ids[pictures],
        target=rows["path_predictions"][:, 1],
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
    """

    def __init__(self, like: Student, points: Points, *, buckets: int, timesteps: int, batch: int):
        self.points, self.batch = points, batch
        self.edges = [bucket * timesteps // buckets for bucket in range(buckets + 1)]

        @jax.jit
        def errors(params: dict[str, Array], x: Array, t: Array, ids: Array, target: Array) -> Array:
            prediction, _ = unflatten(like, params).predict(x, t, ids)
            return jnp.square(prediction - target).mean((1, 2, 3))

        self._errors = errors

    def __call__(self, params: dict[str, Array]) -> dict[str, Any]:
        """Return ``distance``, the mean, and by kind of point ``distance_KIND`` and ``loss``, by range of timesteps."""
        points, parts = self.points, []
        for rows in _rows(len(points), self.batch):
            own = (points.x[rows], points.t[rows], points.ids[rows], points.target[rows])
            parts.append(np.asarray(self._errors(params, *own), np.float64))
        errors = np.concatenate(parts)[: len(points)]
        found: dict[str, Any] = {
            f"distance_{kind}": float(errors[points.kind == kind].mean()) for kind in np.unique(points.kind).tolist()
        }
        first = points.kind == (NOISED if (points.kind == NOISED).any() else PATH)
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
        unet, text_encoder = stack([student.unet]), stack([student.text_encoder])
        experts = dataclasses.replace(self.experts, unet=unet, text_encoder=text_encoder)
        denoiser = SingleExpert(experts=unet, index=0)
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


def _rows(count: int, batch: int) -> list[np.ndarray]:
    """Return the indices below ``count`` in batches of one size, the last padded with the last index."""
    return [np.minimum(np.arange(first, first + batch), count - 1) for first in range(0, count, batch)]
