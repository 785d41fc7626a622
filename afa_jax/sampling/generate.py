"""From prompts to pictures: one compiled program a method, whatever the number of prompts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.data.pictures import to_pixels
from afa_jax.diffusion.guidance import Denoiser, PathDenoiser, guided
from afa_jax.diffusion.samplers import ddim, image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError, NotFinite
from afa_jax.experts.frozen import Experts, encode_prompts
from afa_jax.fusion.ensemble import Ensemble
from afa_jax.fusion.routing import routing_of
from afa_jax.mesh.collectives import divided
from afa_jax.mesh.parallel import DATA, EXPERT, FSDP, ROWS, on_mesh, place, specs_of
from afa_jax.mesh.processes import meet, several
from afa_jax.methods.options import SampleOptions
from afa_jax.models.vae import VAE
from afa_jax.trees import axis_size, take
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


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
    """Sample the requests in order, a batch at a time; the devices work at the next one while a batch is used.

    On the experts' mesh each device samples its rows of a batch, whose size is rounded up to a multiple of these; every
    process gets all pictures.

    Raises:
        InputError: at once, for options that cannot be sampled, a prompt with unknown characters, maps from a
            Denoiser without them, or a Denoiser that cannot be spread over the mesh; later, for a picture that is not
            finite.
    """
    options.check(experts)
    key = np.uint32(seed)  # as an int32 it would end at 2**31
    mesh = experts.mesh
    models = (denoiser, experts.text_encoder, experts.vae)
    if mesh is not None:
        devices = mesh.shape[DATA] * mesh.shape[FSDP]
        options = dataclasses.replace(options, batch=-(-options.batch // devices) * devices)
        models = place(models, mesh, specs_of_models(models, mesh))
    if (options.maps or options.routing) and not hasattr(denoiser, "with_maps"):
        raise InputError(
            "maps exist only in an ensemble: choose the method afa, gate, router, uniform, inside:<name>, maxfusion, "
            "or learned_mbw"
        )
    positive = _token_ids([r.prompt for r in requests], experts.tokenizer)
    negative = _token_ids([r.negative_prompt for r in requests], experts.tokenizer)

    def batches(models: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
        """The first request of each, and its results: under way, for JAX does not wait for the devices."""
        for first in range(start, len(requests), options.batch):
            rows = np.minimum(np.arange(first, first + options.batch), len(requests) - 1)  # the last one fills up
            numbers = np.asarray([requests[row].number for row in rows])
            batch = (positive[rows], negative[rows], numbers)
            if mesh is not None:
                batch = place(batch, mesh, PartitionSpec(ROWS))
            how: dict[str, Any] = dict(schedule=experts.schedule, options=options, mesh=mesh)
            if first == start and mesh is not None and several():
                sample_batch.lower(*models, batch, key, **how).compile()
                meet("sampler")
            yield first, sample_batch(*models, batch, key, **how)

    def pictures() -> Iterator[Picture]:
        vae = models[-1]
        under_way = batches(models)
        following = next(under_way, None)
        while following is not None:
            (first, made), following = following, next(under_way, None)
            fetched = jax.device_get(made)
            del made
            own = requests[first : first + options.batch]
            finite = fetched.pop("finite")[: len(own)]
            if jnp.dtype(vae.dtype) == jnp.float16 and (finite[:, 0] & ~finite[:, 1]).any():
                warnings.warn("the VAE overflows float16, as many do; it decodes in float32", stacklevel=2)
                vae = in_float32(vae)
                under_way = batches((*models[:-1], vae), first)  # what is under way is decoded by the other one
                following = next(under_way)
                continue
            for i, request in enumerate(own):
                _check_finite(request, finite[i], experts)
                yield Picture(request=request, **take(fetched, i))

    return pictures()


def in_float32(vae: VAE) -> VAE:
    """A VAE with the same parameters that computes in float32."""
    wide = copy.copy(vae)
    wide.dtype = jnp.float32
    return wide


def _check_finite(request: Request, finite: np.ndarray, experts: Experts) -> None:
    """Raise NotFinite for a picture whose latents or pixels hold NaN or infinity: it would be black."""
    if finite.all():
        return
    what, dtype = ("the VAE's pixels" if finite[0] else "the latents"), jnp.dtype(experts.text_encoder.dtype).name
    remedy = (
        "look at the weights with afa_jax.convert --inspect, and choose a lower guidance"
        if dtype == "float32"
        else "choose dtype=float32"
    )
    raise NotFinite(
        f"prompt {request.prompt!r}, picture {request.number}: {what} are not finite (NaN or infinity) after sampling "
        f"in {dtype} with {', '.join(experts.names)}; {remedy}"
    )


def _token_ids(prompts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids ``[b, length]``; a prompt that is there often goes through the tokenizer once."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return tokenizer(list(places))[[places[prompt] for prompt in prompts]]


def program_memory(denoiser: Denoiser | PathDenoiser, experts: Experts, options: SampleOptions) -> int:
    """Bytes that the compiled sampler of a batch holds on a device: arguments, temporaries and results."""
    ids, numbers = experts.tokenizer([""] * options.batch), np.zeros(options.batch, np.int64)
    lowered = sample_batch.lower(
        denoiser,
        experts.text_encoder,
        experts.vae,
        (ids, ids, numbers),
        np.uint32(0),
        schedule=experts.schedule,
        options=options,
    )
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return 0  # a backend that does not say
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)


def specs_of_models(models: tuple[Any, Any, Any], mesh: Mesh) -> tuple[Any, Any, Any]:
    """How denoiser, text encoders and VAE are spread over a mesh.

    Raises:
        InputError: all experts are to be on each device, and the mesh spreads them; or it cannot.
    """
    denoiser, text_encoder, _ = models
    everywhere = PartitionSpec()
    if mesh.shape[EXPERT] == mesh.shape[FSDP] == 1:
        return everywhere, everywhere, everywhere
    if not isinstance(denoiser, Ensemble):
        raise InputError("mesh: only afa, gate, uniform and inside:<name> spread experts; choose expert=1 and fsdp=1")
    if axis_size(denoiser.experts) % mesh.shape[EXPERT]:
        raise InputError(f"mesh.expert={mesh.shape[EXPERT]} does not divide {axis_size(denoiser.experts)} experts")
    return specs_of(denoiser, mesh), specs_of(text_encoder, mesh, "text_encoder"), everywhere


@functools.partial(jax.jit, static_argnames=("schedule", "options", "mesh"))
def sample_batch(
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    *,
    schedule: NoiseSchedule,
    options: SampleOptions,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Rows of (token ids, negative token ids, numbers) -> a Picture's fields, with a leading axis for the rows."""
    sample = functools.partial(_sample_rows, schedule=schedule, options=options)
    if mesh is None:
        return sample(denoiser, text_encoder, vae, rows, seed)
    specs, split = specs_of_models((denoiser, text_encoder, vae), mesh), PartitionSpec(ROWS)
    made = on_mesh(sample, mesh, (*specs, split, PartitionSpec()), split)(denoiser, text_encoder, vae, rows, seed)
    # Every process gets them all.
    return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, PartitionSpec()))


def _sample_rows(
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    *,
    schedule: NoiseSchedule,
    options: SampleOptions,
) -> dict[str, Any]:
    """As sample_batch, on one device of a mesh: its rows."""
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

        def decoded(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
            images = vae.decode(latents)
            return to_pixels(images), jnp.isfinite(images).all((1, 2, 3))

        pixels, finite_images = divided(decoded, latents)
        finite = jnp.stack([jnp.isfinite(latents).all((1, 2, 3)), finite_images], 1)
        return dict(pixels=pixels, finite=finite) | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), aux)

    one_by_one = jax.default_backend() == "cpu" if options.one_by_one is None else options.one_by_one
    if not one_by_one:
        return together(rows)
    made = jax.lax.map(lambda row: together(jax.tree.map(lambda x: x[None], row)), rows)
    return jax.tree.map(lambda leaf: leaf[:, 0], made)
