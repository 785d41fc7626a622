"""One distilled U-Net that takes a style, or its guidance scale, as an input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import take
from afa_jax.types import Latents, Timesteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steered:
    """What both have.

    Attributes:
        experts: a stack of one U-Net.
        steering: its Steering.
        style: weights of its styles, ``[n]`` or by row ``[b, n]``; None if it takes none.
    """

    experts: Any
    steering: Any
    style: Any = None

    def _predict(self, latents: Latents, t: Timesteps, conditioning: Conditioning, scale: Array | None) -> Latents:
        rows = len(latents)
        style = None if self.style is None else jnp.broadcast_to(self.style, (rows, jnp.shape(self.style)[-1]))
        own = dataclasses.replace(take(conditioning, 0), temb=self.steering(scale, style))
        prediction: Latents = take(self.experts, 0)(latents, t, own)
        return prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyledUNet(_Steered):
    """A Denoiser: one U-Net that takes a style."""

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the prediction in its style, float32."""
        return self._predict(latents, t, conditioning, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedUNet(_Steered):
    """A PathDenoiser without memory: one U-Net whose guidance scale is an input, so that a step is one evaluation.

    Meng et al. 2023 (arXiv 2210.03142). The unconditional prompt, and so a negative one, has no effect.
    """

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Return the lowest and the highest scale that it has learnt."""
        low, high = self.steering.config.guidance
        return low, high

    def start(self, latents: Latents) -> tuple[()]:
        """Return no memory."""
        return ()

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Any,
    ) -> tuple[Latents, Any]:
        """Return the guided prediction, float32, from one evaluation; ``scale`` is one for all, or one a row."""
        scales = jnp.broadcast_to(jnp.ravel(jnp.asarray(scale, jnp.float32)), (len(latents),))
        return self._predict(latents, t, conditional, scales), memory


for _class in (StyledUNet, GuidedUNet):
    jax.tree_util.register_dataclass(_class, data_fields=["experts", "steering", "style"], meta_fields=[])
