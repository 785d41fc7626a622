"""From prompts to pictures, by one compiled program for each method, whatever the number of prompts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.diffusion.guidance import Denoiser, MappedPathDenoiser, PathDenoiser, gives_maps, guided
from afa_jax.diffusion.samplers.sampler import Sampler, image_noise, sample
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError, NotFinite
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.afa import routing_of
from afa_jax.mesh.collectives import DATA, EXPERT, FSDP, ROWS, divided, on_mesh
from afa_jax.mesh.parallel import place, specs_of
from afa_jax.mesh.processes import is_multiprocess, wait_for_all
from afa_jax.methods.options import SampleOptions, guided_timesteps
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import VAE, to_pixels
from afa_jax.progress import announced
from afa_jax.target import platform
from afa_jax.trees import axis_size, take
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. ``number`` counts the pictures of one prompt; it and the seed alone determine the noise."""

    prompt: str
    number: int = 0
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture and the requested records of its sampling.

    Attributes:
        pixels: uint8 ``[rows, columns, 3]``.
        maps: each site's maps, ``[steps, n, h, w]``.
        routing: ``weights`` ``[steps, sites, n]`` and ``entropy`` ``[steps, sites]``, means over the pixels.
        path: the clean picture implied by each step's prediction, uint8 ``[steps, rows, columns, 3]``.
        work: by name evaluations of U-Nets, of a method whose work depends on the picture: ``needed``, ``done`` (needed
            ones and those that filled a chunk), ``possible`` (those of all experts).
    """

    request: Request
    pixels: np.ndarray
    maps: tuple[np.ndarray, ...] = ()
    routing: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: np.ndarray | None = None
    work: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def generate(
    requests: Sequence[Request],
    denoiser: Denoiser | PathDenoiser,
    experts: Experts,
    *,
    seed: int,
    options: SampleOptions,
    announce: bool = False,
    sampler: Callable[..., dict[str, Any]] | None = None,
) -> Iterator[Picture]:
    """Sample the requests in order, a batch at a time; the devices compute the next batch while one is used.

    On the experts' mesh each device samples its share of a batch's rows; the batch size is rounded up to a multiple of
    the shares. Every process gets all pictures.

    Args:
        announce: print a line if the sampler takes long to compile.
        sampler: a function that samples a batch; ``sample_batch``, whose arguments it takes, is the default.

    Raises:
        InputError: immediately, for options that cannot be sampled, a prompt with unknown characters, maps from a
            Denoiser without them, a guidance scale that a distilled model has not learnt, or a Denoiser that cannot be
            spread over the mesh; later, for a picture that is not finite.
    """
    options.check(experts)
    low, high = getattr(denoiser, "guidance_range", (1, np.inf))
    if not low <= options.guidance <= high:
        raise InputError(f"guidance {options.guidance:g}: this distilled model has learnt {low:g} to {high:g}")
    if low > 1 and options.guidance_interval != (0.0, 1.0):
        raise InputError(f"guidance_interval: this distilled model has learnt {low:g} to {high:g}, not to do without")
    key = np.uint32(seed)  # as an int32 it would end at 2**31
    mesh = experts.mesh
    models = (denoiser, experts.text_encoder, experts.vae)
    if mesh is not None:
        devices = mesh.shape[DATA] * mesh.shape[FSDP]
        options = dataclasses.replace(options, batch=-(-options.batch // devices) * devices)
        models = place(models, mesh, specs_of_models(models, mesh))
    if (options.maps or options.routing) and not gives_maps(denoiser):
        raise InputError(
            "maps exist only in an ensemble: choose the method afa, gate, router, ladder, uniform, inside:<name>, "
            "maxfusion, or learned_mbw"
        )
    positive = _token_ids([r.prompt for r in requests], experts.tokenizer)
    negative = _token_ids([r.negative_prompt for r in requests], experts.tokenizer)

    program, numbers_of_steps = program_of(options, experts.schedule)

    def batches(models: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield each batch's first request and its results, which JAX may still be computing."""
        for first in range(start, len(requests), options.batch):
            rows = np.minimum(np.arange(first, first + options.batch), len(requests) - 1)  # the last one fills up
            numbers = np.asarray([requests[row].number for row in rows])
            batch = (positive[rows], negative[rows], numbers)
            if mesh is not None:
                batch = place(batch, mesh, PartitionSpec(ROWS))
            arguments = (*models, batch, key, numbers_of_steps)
            with announced("compiling the sampler", quiet=not announce or first != start):
                if sampler is None and first == start and mesh is not None and is_multiprocess():
                    sample_batch.lower(*arguments, program=program, mesh=mesh).compile()
                    wait_for_all("sampler")
                made = (sampler or sample_batch)(*arguments, program=program, mesh=mesh)
            yield first, made

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
                under_way = batches((*models[:-1], vae), first)  # those under way use the former VAE
                following = next(under_way)
                continue
            for i, request in enumerate(own):
                _check_finite(request, finite[i], experts)
                yield Picture(request=request, **take(fetched, i))

    return pictures()


