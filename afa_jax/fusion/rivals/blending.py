"""Experts that run apart and meet only in their predictions: the noise average, and MagicFusion's saliency masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.single import SingleExpert
from afa_jax.mesh.experts import Shared, map_experts
from afa_jax.models.conditioning import Conditioning, join_rows
from afa_jax.trees import axis_size
from afa_jax.types import Features, Latents, Maps, Timesteps

WINDOW = 4
"""Rows and columns of MagicFusion's averaging window; the paper's."""


def predict_each(
    experts: Any,
    latents: Latents,
    t: Timesteps,
    conditioning: Conditioning,
) -> Features:
    """Predict for the same latents with each expert and its own text states, float32 ``[n, b, h, w, c]``.

    Raises:
        ValueError: the numbers of text states and experts differ.
    """
    if axis_size(conditioning) != axis_size(experts):
        raise ValueError(f"text states of {axis_size(conditioning)} experts for a stack of {axis_size(experts)}")
    return map_experts(lambda unet, own, x, t: unet(x, t, own), experts, conditioning, Shared(latents), Shared(t))


def predict_both(
    experts: Any,
    latents: Latents,
    t: Timesteps,
    conditional: Conditioning,
    unconditional: Conditioning,
) -> tuple[Features, Features]:
    """Return each expert's conditional and unconditional prediction, ``[n, b, h, w, c]``, from one batch an expert."""
    both = join_rows(unconditional, conditional)
    predictions = predict_each(experts, jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), both)
    u, c = jnp.split(predictions, 2, axis=1)
    return c, u


def noise_each(schedule: NoiseSchedule, latents: Latents, predictions: Features, t: Timesteps) -> Features:
    """Return the noise that each expert's prediction implies, for any prediction type of the schedule."""
    return jax.vmap(lambda prediction: schedule.noise(latents, prediction, t))(predictions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseAverage:
    """A Denoiser: ``sum_i w_i eps_i`` over the experts' own predictions.

    Classifier-free guidance is linear in the predictions, so guiding the average is averaging the guided predictions;
    and with weights that sum to one, v- and sample-predictions can be averaged as they are.

    Attributes:
        experts: a stack of N U-Nets.
        weights: ``[n]``, summing to one: 1/N each, or whatever a recipe says.
    """

    experts: Any
    weights: Any

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the averaged prediction, float32."""
        predictions = predict_each(self.experts, latents, t, conditioning)
        weights = self.weights.astype(jnp.float32)
        return jnp.einsum("n,nbhwc->bhwc", weights, predictions, precision=jax.lax.Precision.HIGHEST)


jax.tree_util.register_dataclass(NoiseAverage, data_fields=["experts", "weights"], meta_fields=[])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagicFusion:
    """A PathDenoiser: every pixel from the expert in whose guidance it stands out most (saliency-aware noise blending).

    Zhao et al., ICCV 2023 (arXiv 2303.13126). The saliency of expert i is its response to the prompt, seen from the
    general model's unconditional noise: ``S_i = s (c_i - u_g)``. Its magnitude is averaged over the channels and over
    a 4x4 window, and becomes a distribution over the pixels, ``softmax(k_i L_i)``, so that a pixel counts by its share
    of its own expert's saliency. The pixel takes ``E_i = u_i + s (c_i - u_i)`` of the expert with the largest share:
    here each expert has its own unconditional, as in the authors' code. The general model wins ties. The paper has
    one expert beside the general model; the largest of N is the same rule.

    Attributes:
        experts: a stack of N U-Nets.
        schedule: the experts' noise schedule; saliency is defined on noise, whatever they predict.
        general: index of the general model; the authors' is the base model, Stable Diffusion.
        k: sharpness of the shares, one for all or ``[n]``: a larger k_i gives expert i its salient pixels and the
            others the rest.
        fuse_above: pixels are fused while t > fuse_above, and the general model runs alone afterwards.
        general_first: the other order: the general model runs alone while t > fuse_above, pixels are fused afterwards.
    """

    experts: Any
    schedule: NoiseSchedule
    general: Any = 0
    k: Any = 1.0
    fuse_above: int = 600
    general_first: bool = False

    def start(self, latents: Latents) -> tuple[()]:
        """Return an empty memory, as no step depends on the steps before it."""
        return ()

    def fuses(self, t: Any) -> Any:
        """Return whether all experts run at training timestep t; otherwise only the general model does."""
        return (t > self.fuse_above) != self.general_first

    def evaluations(self, t: int, guidance: float | int) -> int:
        """Count U-Net evaluations a picture at training timestep t, conditional and unconditional ones together."""
        if self.fuses(t):
            return 2 * axis_size(self.experts)
        return 1 if guidance == 1 else 2

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Any,
    ) -> tuple[Latents, Any]:
        """Return the guided prediction, float32, of the schedule's type; and the memory unchanged.

        Args:
            latents: ``[b, h, w, c]``.
            t: ``[b]``, all equal: the first says whether to fuse.
            conditional, unconditional: of each expert, ``[n, b, ...]``.
            scale: of classifier-free guidance; at 1 the unconditional predictions still decide the saliency.
        """

        def fused() -> Latents:
            c, u = predict_both(self.experts, latents, t, conditional, unconditional)
            general = noise_each(self.schedule, latents, u, t)[self.general]
            winner = self.choose(saliency(scale * (noise_each(self.schedule, latents, c, t) - general)))
            return jnp.take_along_axis(u + scale * (c - u), winner[None, ..., None], axis=0)[0]

        def alone() -> Latents:
            general = SingleExpert(experts=self.experts, index=self.general)
            return guided(general, conditional, unconditional, scale)(latents, t)

        return jax.lax.cond(self.fuses(t[0]), fused, alone), memory

    def choose(self, saliencies: Maps) -> Int[Array, "b h w"]:
        """Choose the expert that paints each pixel, from the experts' saliencies ``[n, b, h, w]``."""
        k = jnp.broadcast_to(jnp.asarray(self.k, jnp.float32), saliencies.shape[:1])
        shares = jax.nn.softmax(k[:, None, None, None] * saliencies, axis=(2, 3))
        return jnp.where(shares[self.general] >= shares.max(0), self.general, shares.argmax(0))


jax.tree_util.register_dataclass(
    MagicFusion,
    data_fields=["experts", "general", "k"],
    meta_fields=["schedule", "fuse_above", "general_first"],
)


def saliency(response: Features) -> Float[Array, "n b h w"]:
    """Return the magnitude of the experts' responses to the prompt, mean over channels, smoothed by a 4x4 window.

    The window moves by 1. One row or column of zeros is added on each side and counts in the mean, so the border is
    darker. The result has one row and column less; bilinear interpolation (half-pixel centres) restores the size.
    """
    # Pooling and resizing are linear: the mean over the channels may come first, and there is less to pool.
    magnitude = jnp.abs(response).mean(-1)
    window = (1, 1, WINDOW, WINDOW)
    pooled = jax.lax.reduce_window(magnitude, 0.0, jax.lax.add, window, (1, 1, 1, 1), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return jax.image.resize(pooled / WINDOW**2, magnitude.shape, "linear")
