"""From prompts to pictures: one compiled program a method, whatever the number of prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.data.pictures import to_pixels
from afa_jax.diffusion.guidance import Denoiser, guided
from afa_jax.diffusion.samplers import ddim, image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts import Experts, check_record, encode_prompts
from afa_jax.fusion.ensemble import Ensemble, SingleExpert
from afa_jax.weights.aggregators import load_aggregators, read_record


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How to sample; all of it is compiled into the program.

    Attributes:
        size: (rows, columns) of the pictures in pixels.
        steps: network evaluations.
        guidance: scale of classifier-free guidance; 1 turns it off.
        eta: of DDIM.
        batch: pictures at once. The last batch is filled up, so that there is one compilation.
        maps: keep the maps too.
        one_by_one: run the pictures of a batch after one another, so that each is bit for bit the same whatever its
            batch and its place in it; together, the last bit of a float can depend on the place. None: on a CPU only,
            where it costs little.
    """

    size: tuple[int, int]
    steps: int = 50
    guidance: float = 7.5
    eta: float = 0.0
    batch: int = 4
    maps: bool = False
    one_by_one: bool | None = None

    def check(self, experts: Experts) -> None:
        """Raise InputError for a size, batch or guidance that cannot be sampled with these experts."""
        experts.check_size(self.size)
        if self.batch < 1:
            raise InputError(f"a batch of {self.batch}; choose 1 or more")
        if self.guidance < 1:
            raise InputError(f"guidance {self.guidance}; choose 1 (none) or more")
        experts.schedule.timesteps(self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. ``number`` counts the pictures of one prompt and alone, with the seed, gives the noise."""

    prompt: str
    number: int = 0
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, uint8 ``[rows, columns, 3]``, and its maps ``[steps, n, h, w]`` by site, if they were kept."""

    request: Request
    pixels: np.ndarray
    maps: tuple[np.ndarray, ...] = ()


def make_denoiser(method: str, experts: Experts, workdir: Path | None = None) -> Denoiser:
    """The Denoiser that a method's name stands for.

    ``afa`` (trained aggregators from ``workdir``), ``uniform`` (every map 1/N), ``expert:<name>`` (that expert alone),
    ``inside:<name>`` (that expert inside the ensemble: its maps are one everywhere).

    Raises:
        InputError: an unknown method or expert, no trained aggregators, or aggregators of other experts.
    """
    count = len(experts.names)
    kind, _, name = method.partition(":")
    if method == "afa":
        if workdir is None:
            raise InputError("--workdir is missing; --method afa needs the workdir of a trained run, or its hub id")
        check_record(read_record(workdir), experts.record, str(workdir))
        return Ensemble(experts=experts.unet, aggregators=load_aggregators(workdir, experts.unet, count))
    if method == "uniform":
        return Ensemble(experts=experts.unet, weights=jnp.full((count,), 1 / count))
    if kind == "expert":
        return SingleExpert(experts=experts.unet, index=experts.index(name))
    if kind == "inside":
        return Ensemble(experts=experts.unet, weights=jax.nn.one_hot(experts.index(name), count))
    raise InputError(f"unknown method {method!r}; choose afa, uniform, expert:<name> or inside:<name>")


def generate(
    requests: Sequence[Request], denoiser: Denoiser, experts: Experts, *, seed: int, options: SampleOptions
) -> Iterator[Picture]:
    """Sample the requests in order, a batch at a time.

    Raises:
        InputError: at once, for options that cannot be sampled, a prompt with unknown characters, or maps from a
            Denoiser without them.
    """
    options.check(experts)
    if options.maps and not isinstance(denoiser, Ensemble):
        raise InputError("maps exist only in an ensemble: choose the method afa, uniform or inside:<name>")
    positive = experts.tokenizer([r.prompt for r in requests])
    negative = experts.tokenizer([r.negative_prompt for r in requests])

    def pictures() -> Iterator[Picture]:
        for first in range(0, len(requests), options.batch):
            rows = np.minimum(np.arange(first, first + options.batch), len(requests) - 1)  # the last one fills up
            numbers = np.asarray([requests[row].number for row in rows])
            pixels, maps = jax.device_get(
                _sample(
                    denoiser, experts.text_encoder, experts.vae, (positive[rows], negative[rows], numbers), seed,
                    schedule=experts.schedule, options=options,
                )
            )  # fmt: skip
            for i, request in enumerate(requests[first : first + options.batch]):
                yield Picture(request=request, pixels=pixels[i], maps=tuple(site[:, :, i] for site in maps))

    return pictures()


@functools.partial(jax.jit, static_argnames=("schedule", "options"))
def _sample(
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    *,
    schedule: NoiseSchedule,
    options: SampleOptions,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Rows of (token ids, negative token ids, numbers) -> pixels ``[b, ...]`` and maps ``[steps, n, b, h, w]``."""
    factor = vae.config.factor
    shape = (options.size[0] // factor, options.size[1] // factor, vae.config.latent_channels)
    key = jax.random.key(seed)

    def together(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        positive, negative, numbers = rows
        states = encode_prompts(text_encoder, jnp.concatenate([positive, negative]))
        conditional, unconditional = jnp.split(states, 2, axis=1)
        predict = guided(
            denoiser.with_maps if options.maps else denoiser,
            conditional,
            unconditional,
            options.guidance,
            has_maps=options.maps,
        )
        result = ddim(
            predict,
            schedule,
            image_noise(key, numbers, shape),
            steps=options.steps,
            eta=options.eta,
            # Keys of the steps' noise; those of the starting noise are fold_in(key, number) directly.
            noise_at=lambda step: image_noise(jax.random.fold_in(jax.random.split(key)[1], step), numbers, shape),
            has_aux=options.maps,
        )
        latents, maps = result if options.maps else (result, ())
        return to_pixels(vae.decode(latents)), maps

    one_by_one = jax.default_backend() == "cpu" if options.one_by_one is None else options.one_by_one
    if not one_by_one:
        return together(rows)
    pixels, maps = jax.lax.map(lambda row: together(jax.tree.map(lambda x: x[None], row)), rows)
    return pixels[:, 0], jax.tree.map(lambda site: jnp.moveaxis(site[:, :, :, 0], 0, 2), maps)
