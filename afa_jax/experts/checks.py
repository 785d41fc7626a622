"""Whether experts fit each other, the base model and a record of them: from their files, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from afa_jax.diffusion.schedule import ScheduleError
from afa_jax.errors import InputError
from afa_jax.experts import sources
from afa_jax.experts.architectures import different_architectures
from afa_jax.fusion.pair_record import check_experts
from afa_jax.models.configs import TextConfig
from afa_jax.weights.checkpoint import Checkpoint, hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.opened import noise_schedule, text_config, unet_config, vae_config


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
    """Compare the experts with which ``what`` was trained to those at hand, as ``Experts.record`` lists them.

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
    # The layers may differ: with clip skip an encoder has fewer of them, and its states still fit.
    names = [field.name for field in dataclasses.fields(one) if field.name not in ("eos_token_id", "num_hidden_layers")]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
