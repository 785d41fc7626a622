"""Further inputs of a U-Net, added to its time embedding: a guidance scale, and a style."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from afa_jax.models.layers import Linear, timestep_embedding
from afa_jax.models.unet import TimeEmbeddingMLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """The inputs that a U-Net has besides latents, timestep and text.

    Attributes:
        width: the width of its first level, and the width of the scale's sinusoids.
        time_width: the width of the time embedding.
        guidance: lowest and highest guidance scale that it has learnt; None if guidance is no input.
        styles: names of the styles in order; empty if a style is no input.
    """

    width: int
    time_width: int
    guidance: tuple[float, float] | None = None
    styles: tuple[str, ...] = ()


class Steering(nnx.Module):
    """Guidance scale and style -> what is added to the time embedding; it starts at zero.

    The scale enters as in Meng et al. 2023 (arXiv 2210.03142), by sinusoids and two linear layers. A style has a
    learned vector, and two linear layers are shared by all (DMM, arXiv 2504.12364); a mixture of styles is the mixture
    of their vectors.
    """

    def __init__(self, config: SteeringConfig, *, rngs: nnx.Rngs):
        self.config = config
        time = config.time_width
        self.scale = None if config.guidance is None else _from_zero(config.width, time, rngs)
        count = len(config.styles)
        self.vectors = nnx.Param(jax.random.normal(rngs.params(), (count, time))) if count else None
        self.style = _from_zero(time, time, rngs) if count else None

    def __call__(self, scale: Array | None, style: Array | None) -> Array:
        """Return the sum that is added, float32 ``[b, time_width]``.

        Args:
            scale: the guidance scales, ``[b]``.
            style: the weights of the styles ``[b, n]``.
        """
        parts: list[Any] = []
        if self.scale is not None:
            assert scale is not None, "this model takes a guidance scale"
            parts.append(self.scale(timestep_embedding(100 * scale.astype(jnp.float32), self.config.width)))
        if self.style is not None and self.vectors is not None:
            assert style is not None, "this model takes a style"
            parts.append(self.style(style.astype(jnp.float32) @ self.vectors[...]))
        added: Array = sum(parts[1:], parts[0])
        return added


def _from_zero(width: int, out_width: int, rngs: nnx.Rngs) -> TimeEmbeddingMLP:
    made = TimeEmbeddingMLP(width, out_width, rngs=rngs)
    made.linear_2 = Linear(out_width, out_width, zero=True, rngs=rngs)
    return made
