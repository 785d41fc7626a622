"""Conditioning: the inputs of a network besides latents and timestep."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from afa_jax.mesh.experts import Shared, map_experts
from afa_jax.types import TokenIds

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The conditioning of a batch, a tree of arrays with rows ``[b, ...]``; of N experts, ``[n, b, ...]``.

    Guidance, fusions, samplers and trainers pass it on as a tree. So a new kind of conditioning, such as the pooled
    states of another text encoder, is a subclass with one more field: its encoder writes it, its network reads it.

    Attributes:
        text: last hidden states of the text encoder, ``[b, s, d]``.
        temb: what is added to the time embedding, ``[b, d]`` (models/steering.py); None for nothing.
    """

    text: Any
    temb: Any = None


jax.tree_util.register_dataclass(Conditioning, data_fields=["text", "temb"], meta_fields=[])


def join_rows(first: C, second: C) -> C:
    """Return the conditioning of two batches as one, ``[n, b + b', ...]``."""
    return jax.tree.map(lambda one, other: jnp.concatenate([one, other], axis=1), first, second)


def encode_prompts(text_encoder: Any, ids: TokenIds) -> Conditioning:
    """Encode the same token ids with each of N stacked text encoders, ``[n, b, ...]``."""
    return map_experts(lambda encoder, ids: encoder.encode(ids), text_encoder, Shared(ids))
