"""The data of a distillation: noised pictures, the teacher's paths, and held-out pictures to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afa_jax.data.loader import loading
from afa_jax.data.sources import PictureSource, make_source
from afa_jax.data.split import hold_out
from afa_jax.data.transform import Crop
from afa_jax.distillation.trajectories import Trajectories
from afa_jax.errors import InputError
from afa_jax.models.vae import VAE, to_images
from afa_jax.training.data import read_held_out
from afa_jax.training.model_step import rows_at
from afa_jax.training.pictures import check_count, encode_scenes
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The pictures of a config, to learn from and held out; none is read yet."""

    chosen: PictureSource
    held_out: PictureSource
    crop: Crop
    bad: str

    @property
    def identity(self) -> dict[str, Any]:
        """Return the facts that identify these pictures."""
        return dict(source=self.chosen.fingerprint, held_out=self.held_out.fingerprint, crop=list(self.crop.size))


def split_data(config: ConfigDict) -> Split:
    """Open the sources of ``data`` and ``validation``; without ``validation.data`` its pairs are held out of ``data``.

    Raises:
        InputError: a source cannot be used, or has too few pictures.
    """
    validation, options = config.validation, loading(config.data)
    source = make_source(config.data)
    chosen: PictureSource = source
    held_out: PictureSource
    if validation.get("data"):
        held_out = make_source(validation.data)
        if len(held_out) < validation.pairs:
            raise InputError(f"validation.pairs={validation.pairs}, but validation.data has {len(held_out)} examples")
    else:
        chosen, held_out = hold_out(source, validation.pairs, validation.seed)
    check_count(config.distil.scenes, chosen)
    crop = options["crop"] or Crop(source[0]["image"].shape[:2])
    return Split(chosen=chosen, held_out=held_out, crop=crop, bad=options["bad"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pictures and captions that training does not see: latents ``[pairs, h, w, c]`` and token ids ``[pairs, s]``."""

    latents: np.ndarray
    ids: np.ndarray


def encode_held_out(split: Split, count: int, vae: VAE, tokenizer: Tokenizer, batch: int) -> HeldOut:
    """Encode the first ``count`` readable held-out pictures; raise InputError if there is none."""
    (images, captions), _ = read_held_out(split.held_out, split.crop, tokenizer, count, split.bad == "skip")
    encode = jax.jit(lambda vae, pixels: vae.encode(to_images(pixels)))
    parts = []
    for first in range(0, len(images), batch):
        rows = np.minimum(np.arange(first, first + batch), len(images) - 1)
        parts.append(np.asarray(encode(vae, images[rows])))
    return HeldOut(latents=np.concatenate(parts)[: len(images)], ids=tokenizer(captions, quiet=True))


def encode_pictures(split: Split, count: int, vae: VAE, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, np.ndarray]:
    """Return latents and token ids of the pictures to learn from, as encode_scenes."""
    return encode_scenes(split.chosen, count, vae, tokenizer, mesh, crop=split.crop, bad=split.bad)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch of each step, a pure function of its number and the seed.

    A batch has ``latents`` ``[r, h, w, c]`` to be noised and, if there are trajectories, points of these. ``captions``
    are the token ids of all rows, in this order.

    Attributes:
        pictures: ``latents`` and ``ids`` of the data.
        trajectories: each teacher's paths, where there are any.
        teachers: the number of teachers, one of which teaches a whole batch.
        size: the number of rows of a batch.
        on_path: the number of rows that are points of trajectories.
        painted_from: the first step whose noised pictures are the teacher's, not the data's.
        stride: the steps of a trajectory between two points.
        seed: the seed of the order.
    """

    pictures: dict[str, np.ndarray]
    trajectories: Sequence[Trajectories]
    size: int
    on_path: int
    painted_from: int
    seed: int
    stride: int = 1
    teachers: int = 1

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of a step, the first of which is 0."""
        noised = self.size - self.on_path
        batch: dict[str, np.ndarray] = {}
        teacher = int(np.random.default_rng((self.seed, step, 1)).integers(self.teachers))
        paths = self.trajectories[teacher] if self.trajectories else None
        if not noised:
            batch["latents"], captions = self.pictures["latents"][:0], self.pictures["ids"][:0]
        elif paths is not None and step >= self.painted_from:
            rows = rows_at(step, noised, len(paths), self.seed + 1)
            batch["latents"], captions = paths.painted(rows), paths.ids[rows]
        else:
            rows = rows_at(step, noised, len(self.pictures["ids"]), self.seed)
            batch["latents"], captions = self.pictures["latents"][rows], self.pictures["ids"][rows]
        if paths is not None and self.on_path:
            chosen = rows_at(step, self.on_path, len(paths), self.seed + 2)
            points = np.random.default_rng((self.seed, step)).integers(len(paths.t) // self.stride, size=self.on_path)
            batch |= paths.rows(chosen, points * self.stride, stride=self.stride)
            batch["path_point"] = points.astype(np.int32)
            captions = np.concatenate([captions, paths.ids[chosen]])
        return batch | dict(captions=captions, teacher=np.full(self.size, teacher, np.int32))
