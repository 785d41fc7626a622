"""The Denoiser protocols that a sampler calls, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from afa_jax.models.conditioning import Conditioning, join_rows
from afa_jax.types import Latents, SiteMaps, Timesteps


@runtime_checkable
class Denoiser(Protocol):
    """Any combination of N checkpoints into one prediction."""

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the prediction, float32, of latents ``[b, h, w, c]`` at timesteps ``[b]``."""
        ...


@runtime_checkable
class PathDenoiser(Protocol):
    """A combination that needs each expert's conditional and unconditional prediction, or a memory of the path."""

    def start(self, latents: Latents) -> Any:
        """Return the memory before the first step: a tree of arrays, ``()`` for none."""
        ...

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Any,
    ) -> tuple[Latents, Any]:
        """Return the guided prediction, float32, and the memory for the next evaluation; t is the same in all rows."""
        ...


@runtime_checkable
class MappedPathDenoiser(PathDenoiser, Protocol):
    """A PathDenoiser with maps."""

    def guided_with_maps(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Any,
    ) -> tuple[tuple[Latents, SiteMaps], Any]:
        """Return what ``guided`` does, with the conditional half's maps beside the prediction."""
        ...


def gives_maps(denoiser: Denoiser | PathDenoiser) -> bool:
    """Return whether a method, as it is sampled, gives each expert's weight at each pixel."""
    if isinstance(denoiser, PathDenoiser):
        return isinstance(denoiser, MappedPathDenoiser)
    return hasattr(denoiser, "with_maps")


def guided(
    denoiser: Callable[[Latents, Timesteps, Conditioning], Any],
    conditional: Conditioning,
    unconditional: Conditioning,
    scale: Any,
    *,
    has_maps: bool = False,
) -> Callable[[Latents, Timesteps], Any]:
    """Guide a Denoiser without a classifier (Ho and Salimans 2022, arXiv 2207.12598): ``u + scale (c - u)``.

    Both halves run as one batch, unconditional first.

    Args:
        scale: a number, or an array of one; the number 1 is the conditional prediction alone.
        has_maps: the denoiser returns ``(prediction, maps)``; so does the result, with the conditional half's maps.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoiser(x, t, conditional)
    both = join_rows(unconditional, conditional)

    def predict(x: Latents, t: Timesteps) -> Any:
        answer = denoiser(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        prediction, maps = answer if has_maps else (answer, ())
        u, c = jnp.split(prediction, 2)
        mixed = u + scale * (c - u)
        return (mixed, jax.tree.map(lambda m: m[:, x.shape[0] :], maps)) if has_maps else mixed

    return predict