def in_float32(vae: VAE) -> VAE:
    """Return a VAE that has the same parameters and computes in float32."""
    wide = copy.copy(vae)
    wide.dtype = jnp.float32
    return wide


def _check_finite(request: Request, finite: np.ndarray, experts: Experts) -> None:
    """Raise NotFinite if a picture's latents or pixels hold NaN or infinity: it would be black."""
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
    """Return token ids ``[b, length]``; a repeated prompt goes through the tokenizer once."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return tokenizer(list(places))[[places[prompt] for prompt in prompts]]


def program_memory(denoiser: Denoiser | PathDenoiser, experts: Experts, options: SampleOptions) -> int:
    """Return the bytes that the compiled sampler of a batch holds: arguments, temporaries and results."""
    ids, numbers = experts.tokenizer([""] * options.batch), np.zeros(options.batch, np.int64)
    program, of_steps = program_of(options, experts.schedule)
    models = (denoiser, experts.text_encoder, experts.vae)
    lowered = sample_batch.lower(*models, (ids, ids, numbers), np.uint32(0), of_steps, program=program)
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return 0  # the backend does not state it
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The options that are compiled into a sampler; the fields are those of SampleOptions.

    Attributes:
        guided: whether classifier-free guidance is used, at any scale.
        interval: whether guidance is used in a part of the path only.
    """

    size: tuple[int, int]
    sampler: Sampler
    guided: bool
    interval: bool
    maps: bool
    routing: bool
    path: bool
    one_by_one: bool


class Guidance(NamedTuple):
    """The numbers of classifier-free guidance.

    Attributes:
        scale: the guidance scale.
        first, last: the greatest and the least timestep with guidance.
    """

    scale: Any
    first: Any
    last: Any


class StepNumbers(NamedTuple):
    """The numbers of the sampler's steps, which are arguments of the program.

    Attributes:
        constants: the sampler's constants of each evaluation.
        count: the number of evaluations used; None for all of them, when each step keeps something.
        guidance: of the classifier-free guidance.
    """

    constants: Any
    count: Any
    guidance: Guidance


def program_of(
    options: SampleOptions, schedule: NoiseSchedule, *, any_steps: bool = True
) -> tuple[Program, StepNumbers]:
    """Split the options into those that are compiled and those that are the program's arguments.

    Args:
        any_steps: if no step keeps anything, make one program for all numbers of steps up to the next power of two, at
            least 64. Otherwise the number of steps is part of the program, so that its work can be counted.
    """
    sampler = options.make_sampler(schedule)
    constants, count = sampler.constants(options.steps), None
    if any_steps and not options.keeps_steps:
        count = len(constants.t)
        room = max(64, 1 << (count - 1).bit_length())
        constants = jax.tree.map(lambda values: np.resize(np.asarray(values), room), constants)
    one_by_one = platform() == "cpu" if options.one_by_one is None else options.one_by_one
    kept = dict(maps=options.maps, routing=options.routing, path=options.path)
    guided = dict(guided=options.guidance != 1, interval=options.guidance_interval != (0.0, 1.0))
    program = Program(size=options.size, sampler=sampler, one_by_one=one_by_one, **guided, **kept)
    return program, StepNumbers(
        constants,
        None if count is None else np.int32(count),
        Guidance(
            np.float32(options.guidance),
            *guided_timesteps(np.asarray(sampler.constants(options.steps).t), options.guidance_interval),
        ),
    )


def specs_of_models(models: tuple[Any, Any, Any], mesh: Mesh) -> tuple[Any, Any, Any]:
    """Return the partition specs of denoiser, text encoders and VAE on a mesh.

    Raises:
        InputError: the mesh spreads experts that must all be on each device, or their number does not divide.
    """
    denoiser, text_encoder, _ = models
    everywhere = PartitionSpec()
    if mesh.shape[EXPERT] == mesh.shape[FSDP] == 1:
        return everywhere, everywhere, everywhere
    if not getattr(denoiser, "spreads", False):
        raise InputError("mesh: only afa, gate, uniform and inside:<name> spread experts; choose expert=1 and fsdp=1")
    if axis_size(denoiser.experts) % mesh.shape[EXPERT]:
        raise InputError(f"mesh.expert={mesh.shape[EXPERT]} does not divide {axis_size(denoiser.experts)} experts")
    return specs_of(denoiser, mesh), specs_of(text_encoder, mesh, "text_encoder"), everywhere


@functools.partial(jax.jit, static_argnames=("program", "mesh"))
def sample_batch(
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    steps: StepNumbers,
    *,
    program: Program,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Sample rows of (token ids, negative token ids, numbers); return a Picture's fields with a leading row axis."""
    function, models = functools.partial(_sample_rows, program), (denoiser, text_encoder, vae)
    if mesh is None:
        return function(*models, rows, seed, steps)
    specs, split, same = specs_of_models(models, mesh), PartitionSpec(ROWS), PartitionSpec()
    made = on_mesh(function, mesh, (*specs, split, same, same), split)(*models, rows, seed, steps)
    # Every process gets all rows.
    return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, same))


