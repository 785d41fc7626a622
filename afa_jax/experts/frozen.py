"""The frozen parts of a run: experts, shared VAE and tokenizer, noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_base, check_same_layers, find_checkpoints, mismatches
from afa_jax.mesh.parallel import place, spec_of
from afa_jax.models.vae import VAE
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.load import load_text_encoders, load_unets, load_vae
from afa_jax.weights.opened import noise_schedule, text_config
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """N frozen experts in a fixed order; the order is part of a trained aggregator.

    Attributes:
        names: the experts' names, all different.
        hashes: sha256 of the tensors of each expert's U-Net and text encoder, independent of their file.
        vae_hash: sha256 of the VAE's tensors.
        unet: a stack of N U-Nets; a tuple of N for experts along the time axis whose architectures differ.
        text_encoder: a stack of N text encoders, whose ``encode`` gives the conditioning.
        vae, tokenizer, schedule: those of the base model, which all experts share.
        mesh: the devices that the networks are spread over; None if all are on one.
        sampler: the sampler that the base model's scheduler_config.json names.
    """

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    vae_hash: str
    unet: Any
    text_encoder: Any
    vae: VAE
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    mesh: Mesh | None = None
    sampler: str = "DDIMScheduler"

    def index(self, name: str) -> int:
        """Return the position of an expert.

        Raises:
            InputError: no expert has this name; the error lists the names.
        """
        if name not in self.names:
            raise InputError(f"no expert {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise InputError if the pictures' sides, in pixels, are not multiples of the VAE's factor."""
        self.vae.config.check_size(size)

    @property
    def record(self) -> list[dict[str, str]]:
        """Return names and hashes in order, for checkpoints and published files."""
        return [dict(name=name, sha256=sha) for name, sha in zip(self.names, self.hashes, strict=True)]


def load_experts(
    config: ConfigDict,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    averaged: bool = False,
) -> Experts:
    """Load what a config names: ``base`` (VAE, tokenizer, schedule) and ``experts``; see afa_jax/experts/sources.py.

    Args:
        mesh: the devices to spread the networks over. A process reads the experts that its devices hold; no device
            ever holds more than its own.
        averaged: whether their weights will be averaged; then their text encoders must have the same layers, too.

    Raises:
        InputError: a file is missing or damaged, or experts share a name or differ in architecture, text encoder or
            prediction type.
    """
    base, checkpoints = find_checkpoints(config)
    words = check_base(base, f"base: {base.path}", "name one, base=dict(path=..., tokenizer=FOLDER)")
    if "scheduler" not in base.components:
        raise InputError(f"base: {base.path} has no scheduler_config.json; take a base model that has one")
    for mismatch in mismatches(base, checkpoints):
        raise InputError(mismatch.message)
    if averaged:
        check_same_layers(checkpoints)
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    stored = list(checkpoints.values())

    def spread(part: str) -> dict[str, Any]:
        if mesh is None:
            return kwargs
        return kwargs | dict(
            sharding=lambda path, shape: NamedSharding(mesh, spec_of(f"{part}.{path}", shape, mesh)),
        )

    vae = load_vae(base, **kwargs)
    return Experts(
        names=tuple(checkpoints),
        hashes=tuple(hash_components(checkpoint, EXPERT_COMPONENTS) for checkpoint in checkpoints.values()),
        vae_hash=hash_components(base, ("vae",)),
        unet=load_unets(stored, **spread("unet")),
        text_encoder=load_text_encoders(stored, **spread("text_encoder")),
        vae=vae if mesh is None else place(vae, mesh, PartitionSpec()),
        tokenizer=Tokenizer(words, text_config(stored[0])),
        schedule=noise_schedule(base),
        mesh=mesh,
        sampler=str(base.config("scheduler").get("_class_name") or "DDIMScheduler"),
    )


def with_encoders_here(experts: Experts, config: ConfigDict) -> Experts:
    """Return the experts with encoders and VAE on one device of this process, to encode data that only it reads."""
    if experts.mesh is None:
        return experts
    base, checkpoints = find_checkpoints(config)
    kwargs: dict[str, Any] = dict(dtype=experts.text_encoder.dtype, param_dtype=config.dtype)
    encoders = load_text_encoders(list(checkpoints.values()), **kwargs)
    return dataclasses.replace(experts, text_encoder=encoders, vae=load_vae(base, **kwargs), mesh=None)


def frozen(experts: Experts) -> dict[str, Any]:
    """Return a run's networks whose arrays never change, as one argument of a jitted step."""
    return dict(unet=experts.unet, text_encoder=experts.text_encoder, vae=experts.vae)


def with_fusion(fusion: Any, experts: Experts) -> tuple[Any, Experts]:
    """Return the Denoiser of a trained fusion, and the experts to sample it with.

    The experts stay the same unless the fusion has block weights: then their U-Nets and text encoders are merged here,
    once, and the merged networks replace them as stacks of one.
    """
    denoiser, text_encoder = fusion.assemble(experts.unet, experts.text_encoder, experts.schedule)
    return denoiser, dataclasses.replace(experts, unet=denoiser.experts, text_encoder=text_encoder)
