"""The frozen parts of a run: experts, shared VAE and tokenizer, noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from afa_jax.diffusion.schedule import NoiseSchedule, ScheduleError
from afa_jax.errors import InputError
from afa_jax.experts import sources
from afa_jax.experts.architectures import different_architectures
from afa_jax.fusion.pair_record import check_experts
from afa_jax.mesh.parallel import place, spec_of
from afa_jax.models.configs import TextConfig
from afa_jax.models.vae import VAE
from afa_jax.weights.checkpoint import Checkpoint, hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.load import load_text_encoders, load_unets, load_vae, noise_schedule
from afa_jax.weights.opened import text_config, unet_config, vae_config
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


def find_checkpoints(config: ConfigDict) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Return the checkpoint of a config's ``base``, and those of its ``experts`` by name; see experts/sources.py.

    Raises:
        InputError: there are no experts, two share a name, or one is missing or cannot be read.
    """
    return sources.find_checkpoints(config.base, config.experts)


class Mismatch(NamedTuple):
    """A reason why an expert cannot be fused with the others: what differs, and a message about it."""

    expert: str
    what: str
    message: str


def check_base(base: Checkpoint, what: str, advice: str) -> Path:
    """Return a base model's tokenizer.

    Raises:
        InputError: it has no VAE or no tokenizer; ``advice`` says how to provide one.
    """
    lacking = {} if "vae" in base.components else {"VAE": "take a base model that has one"}
    if base.tokenizer is None:
        lacking["tokenizer"] = f"{advice}, such as the hub's openai/clip-vit-large-patch14"
    if lacking or base.tokenizer is None:
        raise InputError(f"{what} has no {' and no '.join(lacking)}; {', and '.join(lacking.values())}")
    return base.tokenizer


def mismatches(base: Checkpoint, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Mismatch]:
    """Yield all reasons why these experts cannot be fused, from their config files alone.

    The noise schedule and prediction type must be the base model's; an expert without a scheduler is assumed to have
    them. U-Net and text encoder must have the first expert's architecture, and the latents must fit the base's VAE.

    Raises:
        InputError: a config is missing, or belongs to another family of models.
    """
    schedule = noise_schedule(base)
    for name, checkpoint in checkpoints.items():
        if "scheduler" in checkpoint.components:
            try:
                own = noise_schedule(checkpoint)
            except ScheduleError as error:
                yield Mismatch(name, "scheduler", f"expert {name!r}: {error}")
                continue
            for field in ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
                if getattr(own, field) != getattr(schedule, field):
                    yield Mismatch(
                        name,
                        field,
                        f"expert {name!r} was trained with {field} {getattr(own, field)!r}, "
                        f"the base model with {getattr(schedule, field)!r}; they cannot be fused",
                    )
    names, unets = list(checkpoints), [unet_config(checkpoint) for checkpoint in checkpoints.values()]
    for name, message in different_architectures(unets, names):
        yield Mismatch(name, "architecture", message)
    encoders = [text_config(checkpoint) for checkpoint in checkpoints.values()]
    for name, encoder in zip(names, encoders, strict=True):
        for field in _different_fields(encoders[0], encoder):
            a, b = getattr(encoders[0], field), getattr(encoder, field)
            message = f"experts {names[0]!r} and {name!r} have different text encoders: {field} is {a!r} and {b!r}"
            yield Mismatch(name, "text encoder", message)
    for name, unet, encoder in zip(names, unets, encoders, strict=True):
        if encoder.hidden_size != unet.cross_attention_dim:
            taken = f"its U-Net takes {unet.cross_attention_dim}"
            yield Mismatch(name, "text states", f"expert {name!r}: text states are {encoder.hidden_size} wide, {taken}")
    channels = vae_config(base).latent_channels
    for name, unet in zip(names, unets, strict=True):
        if unet.in_channels != channels:
            taken = f"expert {name!r}'s U-Net takes {unet.in_channels} ({unet.task})"
            yield Mismatch(name, "latents", f"the base model's VAE has {channels} latent channels, {taken}")


def check_same_layers(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise InputError for text encoders with different numbers of layers (clip skip), which cannot be averaged."""
    layers = {name: text_config(checkpoint).num_hidden_layers for name, checkpoint in checkpoints.items()}
    if len(set(layers.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in layers.items())
        raise InputError(
            f"the experts' text encoders have different num_hidden_layers ({counts}), so that their weights cannot be "
            "averaged; take experts of one clip skip, or a method that keeps them apart"
        )


def record_of(checkpoints: Mapping[str, Checkpoint]) -> list[dict[str, str]]:
    """Return the names and hashes of experts that need not be loaded, in the form of ``Experts.record``."""
    return [dict(name=name, sha256=hash_components(own, EXPERT_COMPONENTS)) for name, own in checkpoints.items()]


def check_record(record: Mapping[str, Any], experts: Sequence[Mapping[str, str]], what: str) -> None:
    """Compare the experts that ``what`` was trained with to those at hand, as ``Experts.record`` lists them.

    Raises:
        InputError: the number, order or content differs, or the record is no such list.
    """
    stored = check_experts(record.get("experts", []), f"{what}: experts")
    theirs, ours = ([expert["name"] for expert in some] for some in (stored, experts))
    if theirs != ours:
        raise InputError(
            f"{what} was trained with the experts {', '.join(theirs)}, in this order; the config has {', '.join(ours)}"
        )
    for entry, expert in zip(stored, experts, strict=True):
        if entry["sha256"] != expert["sha256"]:
            raise InputError(f"{what} was trained with another expert {entry['name']!r}: its weights differ (sha256)")


def _different_fields(one: TextConfig, other: TextConfig) -> list[str]:
    # Not the layers: with clip skip an encoder has fewer of them, and its states fit all the same.
    names = [field.name for field in dataclasses.fields(one) if field.name not in ("eos_token_id", "num_hidden_layers")]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def frozen(experts: Experts) -> dict[str, Any]:
    """Return a run's networks whose arrays never change, as one argument of a jitted step."""
    return dict(unet=experts.unet, text_encoder=experts.text_encoder, vae=experts.vae)


def with_fusion(fusion: Any, experts: Experts) -> tuple[Any, Experts]:
    """Return the Denoiser of a trained fusion, and the experts to sample it with.

    The experts stay the same unless the fusion has block weights: then their U-Nets and text encoders are merged here,
    once, and the merged networks replace them as stacks of one.
    """
    denoiser, text_encoder = fusion.assemble(experts.unet, experts.text_encoder)
    return denoiser, dataclasses.replace(experts, unet=denoiser.experts, text_encoder=text_encoder)
