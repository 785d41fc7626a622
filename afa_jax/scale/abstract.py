"""The programs of a run and the shapes and shardings of their arguments, for compiling ahead of time.

No weights are read. An architecture follows from config.json files, or is one that is known here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from afa_jax.data.sources import make_source
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.checks import mismatches
from afa_jax.experts.sources import find_checkpoints
from afa_jax.fusion.registry import init_fusion
from afa_jax.mesh.collectives import DATA, FSDP, ROWS
from afa_jax.mesh.parallel import mesh_of, specs_of
from afa_jax.methods.options import SampleOptions
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.sampling import generation
from afa_jax.target import compiling_for
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.run import configured_mesh
from afa_jax.training.step import batch_specs, init_state, make_train_step
from afa_jax.trees import flatten
from afa_jax.weights.opened import noise_schedule, text_config, unet_config, vae_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The configs of a run's networks; the defaults are Stable Diffusion 1.5's."""

    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    text_encoder: TextConfig = dataclasses.field(default_factory=TextConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    schedule: NoiseSchedule = dataclasses.field(default_factory=NoiseSchedule)


KNOWN = dict(sd15=Architecture())


def architecture_of(config: ConfigDict) -> Architecture:
    """Return the architecture of a config's base model and experts, without reading their weights.

    Raises:
        InputError: a model does not exist, or they cannot be fused.
    """
    try:
        base, checkpoints = find_checkpoints(config.base, config.experts, weights=False)
    except InputError as error:
        raise InputError(f"{error}; or --architecture {'|'.join(KNOWN)}, which needs no files") from error
    for mismatch in mismatches(base, checkpoints):
        raise InputError(mismatch.message)
    first = next(iter(checkpoints.values()))
    return Architecture(
        unet=unet_config(first),
        text_encoder=text_config(first),
        vae=vae_config(base),
        schedule=noise_schedule(base),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices that a program is compiled for, and how they are arranged; a single one needs no mesh."""

    devices: Sequence[Any]
    mesh: Mesh | None

    @property
    def shape(self) -> dict[str, int]:
        """Return the mesh axes' sizes by name."""
        return dict(data=1, fsdp=1, expert=1) if self.mesh is None else dict(self.mesh.shape)

    def place(self, tree: Any, specs: Any = None) -> Any:
        """Add shardings to shapes by ``specs``, one PartitionSpec or a tree of them; the default replicates."""
        if self.mesh is None:
            single = SingleDeviceSharding(self.devices[0])
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=single), tree)
        mesh = self.mesh

        def put(spec: PartitionSpec, part: Any) -> Any:
            sharding = NamedSharding(mesh, spec)
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

        specs = PartitionSpec() if specs is None else specs
        return jax.tree.map(put, specs, tree, is_leaf=lambda node: isinstance(node, PartitionSpec))

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Make traced code see these devices: it asks for the platform to choose among kernels."""
        with compiling_for(self.devices[0].platform, len(self.devices)):
            yield


def target_of(config: ConfigDict, fusing: Any, devices: Sequence[Any], mode: str) -> Target:
    """Return devices arranged in a config's ``mesh``; the first device alone without one.

    Raises:
        InputError: the mesh's sizes do not fit the devices, the experts or, for training, the batch.
    """
    if mode == "train":
        mesh = configured_mesh(config, fusing, devices)
    else:
        mesh = mesh_of(config, devices)
    return Target(devices=list(devices[:1]) if mesh is None else list(mesh.devices.flat), mesh=mesh)


class Call(NamedTuple):
    """A jitted function with its arguments, and the other arrays that a run holds on the devices."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    beside: Any = ()

    def lower(self, target: Target) -> Any:
        """Trace the function and lower it for the target's devices."""
        with target.here():
            traced = self.function.trace(*self.arguments, **self.options)
            return traced.lower(lowering_platforms=(target.devices[0].platform,))


class _Networks(NamedTuple):
    """The shapes of the networks: stacks of N, and the shared ones."""

    unet: Any
    text_encoder: Any
    vae: Any
    fusion: Any


def _networks(config: ConfigDict, fusing: Any, architecture: Architecture) -> _Networks:
    count, dtype = len(config.experts), jnp.dtype(config.dtype)
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)

    def stacked(create: Any) -> Any:
        one = jax.eval_shape(lambda: create(nnx.Rngs(0)))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), one)

    unet = stacked(lambda rngs: UNet(architecture.unet, rngs=rngs, **kwargs))
    return _Networks(
        unet=unet,
        text_encoder=stacked(lambda rngs: TextEncoder(architecture.text_encoder, rngs=rngs, **kwargs)),
        vae=jax.eval_shape(lambda: VAE(architecture.vae, rngs=nnx.Rngs(0), **kwargs)),
        fusion=jax.eval_shape(lambda: init_fusion(fusing, unet, count, 0)),
    )


