"""Validation on fixed pairs, noises and timesteps: the loss, and each expert's weight by site and timestep."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from afa_jax.data.pictures import grid
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts, with_fusion
from afa_jax.files import partial_file, replace_text
from afa_jax.fusion.afa import routing_of
from afa_jax.json_files import read_lines
from afa_jax.mesh.collectives import DATA, EXPERT, FSDP, ROWS, on_mesh
from afa_jax.mesh.parallel import place, specs_of
from afa_jax.mesh.processes import compiled_together, is_process_0, runs_on_process_0
from afa_jax.methods.options import SampleOptions
from afa_jax.models.conditioning import Conditioning, encode_prompts
from afa_jax.models.vae import to_images
from afa_jax.sampling.generation import Request, generate
from afa_jax.training.losses import squared_errors
from afa_jax.trees import shapes_of, unflatten

FILE = "validation.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Encoded pictures and captions that training does not see.

    Attributes:
        latents: ``[pairs, h, w, c]``, the posterior's means, scaled.
        states: ``[pairs, n, s, d]``, the experts' text states.
        ids: ``[pairs, s]``, the captions' tokens, for a fusion that has a text encoder of its own.
    """

    latents: Array
    states: Array
    ids: Array

    @staticmethod
    def encode(experts: Experts, images: np.ndarray, captions: Sequence[str], batch: int) -> Pairs:
        """Encode uint8 pictures ``[pairs, rows, columns, 3]`` and their captions, ``batch`` at a time."""
        ids = experts.tokenizer(captions, quiet=True)

        @jax.jit
        def encode(vae: Any, text_encoder: Any, pixels: Array, ids: Array) -> tuple[Array, Array]:
            return vae.encode(to_images(pixels)), jnp.moveaxis(encode_prompts(text_encoder, ids).text, 0, 1)

        parts = [
            encode(experts.vae, experts.text_encoder, images[rows], ids[rows]) for rows in _rows(len(images), batch)
        ]
        latents, states = (jnp.concatenate(leaves)[: len(images)] for leaves in zip(*parts, strict=True))
        return Pairs(latents=latents, states=states, ids=jnp.asarray(ids))


