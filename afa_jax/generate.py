"""From prompts to pictures: one compiled program a method, whatever the number of prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.data.pictures import to_pixels
from afa_jax.diffusion.guidance import Denoiser, PathDenoiser, guided
from afa_jax.diffusion.samplers import ddim, image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts import Experts, encode_prompts
from afa_jax.fusion.routing import routing_of
from afa_jax.parallel import take


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
        routing: keep what the maps of each step say in sum, ``routing_of``; a few numbers a step, whatever the size.
        path: keep the clean picture that each step's prediction implies.
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
    routing: bool = False
    path: bool = False
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
    """A picture, and of its sampling what was to be kept.

    Attributes:
        pixels: uint8 ``[rows, columns, 3]``.
        maps: by site ``[steps, n, h, w]``.
        routing: ``weights`` ``[steps, sites, n]`` and ``entropy`` ``[steps, sites]``, means over the pixels.
        path: the clean picture implied by each step's prediction, uint8 ``[steps, rows, columns, 3]``.
    """

    request: Request
    pixels: np.ndarray
    maps: tuple[np.ndarray, ...] = ()
    routing: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: np.ndarray | None = None


def generate(
    requests: Sequence[Request],
    denoiser: Denoiser | PathDenoiser,
    experts: Experts,
    *,
    seed: int,
    options: SampleOptions,
) -> Iterator[Picture]:
    """Sample the requests in order, a batch at a time.

    Raises:
        InputError: at once, for options that cannot be sampled, a prompt with unknown characters, or maps from a
            Denoiser without them.
    """
    options.check(experts)
    if (options.maps or options.routing) and not hasattr(denoiser, "with_maps"):
        raise InputError(
            "maps exist only in an ensemble: choose the method afa, gate, router, uniform, inside:<name>, maxfusion, "
            "or learned_mbw"
        )
    positive = experts.tokenizer([r.prompt for r in requests])
    negative = experts.tokenizer([r.negative_prompt for r in requests])

    def pictures() -> Iterator[Picture]:
        for first in range(0, len(requests), options.batch):
            rows = np.minimum(np.arange(first, first + options.batch), len(requests) - 1)  # the last one fills up
            numbers = np.asarray([requests[row].number for row in rows])
            made = jax.device_get(
                _sample(
                    denoiser, experts.text_encoder, experts.vae, (positive[rows], negative[rows], numbers), seed,
                    schedule=experts.schedule, options=options,
                )
            )  # fmt: skip
            for i, request in enumerate(requests[first : first + options.batch]):
                yield Picture(request=request, **take(made, i))

    return pictures()


def program_memory(denoiser: Denoiser | PathDenoiser, experts: Experts, options: SampleOptions) -> int:
    """Bytes that the compiled sampler of a batch holds on a device: arguments, temporaries and results."""
    ids, numbers = experts.tokenizer([""] * options.batch), np.zeros(options.batch, np.int64)
    lowered = _sample.lower(
        denoiser, experts.text_encoder, experts.vae, (ids, ids, numbers), 0, schedule=experts.schedule, options=options
    )
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return 0  # a backend that does not say
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)


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
) -> dict[str, Any]:
    """Rows of (token ids, negative token ids, numbers) -> a Picture's fields, with a leading axis for the rows."""
    factor = vae.config.factor
    shape = (options.size[0] // factor, options.size[1] // factor, vae.config.latent_channels)
    key = jax.random.key(seed)

    def together(rows: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, Any]:
        positive, negative, numbers = rows
        states = encode_prompts(text_encoder, jnp.concatenate([positive, negative]))
        conditional, unconditional = jnp.split(states, 2, axis=1)
        noise = image_noise(key, numbers, shape)
        has_maps = options.maps or options.routing

        def predict(x: jax.Array, t: jax.Array, memory: Any) -> tuple[Any, Any]:
            maps: Any = ()
            if isinstance(denoiser, PathDenoiser):
                prediction, memory = denoiser.guided(x, t, conditional, unconditional, options.guidance, memory)
            else:
                function = denoiser.with_maps if has_maps else denoiser
                answer = guided(function, conditional, unconditional, options.guidance, has_maps=has_maps)(x, t)
                prediction, maps = answer if has_maps else (answer, ())
            # Rows first, as in the result; the steps come before them in the scan.
            aux: dict[str, Any] = {}
            if options.maps:
                aux["maps"] = jax.tree.map(lambda site: jnp.moveaxis(site, 1, 0), maps)
            if options.routing:
                aux["routing"] = routing_of(maps)
            if options.path:
                aux["path"] = to_pixels(vae.decode(schedule.clean(x, prediction, t)))
            return (prediction, aux), memory

        latents, aux = ddim(
            predict,
            schedule,
            noise,
            steps=options.steps,
            eta=options.eta,
            # Keys of the steps' noise; those of the starting noise are fold_in(key, number) directly.
            noise_at=lambda step: image_noise(jax.random.fold_in(jax.random.split(key)[1], step), numbers, shape),
            has_aux=True,
            carry=denoiser.start(noise) if isinstance(denoiser, PathDenoiser) else (),
        )
        return dict(pixels=to_pixels(vae.decode(latents))) | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), aux)

    one_by_one = jax.default_backend() == "cpu" if options.one_by_one is None else options.one_by_one
    if not one_by_one:
        return together(rows)
    made = jax.lax.map(lambda row: together(jax.tree.map(lambda x: x[None], row)), rows)
    return jax.tree.map(lambda leaf: leaf[:, 0], made)
