"""What a sampler drives: the Denoiser protocols, and classifier-free guidance around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from afa_jax.types import ExpertTextStates, Latents, Timesteps


@runtime_checkable
class Denoiser(Protocol):
    """Any way of turning N checkpoints into one prediction."""

    def __call__(self, latents: Latents, t: Timesteps, conditioning: ExpertTextStates) -> Latents:
        """Latents ``[b, h, w, c]``, timesteps ``[b]``, text states ``[n, b, s, d]`` -> prediction, float32."""
        ...


@runtime_checkable
class PathDenoiser(Protocol):
    """A way that needs each expert's conditional and unconditional prediction, or remembers the path it came."""

    def start(self, latents: Latents) -> Any:
        """What it remembers before the first step: a tree of arrays, ``()`` for nothing."""
        ...

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: ExpertTextStates,
        unconditional: ExpertTextStates,
        scale: float | int,
        memory: Any,
    ) -> tuple[Latents, Any]:
        """The guided prediction, float32, and what to remember; t is the same in all rows."""
        ...


def guided(
    denoiser: Callable[[Latents, Timesteps, ExpertTextStates], Any],
    conditional: ExpertTextStates,
    unconditional: ExpertTextStates,
    scale: float,
    *,
    has_maps: bool = False,
) -> Callable[[Latents, Timesteps], Any]:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): ``u + scale (c - u)`` on the fused prediction.

    Both halves run as one batch, unconditional first. A scale of 1 is the conditional prediction alone.

    Args:
        has_maps: the denoiser returns ``(prediction, maps)``; so does the result, with the conditional half's maps.
    """
    if scale == 1:
        return lambda x, t: denoiser(x, t, conditional)
    both = jnp.concatenate([unconditional, conditional], axis=1)

    def predict(x: Latents, t: Timesteps) -> Any:
        answer = denoiser(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        prediction, maps = answer if has_maps else (answer, ())
        u, c = jnp.split(prediction, 2)
        mixed = u + scale * (c - u)
        return (mixed, jax.tree.map(lambda m: m[:, x.shape[0] :], maps)) if has_maps else mixed

    return predict