class Validation:
    """A callback that measures a fusion on ``pairs`` and writes ``validation.jsonl`` and ``samples/step_<step>.png``.

    Each pair gets one noise in every timestep bucket, drawn from ``fold_in(fold_in(key(seed), pair), bucket)``, and its
    own timestep in the bucket. Both are the same in every validation, so that small differences show.

    Args:
        like: the fusion, or its shapes.
        every: steps between validations; an extra one where a run ended is dropped when the run is continued.
        buckets: the number of equal parts of the schedule.
        prompts: the prompts to sample; each gets a row of pictures.
        options: sampling options for them.
    """

    def __init__(
        self,
        workdir: Path,
        experts: Experts,
        like: Any,
        pairs: Pairs,
        *,
        every: int = 1,
        buckets: int = 4,
        batch: int = 8,
        seed: int = 0,
        prompts: Sequence[str] = (),
        num_images: int = 2,
        options: SampleOptions | None = None,
    ):
        self.workdir, self.experts, self.pairs = workdir, experts, pairs
        self.every, self.buckets, self.batch, self.seed = every, buckets, batch, seed
        self.prompts, self.num_images, self.options = prompts, num_images, options
        self._like = shapes_of(like)
        self._sites = like.site_names(experts.unet)
        # The experts' parts that a step needs: text encoders only if they are merged.
        self._frozen = (experts.unet, experts.text_encoder if like.merges else None)
        schedule, total = experts.schedule, experts.schedule.num_train_timesteps

        mesh = experts.mesh
        if mesh is not None:  # every device has rows
            devices = mesh.shape[DATA] * mesh.shape[FSDP]
            self.batch = -(-batch // devices) * devices

        def measure(
            frozen: tuple[Any, Any], params: dict[str, Array], rows: tuple[Array, ...], bucket: Array
        ) -> dict[str, Array]:
            latents, states, ids, index = rows
            place = (index + 0.5) / len(pairs.latents)
            t = ((bucket + place) * total / buckets).astype(jnp.int32)
            root = jax.random.key(seed)
            noise = jax.vmap(
                lambda i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(root, i), bucket), latents.shape[1:])
            )(index)
            denoiser, text_encoder = unflatten(self._like, params).assemble(*frozen, schedule)
            if text_encoder is None:
                conditioning = Conditioning(text=jnp.moveaxis(states, 1, 0))
            else:
                conditioning = encode_prompts(text_encoder, ids)
            prediction, maps = denoiser.with_maps(schedule.add_noise(latents, noise, t), t, conditioning)
            return dict(loss=squared_errors(schedule, prediction, latents, noise, t)) | routing_of(maps)

        self._placed: Callable[[Any], Any] = lambda row: row
        same, split = PartitionSpec(), PartitionSpec(ROWS)
        specs, replicated = None, None
        if mesh is not None:
            unet, text_encoder = self._frozen
            # An absent text encoder has no leaves.
            parts = (specs_of(unet, mesh, "unet"), specs_of(text_encoder, mesh, "text_encoder"))
            specs = (parts, same, (split, PartitionSpec(ROWS, EXPERT), split, split), same)
            replicated = NamedSharding(mesh, same)
            self._placed = functools.partial(place, mesh=mesh, specs=specs[2])
        self._measure = compiled_together(jax.jit(on_mesh(measure, mesh, specs, split), out_shardings=replicated))

    def __call__(self, params: dict[str, Array], step: int) -> dict[str, Any]:
        """Measure the fusion, write the results, and return the values for the run's log.

        These are ``val_loss`` (also as ``score``, and by bucket), the maps' entropy, each expert's mean weight, and the
        grid of ``samples``.
        """
        count, total = len(self.pairs.latents), self.experts.schedule.num_train_timesteps
        measured: list[dict[str, np.ndarray]] = []
        for bucket in range(self.buckets):
            parts = []
            for rows in _rows(count, self.batch):
                row = (*(leaf[rows] for leaf in (self.pairs.latents, self.pairs.states, self.pairs.ids)), rows)
                row = self._placed(row)
                parts.append(jax.device_get(self._measure(self._frozen, params, row, np.int32(bucket))))
            joined = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
            measured.append({name: values.astype(np.float64).mean(0) for name, values in joined.items()})
        edges = [bucket * total // self.buckets for bucket in range(self.buckets + 1)]
        spans = [f"t{low}_{high}" for low, high in itertools.pairwise(edges)]
        loss = {span: float(figures["loss"]) for span, figures in zip(spans, measured, strict=True)}
        weights = np.stack([figures["weights"] for figures in measured], 1)  # [sites, buckets, n]
        entropy = np.stack([figures["entropy"] for figures in measured], 1)  # [sites, buckets]
        line = dict(
            step=step,
            extra=step % self.every != 0,
            loss=loss,
            experts=list(self.experts.names),
            weights={site: weights[i].round(4).tolist() for i, site in enumerate(self._sites)},
            entropy={site: entropy[i].round(4).tolist() for i, site in enumerate(self._sites)},
        )
        self._write(line)
        mean = float(np.mean(list(loss.values())))
        return (
            dict(score=mean, val_loss=mean, val_entropy=float(entropy.mean()))
            | {f"val_loss_{span}": value for span, value in loss.items()}
            | {f"val_weight_{name}": float(weights[..., i].mean()) for i, name in enumerate(self.experts.names)}
            | self._sample(params, step)
        )

    @runs_on_process_0
    def _write(self, line: dict[str, Any]) -> None:
        # A run resumed from an earlier step measures later ones again, but not the step at which a shorter run ended.
        lines = read_validation(self.workdir, keep=True)
        lines = [old for old in lines if old["step"] < line["step"] and not old["extra"]]
        replace_text(self.workdir / FILE, "".join(json.dumps(line) + "\n" for line in [*lines, line]))

    def _sample(self, params: dict[str, Array], step: int) -> dict[str, np.ndarray]:
        if not self.prompts or self.options is None:
            return {}
        denoiser, experts = with_fusion(unflatten(self._like, params), self.experts)
        requests = [Request(prompt=prompt, number=i) for prompt in self.prompts for i in range(self.num_images)]
        try:
            sampled = generate(requests, denoiser, experts, seed=self.seed, options=self.options)
            made = [picture.pixels for picture in sampled]
        except InputError as error:  # not finite, for example by too high a guidance: no reason to end a run
            if is_process_0():
                warnings.warn(f"no samples at step {step}: {error}", stacklevel=2)
            return {}
        pixels = grid([made[i : i + self.num_images] for i in range(0, len(made), self.num_images)])
        self._save(pixels, step)
        return dict(samples=pixels)

    @runs_on_process_0
    def _save(self, pixels: np.ndarray, step: int) -> None:
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        with partial_file(folder / f"step_{step:08d}.png") as partial:
            Image.fromarray(pixels).save(partial, format="PNG")


def read_validation(workdir: Path, *, keep: bool = False) -> list[dict[str, Any]]:
    """Return the lines of validation.jsonl: ``step``, ``loss`` by bucket, and by site ``weights`` and ``entropy``.

    ``keep`` and the errors are those of ``files.read_lines``.
    """
    return read_lines(workdir / FILE, _is_validation, keep=keep)


def _is_validation(line: dict[str, Any]) -> bool:
    """Return whether a line of validation.jsonl has its fields."""
    try:
        buckets, experts = len(line["loss"].values()), len(line["experts"])
        sites = [(line["entropy"][site], weights) for site, weights in line["weights"].items()]
        return (
            isinstance(line["step"], int)
            and isinstance(line["extra"], bool)
            and _are_numbers([*line["loss"].values()], buckets)
            and all(_are_numbers(entropy, buckets) and _are_numbers(rows, buckets, experts) for entropy, rows in sites)
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _are_numbers(value: Any, *shape: int) -> bool:
    array = np.asarray(value)
    return array.shape == shape and array.dtype.kind in "if"


def _rows(count: int, batch: int) -> list[np.ndarray]:
    """Return the indices below ``count`` in batches of one size, the last padded with the last index."""
    return [np.minimum(np.arange(first, first + batch), count - 1) for first in range(0, count, batch)]
