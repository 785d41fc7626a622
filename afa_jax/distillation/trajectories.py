"""The teacher's own paths from noise to a picture, made once and kept on disk.

A student that has seen noised data only meets, when it samples, latents that no data gave: its own. The teacher's paths
are close to them (as in Salimans and Ho 2022, arXiv 2202.00512, and Luhman and Luhman 2021, arXiv 2101.02388), and
the teacher's predictions on them are computed only once, not in every epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.teacher import Teacher
from afa_jax.errors import InputError, NotFinite
from afa_jax.files import partial_file, writing
from afa_jax.fusion.afa import routing_of
from afa_jax.models.conditioning import encode_prompts, join_rows
from afa_jax.progress import progress
from afa_jax.records import record_text

SHARD = 64
"""The number of pictures of a shard; a shard is complete or absent."""
_VERSION = 1  # of the numbers in a shard; raise it when the same settings give others
_PARTS = ("states", "predictions", "experts")  # the last one is written last
_LARGEST = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The facts on which trajectories depend besides the prompts.

    Attributes:
        teacher: the record of the teacher's method.
        vae: the VAE's hash.
        schedule: the noise schedule's fields.
        count: the number of trajectories, one a prompt.
        steps: the number of DDIM's steps.
        guidance: the range from which each trajectory's guidance scale is drawn.
        seed: the seed of noises and scales.
        size: rows and columns of the latents, and their channels.
    """

    teacher: Mapping[str, Any]
    vae: str
    schedule: Mapping[str, Any]
    count: int
    steps: int
    guidance: tuple[float, float]
    seed: int
    size: tuple[int, int, int]

    def key(self, ids: np.ndarray) -> str:
        """Return the name of the folder that holds these trajectories of prompts ``[count, s]``."""
        digest = hashlib.sha256(record_text([_VERSION, dataclasses.asdict(self)]).encode())
        digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
        return digest.hexdigest()[:16]

    @property
    def scales(self) -> np.ndarray:
        """Return each trajectory's guidance scale, float32 ``[count]``."""
        low, high = self.guidance
        drawn = np.random.default_rng((self.seed, 1)).random(self.count)
        return (low + (high - low) * drawn).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Paths of the teacher, in float16 arrays that are read from disk when they are used.

    Attributes:
        t: the timesteps of the steps, int32 ``[steps]``.
        ids: prompts, ``[count, s]``.
        scales: guidance scales, ``[count]``.
        states: by shard, latents before each step and after the last, ``[pictures, steps + 1, h, w, c]``.
        predictions: by shard, unconditional and conditional, ``[pictures, steps, 2, h, w, c]``. Both are the guided
            one of a teacher that has no others.
        experts: index of the expert of the largest weight at each step, ``[count, steps]``; -1 without maps.
    """

    t: np.ndarray
    ids: np.ndarray
    scales: np.ndarray
    states: list[np.ndarray]
    predictions: list[np.ndarray]
    experts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, pictures: np.ndarray, steps: np.ndarray, *, stride: int = 1) -> dict[str, np.ndarray]:
        """Return latents, predictions and the other facts at one step of each of some pictures.

        Args:
            stride: the number of steps from these latents to ``path_next``.
        """
        places = list(zip(*np.divmod(pictures, SHARD), steps, strict=True))
        predictions = np.stack([self.predictions[shard][row, step] for shard, row, step in places])
        return dict(
            path=np.stack([self.states[shard][row, step] for shard, row, step in places]).astype(np.float32),
            path_next=np.stack([self.states[shard][row, step + stride] for shard, row, step in places]).astype(
                np.float32
            ),
            path_t=self.t[steps],
            path_predictions=predictions.astype(np.float32),
            path_scale=self.scales[pictures],
            path_expert=self.experts[pictures, steps].astype(np.int32),
        )

    def painted(self, pictures: np.ndarray) -> np.ndarray:
        """Return the clean latents at which trajectories end, float32 ``[b, h, w, c]``."""
        return np.stack([self.states[i // SHARD][i % SHARD, -1] for i in pictures]).astype(np.float32)


def make_trajectories(
    folder: Path,
    settings: Settings,
    teacher: Teacher,
    schedule: NoiseSchedule,
    ids: np.ndarray,
    no_caption: np.ndarray,
    *,
    batch: int,
    quiet: bool = False,
) -> Trajectories:
    """Return the teacher's trajectories, read from ``folder``, or else made and kept there.

    A start that was killed goes on with the shard that it was at. ``settings.json`` beside the shards says what they
    are.

    Args:
        ids: token ids of the prompts, ``[count, s]``.
        no_caption: those of the empty prompt, ``[s]``.
        batch: pictures at once.

    Raises:
        InputError: the folder cannot be written.
        NotFinite: a trajectory is not finite, or beyond float16.
    """
    place, count = folder / settings.key(ids), settings.count
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    described = place / "settings.json"
    if not described.is_file():
        with partial_file(described) as partial:
            partial.write_text(record_text(dataclasses.asdict(settings)))
    sampler = DDIM(schedule=schedule)
    constants = sampler.constants(settings.steps)
    run = jax.jit(functools.partial(_sample, sampler=sampler, constants=constants, no_caption=jnp.asarray(no_caption)))
    shards = range(-(-count // SHARD))
    missing = [shard for shard in shards if not _file(place, shard, _PARTS[-1]).is_file()]
    for shard in progress(missing, desc=f"trajectories of {SHARD}", quiet=quiet or not missing):
        made: list[Any] = []
        rows = np.arange(shard * SHARD, min((shard + 1) * SHARD, count))
        for first in range(0, len(rows), batch):
            own = rows[np.minimum(np.arange(first, first + batch), len(rows) - 1)]
            noise = image_noise(jax.random.key(settings.seed), jnp.asarray(own), settings.size)
            made.append(jax.device_get(run(teacher, noise, jnp.asarray(ids[own]), jnp.asarray(settings.scales[own]))))
        for index, part in enumerate(_PARTS):
            values = np.concatenate([arrays[index] for arrays in made])[: len(rows)]
            if part != _PARTS[-1] and not np.abs(values).max() <= _LARGEST:
                raise NotFinite(
                    f"distil.teacher: a trajectory of shard {shard} is not finite, or beyond float16; choose a lower "
                    "distil.trajectories.guidance"
                )
            kept = values.astype(np.float16) if part != _PARTS[-1] else values.astype(np.int16)
            with partial_file(_file(place, shard, part)) as partial, open(partial, "wb") as file:
                np.save(file, kept)
                file.flush()
                os.fsync(file.fileno())

    def read(part: str) -> list[np.ndarray]:
        return [_read(_file(place, shard, part)) for shard in shards]

    return Trajectories(
        t=np.asarray(constants.t, np.int32),
        ids=ids,
        scales=settings.scales,
        states=read("states"),
        predictions=read("predictions"),
        experts=np.concatenate(read("experts")),
    )


def _file(place: Path, shard: int, part: str) -> Path:
    return place / f"{shard:05d}.{part}.npy"


def _read(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and it is made again") from error
    return array


def _sample(
    teacher: Teacher, noise: Array, ids: Array, scale: Array, *, sampler: DDIM, constants: Any, no_caption: Array
) -> tuple[Array, Array, Array]:
    """Return states, predictions and experts of rows, as Trajectories has them, from their starting noise."""
    count, denoiser = len(ids), teacher.denoiser
    conditional = encode_prompts(teacher.text_encoder, ids)
    unconditional = encode_prompts(teacher.text_encoder, jnp.broadcast_to(no_caption, ids.shape))
    scales = scale[:, None, None, None]

    def step(carry: tuple[Array, Any], k: Any) -> tuple[tuple[Array, Any], tuple[Array, Array, Array]]:
        x, memory = carry
        t, experts = jnp.broadcast_to(k.t, count), jnp.full(count, -1)
        if teacher.on_path:
            mixed, following = denoiser.guided(x, t, conditional, unconditional, scales, memory)
            if teacher.is_guided:
                u = c = mixed
            else:  # guidance is linear in the scale, and the scale 0 leaves the unconditional prediction
                u, _ = denoiser.guided(x, t, conditional, unconditional, jnp.zeros_like(scales), memory)
                c = u + (mixed - u) / scales
            memory = following
        else:
            whole = (jnp.concatenate([x, x]), jnp.concatenate([t, t]), join_rows(unconditional, conditional))
            if teacher.has_maps:
                prediction, maps = denoiser.with_maps(*whole)
                experts = strongest(jax.tree.map(lambda site: site[:, count:], maps))
            else:
                prediction = denoiser(*whole)
            u, c = jnp.split(prediction, 2)
            mixed = u + scales * (c - u)
        following, _ = sampler.step(k, x, mixed, (), None)
        return (following, memory), (x, jnp.stack([u, c], 1), experts)

    start = denoiser.start(noise) if teacher.on_path else ()
    (last, _), (states, predictions, experts) = jax.lax.scan(step, (noise, start), constants)
    states = jnp.concatenate([states, last[None]])
    return jnp.moveaxis(states, 0, 1), jnp.moveaxis(predictions, 0, 1), jnp.moveaxis(experts, 0, 1)


def strongest(maps: Any) -> Array:
    """Return the index of the expert of the largest weight in each row, over all sites and pixels, ``[b]``."""
    return routing_of(maps)["weights"].mean(1).argmax(-1)
