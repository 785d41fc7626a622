"""The frozen parts of a run: experts, shared VAE and tokenizer, noise schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from afa_jax.data.text import Tokenizer
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.ensemble import stack_experts
from afa_jax.models.clip import TextEncoder
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.parallel import Mode, map_experts, stack
from afa_jax.types import ExpertTextStates, TokenIds
from afa_jax.weights.folders import load_scheduler_config, load_text_encoder, load_unet, load_vae, weights_file

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """N frozen experts in a fixed order; the order is part of a trained aggregator.

    Attributes:
        names: unique.
        hashes: sha256 of each expert's U-Net and text encoder files.
        vae_hash: sha256 of the VAE's file.
        unet: a stack of N U-Nets.
        text_encoder: a stack of N text encoders.
        vae, tokenizer, schedule: of the base model, shared.
    """

    names: tuple[str, ...]
    hashes: tuple[str, ...]
    vae_hash: str
    unet: UNet
    text_encoder: TextEncoder
    vae: VAE
    tokenizer: Tokenizer
    schedule: NoiseSchedule

    def index(self, name: str) -> int:
        """Position of an expert.

        Raises:
            InputError: no expert has this name; lists those there are.
        """
        if name not in self.names:
            raise InputError(f"no expert {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise InputError for pictures whose sides, in pixels, VAE and U-Net cannot halve often enough."""
        factor = self.vae.config.factor * self.unet.config.factor
        if any(side < factor or side % factor for side in size):
            raise InputError(f"size {size[0]}x{size[1]}: both sides must be multiples of {factor}")

    @property
    def record(self) -> list[dict[str, str]]:
        """Names and hashes in order, for checkpoints and published files."""
        return [dict(name=name, sha256=sha) for name, sha in zip(self.names, self.hashes, strict=True)]


def load_experts(
    config: ConfigDict, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> Experts:
    """Load what a config names: ``base`` (VAE, tokenizer, schedule) and ``experts``, a list of ``{name, path}``.

    Paths are diffusers folders, or ids of such repositories on the Hugging Face hub.

    Raises:
        InputError: a missing or damaged file; two experts with one name or of different architectures, text encoders
            or prediction types.
    """
    if not config.experts:
        raise InputError("experts is empty; name at least one")
    names = tuple(expert["name"] for expert in config.experts)
    if len(set(names)) < len(names):
        raise InputError(f"experts have the same name: {', '.join(names)}")
    base = resolve(config.base, ("vae", "tokenizer", "scheduler"))
    schedule = NoiseSchedule.from_json(load_scheduler_config(base))
    folders = [resolve(expert["path"], ("unet", "text_encoder", "scheduler")) for expert in config.experts]
    for name, folder in zip(names, folders, strict=True):
        if (folder / "scheduler" / "scheduler_config.json").is_file():
            own = NoiseSchedule.from_json(load_scheduler_config(folder))
            for field in ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
                if getattr(own, field) != getattr(schedule, field):
                    raise InputError(
                        f"expert {name!r} was trained with {field} {getattr(own, field)!r}, "
                        f"the base model with {getattr(schedule, field)!r}; they cannot be fused"
                    )
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    unet = stack_experts([load_unet(folder, **kwargs) for folder in folders], names)
    encoders = [load_text_encoder(folder, **kwargs) for folder in folders]
    for name, encoder in zip(names, encoders, strict=True):
        _same_text_encoder(names[0], encoders[0], name, encoder)
    vae = load_vae(base, **kwargs)
    if vae.config.latent_channels != unet.config.in_channels:
        raise InputError(
            f"the base model's VAE has {vae.config.latent_channels} latent channels, "
            f"expert {names[0]!r}'s U-Net takes {unet.config.in_channels}"
        )
    return Experts(
        names=names,
        hashes=tuple(_hash(folder, "unet", "text_encoder") for folder in folders),
        vae_hash=_hash(base, "vae"),
        unet=unet,
        text_encoder=stack(encoders),
        vae=vae,
        tokenizer=Tokenizer(base),
        schedule=schedule,
    )


def resolve(path: str, components: Sequence[str]) -> Path:
    """A local folder as it is; a hub id becomes the folder of its snapshot, with these components downloaded.

    Raises:
        InputError: neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_ID.fullmatch(path):
        raise InputError(f"{path}: no such folder, and not a hub id like owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Only what is read. Pickles are not fetched: a repository that has nothing else lacks a safetensors file, by name.
    files = [f"{component}/*.{suffix}" for component in components for suffix in ("json", "txt", "safetensors")]
    try:
        return Path(snapshot_download(path, allow_patterns=["model_index.json", *files], ignore_patterns="*non_ema*"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: no such folder, and not to be had from the hub ({reason})") from error


def encode_prompts(text_encoder: TextEncoder, ids: TokenIds, mode: Mode | None = None) -> ExpertTextStates:
    """The text states ``[n, b, s, d]`` of N stacked text encoders for the same token ids."""
    return map_experts(lambda encoder, ids: encoder(ids), (text_encoder,), (ids,), mode)


def check_record(record: Mapping[str, Any], experts: Experts, what: str) -> None:
    """Compare the experts that ``what`` was trained with to those at hand.

    Raises:
        InputError: another number, order or content.
    """
    stored: Sequence[Mapping[str, str]] = record.get("experts", [])
    if [e["name"] for e in stored] != list(experts.names):
        raise InputError(
            f"{what} was trained with the experts {', '.join(e['name'] for e in stored)}, in this order; "
            f"the config has {', '.join(experts.names)}"
        )
    for entry, sha in zip(stored, experts.hashes, strict=True):
        if entry["sha256"] != sha:
            raise InputError(f"{what} was trained with another expert {entry['name']!r}: its weights differ (sha256)")


def _same_text_encoder(first_name: str, first: TextEncoder, name: str, other: TextEncoder) -> None:
    for field in dataclasses.fields(first.config):
        a, b = getattr(first.config, field.name), getattr(other.config, field.name)
        if a != b and field.name != "eos_token_id":
            raise InputError(
                f"experts {first_name!r} and {name!r} have different text encoders: {field.name} is {a!r} and {b!r}"
            )
    other.config = first.config


def _hash(folder: Path, *components: str) -> str:
    digest = hashlib.sha256()
    for component in components:
        with open(weights_file(folder, component), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def frozen(experts: Experts) -> dict[str, Any]:
    """The arrays of a run that never change, as one argument of a jitted step."""
    return dict(unet=experts.unet, text_encoder=experts.text_encoder, vae=experts.vae)
