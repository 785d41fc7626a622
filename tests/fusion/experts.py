"""Experts of a few numbers, whose predictions a test can choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.models.conditioning import Conditioning


@dataclasses.dataclass(frozen=True)
class Echo:
    """An expert that predicts its text states ``[b, h * w, c]``; ``stacked`` only says how many there are."""

    stacked: Any

    def __call__(self, latents: Any, t: Any, conditioning: Any) -> Any:
        return conditioning.text.reshape(latents.shape).astype(jnp.float32)


jax.tree_util.register_dataclass(Echo, data_fields=["stacked"], meta_fields=[])


def echoes(count: int) -> Echo:
    """A stack of them."""
    return Echo(jnp.zeros(count))


def as_text(predictions: np.ndarray) -> Conditioning:
    """Predictions ``[n, b, h, w, c]`` as the text states that make Echo say them."""
    n, b, h, w, c = predictions.shape
    return Conditioning(text=jnp.asarray(predictions, jnp.float32).reshape(n, b, h * w, c))