def _sample_rows(
    program: Program,
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    steps: StepNumbers,
) -> dict[str, Any]:
    """Sample the rows of one device as sample_batch does."""

    def of_rows(rows: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, Any]:
        return _pictures(program, denoiser, text_encoder, vae, rows, jax.random.key(seed), steps)

    if not program.one_by_one:
        return of_rows(rows)
    made = jax.lax.map(lambda row: of_rows(jax.tree.map(lambda x: x[None], row)), rows)
    return jax.tree.map(lambda leaf: leaf[:, 0], made)


def _pictures(
    program: Program,
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    steps: StepNumbers,
) -> dict[str, Any]:
    """Turn token ids into pixels: encode the prompts, sample latents, decode them."""
    path = trajectory_of(program, denoiser, text_encoder, vae, rows, key, steps.guidance)
    sampled, memory = sample(
        program.sampler,
        path.predict,
        path.start,
        steps.constants,
        count=steps.count,
        noise_at=path.noise_at,
        has_aux=path.has_aux,
        carry=path.carry,
        returns_carry=True,
    )
    latents, aux = sampled if path.has_aux else (sampled, {})
    return decode(vae, latents) | work_of(denoiser, memory) | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), aux)


class Trajectory(NamedTuple):
    """What a batch is sampled with.

    Attributes:
        start: the noise ``[b, h, w, c]``.
        carry: the method's memory before the first evaluation.
        predict, noise_at, has_aux: as ``sample`` takes them.
    """

    start: jax.Array
    carry: Any
    predict: Callable[..., Any]
    noise_at: Callable[[Any], jax.Array]
    has_aux: bool


def trajectory_of(
    program: Program,
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    guidance: Guidance,
) -> Trajectory:
    """Encode the prompts of rows and return what their pictures are sampled with."""
    positive, negative, numbers = rows
    both = encode_prompts(text_encoder, jnp.concatenate([positive, negative]))
    conditional, unconditional = (
        jax.tree.map(lambda states, half=half: jnp.split(states, 2, axis=1)[half], both) for half in (0, 1)
    )
    factor = vae.config.factor
    shape = (program.size[0] // factor, program.size[1] // factor, vae.config.latent_channels)
    noise = image_noise(key, numbers, shape)
    on_path, has_maps = isinstance(denoiser, PathDenoiser), program.maps or program.routing

    def predict(x: jax.Array, t: jax.Array, memory: Any) -> tuple[Any, Any]:
        def at(scale: Any) -> tuple[Any, Any]:
            """Return the prediction guided at a scale, with maps where they are wanted, and the memory."""
            if isinstance(denoiser, PathDenoiser):
                asked = (x, t, conditional, unconditional, scale, memory)
                if has_maps and isinstance(denoiser, MappedPathDenoiser):
                    return denoiser.guided_with_maps(*asked)
                return denoiser.guided(*asked)
            function = denoiser.with_maps if has_maps else denoiser
            return guided(function, conditional, unconditional, scale, has_maps=has_maps)(x, t), memory

        if program.guided and program.interval:  # outside, the unconditional half does not run
            inside = (t[0] <= guidance.first) & (t[0] >= guidance.last)
            answer, memory = jax.lax.cond(inside, lambda: at(guidance.scale), lambda: at(1))
        else:
            answer, memory = at(guidance.scale if program.guided else 1)
        prediction, maps = answer if has_maps else (answer, ())
        return (prediction, kept(x, prediction, t, maps)) if keeps else prediction, memory

    keeps = has_maps or program.path

    def kept(x: jax.Array, prediction: jax.Array, t: jax.Array, maps: Any) -> dict[str, Any]:
        """Return a step's records, rows first as in the result; the scan puts the steps axis before the rows."""
        aux: dict[str, Any] = {}
        if program.maps:
            aux["maps"] = jax.tree.map(lambda site: jnp.moveaxis(site, 1, 0), maps)
        if program.routing:
            aux["routing"] = routing_of(maps)
        if program.path:
            aux["path"] = to_pixels(vae.decode(program.sampler.schedule.clean(x, prediction, t)))
        return aux

    return Trajectory(
        start=noise,
        carry=denoiser.start(noise) if on_path else (),
        predict=predict,
        # Keys of the steps' noise; those of the starting noise are fold_in(key, number) directly.
        noise_at=lambda step: image_noise(jax.random.fold_in(jax.random.split(key)[1], step), numbers, shape),
        has_aux=keeps,
    )


def work_of(denoiser: Any, memory: Any) -> dict[str, Any]:
    """Return ``Picture.work`` of a method that counts its evaluations in its memory; nothing of others."""
    return dict(work=denoiser.work(memory)) if hasattr(denoiser, "work") else {}


def decode(vae: Any, latents: jax.Array) -> dict[str, jax.Array]:
    """Decode latents to pixels, and say by row whether latents and pictures are finite."""

    def decoded(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = vae.decode(latents)
        return to_pixels(images), jnp.isfinite(images).all((1, 2, 3))

    pixels, finite_images = divided(decoded, latents)
    return dict(pixels=pixels, finite=jnp.stack([jnp.isfinite(latents).all((1, 2, 3)), finite_images], 1))