def training_step(config: ConfigDict, fusing: Any, architecture: Architecture, target: Target) -> Call:
    """Return the step that ``afa_jax.train`` runs: from the cache if the config has one, otherwise from pictures.

    Raises:
        InputError: the networks cannot take the pictures' size.
    """
    networks, train = _networks(config, fusing, architecture), config.train
    size = config.data.get("size") or make_source(config.data)[0]["image"].shape[:2]
    architecture.vae.check_size(size)
    rows, tokens = train.batch, architecture.text_encoder.max_position_embeddings
    text = (len(config.experts), tokens, architecture.text_encoder.hidden_size)
    batch: dict[str, Any] = dict.fromkeys(("index", "position"), jax.ShapeDtypeStruct((rows,), jnp.int32))
    frozen: dict[str, Any] = dict(unet=networks.unet)
    no_caption: Any
    if config.cache.path:
        factor = architecture.vae.factor
        latents = (rows, size[0] // factor, size[1] // factor, architecture.vae.latent_channels)
        batch |= dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct(latents, jnp.float32))
        batch["states"] = jax.ShapeDtypeStruct((rows, *text), jnp.dtype(config.dtype))
        no_caption = jnp.zeros(text, jnp.dtype(config.dtype))
    else:
        batch["image"] = jax.ShapeDtypeStruct((rows, *size, 3), jnp.uint8)
        batch["ids"] = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        frozen |= dict(text_encoder=networks.text_encoder, vae=networks.vae)
        no_caption = jnp.zeros(tokens, jnp.int32)
    optimizer = make_optimizer(train.optimizer, train.steps)
    step = make_train_step(
        networks.fusion,
        frozen,
        optimizer,
        architecture.schedule,
        caption_dropout=train.caption_dropout,
        no_caption=no_caption,
        min_snr_gamma=train.min_snr_gamma,
        accumulate=train.accumulate,
        ema=train.ema,
        remat=train.remat,
        vae=networks.vae,
        mesh=target.mesh,
    )
    state = jax.eval_shape(lambda fusion: init_state(fusion, optimizer, average=bool(train.ema)), networks.fusion)

    def spread(arrays: dict[str, Any]) -> Any:
        return target.place(arrays, None if target.mesh is None else specs_of(arrays, target.mesh))

    arguments = (
        target.place(state),
        target.place(batch, batch_specs(batch)),
        spread(flatten(frozen)),
        target.place(jax.eval_shape(lambda: jax.random.key(0))),
    )
    # Validation uses them.
    others = {name: own for name, own in networks._asdict().items() if name in ("text_encoder", "vae")}
    beside = flatten({name: own for name, own in others.items() if name not in frozen})
    return Call(step, arguments, {}, spread(beside))


def sampler(config: ConfigDict, fusing: Any, architecture: Architecture, target: Target) -> Call:
    """Return the sampler of ``config.sample`` with the fusion, as ``afa_jax.sample`` runs it on a full batch.

    Raises:
        InputError: the networks cannot take the size, or the mesh cannot spread the fusion.
    """
    networks, sample = _networks(config, fusing, architecture), config.sample
    architecture.vae.check_size(sample.size)
    architecture.schedule.timesteps(sample.steps)
    shares = target.shape[DATA] * target.shape[FSDP]
    rows, tokens = -(-sample.batch // shares) * shares, architecture.text_encoder.max_position_embeddings
    options = SampleOptions(size=tuple(sample.size), steps=sample.steps, guidance=float(sample.guidance), batch=rows)
    denoiser, text_encoder = jax.eval_shape(
        lambda own, *experts: own.assemble(*experts, architecture.schedule),
        networks.fusion,
        networks.unet,
        networks.text_encoder,
    )
    models = (denoiser, text_encoder, networks.vae)
    specs = (None, None, None) if target.mesh is None else generation.specs_of_models(models, target.mesh)
    with target.here():
        program, steps = generation.program_of(options, architecture.schedule, any_steps=False)
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    arguments = (
        *(target.place(model, own) for model, own in zip(models, specs, strict=True)),
        target.place((ids, ids, numbers), PartitionSpec(ROWS)),
        target.place(jax.ShapeDtypeStruct((), jnp.int32)),
        target.place(jax.eval_shape(lambda: steps)),
    )
    return Call(generation.sample_batch, arguments, dict(program=program, mesh=target.mesh))
