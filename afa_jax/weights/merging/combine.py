"""Checkpoints made of others: components of several, or weighted averages of several experts' networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, MemoryCheckpoint
from afa_jax.weights.formats.single_file import CONFIGS
from afa_jax.weights.merging.same_network import SameNetwork
from afa_jax.weights.opened import text_config, unet_config, vae_config
from afa_jax.weights.tensors import Tensors, WeightsError

COMPONENTS = (*NETWORKS, "scheduler", "tokenizer")
BASES = ("vae", "scheduler", "tokenizer")  # the components that an ensemble takes from its base model


@dataclasses.dataclass(frozen=True)
class Composed:
    """A Checkpoint whose components come from several others.

    Attributes:
        parts: the checkpoint that each component comes from.
    """

    parts: Mapping[str, Checkpoint]
    path: Path
    metadata: Mapping[str, str]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if name in self.parts)

    @property
    def tokenizer(self) -> Path | None:
        return self.parts["tokenizer"].tokenizer if "tokenizer" in self.parts else None

    def config(self, component: str) -> dict[str, Any]:
        return self._part(component).config(component)

    def tensors(self, component: str) -> Tensors:
        return self._part(component).tensors(component)

    def what(self, component: str, config: bool = False) -> str:
        return self._part(component).what(component, config)

    def sha256(self, component: str) -> str:
        return self._part(component).sha256(component)

    def _part(self, component: str) -> Checkpoint:
        if component not in self.parts:
            raise WeightsError(f"{self.path}: it has no {component}")
        return self.parts[component]


def compose(checkpoint: Checkpoint, **others: Checkpoint) -> Composed:
    """Return the checkpoint with the named components of others: ``compose(expert, vae=base)``."""
    parts = dict.fromkeys(checkpoint.components, checkpoint) | others
    # The configs in a single file's metadata do not apply to others.
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != CONFIGS}
    return Composed(parts, checkpoint.path, metadata)


def check_parts(checkpoint: Checkpoint) -> None:
    """Raise InputError for components that do not fit one another: latents, or the text encoder's width."""
    if "unet" not in checkpoint.components:
        return
    unet = unet_config(checkpoint)
    # Not its input channels: for inpainting they include a mask and a picture.
    if "vae" in checkpoint.components and (channels := vae_config(checkpoint).latent_channels) != unet.out_channels:
        raise InputError(
            f"{checkpoint.what('vae')} has {channels} latent channels, {checkpoint.what('unet')} makes "
            f"{unet.out_channels}; take the VAE of a model of the same kind"
        )
    if "text_encoder" in checkpoint.components:
        width = text_config(checkpoint).hidden_size
        if width != unet.cross_attention_dim:
            raise InputError(
                f"{checkpoint.what('text_encoder')} makes text states of width {width}, {checkpoint.what('unet')} "
                f"takes {unet.cross_attention_dim}; take the text encoder of a model of the same kind"
            )


def with_base(expert: Checkpoint, base: Checkpoint) -> Composed:
    """Return an expert with the base's VAE, tokenizer and schedule, as it is used in the ensemble."""
    others = {name: base for name in BASES if name in base.components}
    return compose(expert, **others)


def average(checkpoints: Sequence[Checkpoint], weights: Mapping[str, Sequence[float]]) -> MemoryCheckpoint:
    """Average U-Nets and text encoders of experts of one architecture, one tensor at a time, with fixed weights.

    Args:
        weights: the experts' weights by block: each stage of the U-Net by its name, ``time_embedding``,
            ``text_encoder``. A block's weights sum to 1.

    Returns:
        A checkpoint of Tensors that are averaged in float32 when they are read. Their dtype is the experts' if it is
        the same in all, else float32.

    Raises:
        WeightsError: as load_unet and load_text_encoder, without reading a tensor. Reading one that is not finite
            raises it, too.
    """
    states = {}
    for component in ("unet", "text_encoder"):
        network = SameNetwork(component, dict(enumerate(checkpoints)))
        states[component] = checkpoints[0].config(component), network.merged(block_average(network, weights))
    return MemoryCheckpoint(states, path=Path("the average of the experts"))


def block_average(
    network: SameNetwork, weights: Mapping[str, Sequence[float]], of: Sequence[Any] | None = None
) -> Callable[[str], np.ndarray]:
    """Return the rule of ``average`` for the sources ``of``, all by default, in the order of the weights."""
    sources = list(network.sources if of is None else of)
    return lambda key: network.weighted_sum(dict(zip(sources, weights[network.block_of[key]], strict=True)), key)
