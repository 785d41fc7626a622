"""SuperDiff: experts weighted by the density each gives to the path so far (Skreta et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.rivals.blending import noise_each, predict_both
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import axis_size
from afa_jax.types import Features, Latents, Timesteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathMemory:
    """SuperDiff's memory of the path.

    Attributes:
        log_densities: of the last point under each expert, ``[n, b]``, up to one constant for all.
        z, sigma: that point and its noise level ``[b]`` in the variance-exploding coordinates.
        noise: the experts' conditional noise there, ``[n, b, h, w, c]``.
    """

    log_densities: Any
    z: Any
    sigma: Any
    noise: Any


jax.tree_util.register_dataclass(
    PathMemory, data_fields=[f.name for f in dataclasses.fields(PathMemory)], meta_fields=[]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperDiff:
    """A PathDenoiser: the OR of the experts, the score of the mixture of their distributions (arXiv 2412.17762).

    The score of ``sum_i q_i`` is the scores' mean weighted by ``softmax_i(log q_i)``. The Ito density estimator
    follows log q_i along the path without a divergence: in the coordinates ``z = x / sqrt(a_t)``, whose noise level is
    ``sigma = sqrt((1 - a_t) / a_t)``,

        ``dlog q_i = -<dz, v_i> / sigma - |dsigma| ||v_i||^2 / sigma``

    with v_i the noise that expert i predicts at z and dz the step that was really taken. As in the authors' code for
    Stable Diffusion, v_i is the conditional prediction, and guidance acts on the step alone: ``sum_i w_i E_i`` with
    ``E_i = u_i + s (c_i - u_i)``. Theirs has one model and N prompts, hence one unconditional; here each expert has
    its own.

    The estimator is that of the reverse SDE: it tends to the true log densities, as the steps become small, with
    eta 1 and no guidance. On a deterministic path (eta 0) dz has no quadratic variation, and the sum lacks
    ``-sigma |dsigma| laplacian(log q_i)`` a step. Experts whose densities are equally curved lack the same, and the
    weights remain right; otherwise the broader densities are favoured. With guidance the path is a sample of no
    expert's SDE, and the weights are a heuristic.

    Attributes:
        experts: a stack of N U-Nets.
        schedule: the experts' noise schedule.
        temperature: factor T of the log densities (the paper's name; large is sharp). Log densities grow with the
            number of latents: at 1 the weights of unlike experts soon are one-hot.
        logits: ``[n]`` or one for all, added to them: the experts' prior, in nats. -inf removes an expert.
    """

    experts: Any
    schedule: NoiseSchedule
    temperature: Any = 1.0
    logits: Any = 0.0

    def start(self, latents: Latents) -> PathMemory:
        """Start with equal log densities, as all experts' distributions nearly agree at the highest noise."""
        count, batch = axis_size(self.experts), latents.shape[0]
        # Without noise the first step adds exactly nothing, wherever the path comes from.
        return PathMemory(
            log_densities=jnp.zeros((count, batch)),
            z=jnp.zeros(latents.shape),
            sigma=jnp.ones((batch,)),
            noise=jnp.zeros((count, *latents.shape)),
        )

    def evaluations(self, t: int, guidance: float | int) -> int:
        """Count U-Net evaluations a picture at timestep t: per expert, a conditional and an unconditional one."""
        return 2 * axis_size(self.experts)

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: PathMemory,
    ) -> tuple[Latents, PathMemory]:
        """Return the guided prediction, float32, of the schedule's type; and the memory with this point added.

        Args:
            latents: ``[b, h, w, c]``.
            t: ``[b]``.
            conditional, unconditional: ``[n, b, s, d]``.
            scale: of classifier-free guidance; 1 means no guidance.
            memory: of the step before, or ``start``'s.
        """
        c, u = predict_both(self.experts, latents, t, conditional, unconditional)
        memory = self.advance(memory, latents, t, noise_each(self.schedule, latents, c, t))
        # The weights sum to one, so predictions of any type may be averaged.
        weights, precision = self.weights(memory), jax.lax.Precision.HIGHEST
        return jnp.einsum("nb,nbhwc->bhwc", weights, u + scale * (c - u), precision=precision), memory

    def advance(self, memory: PathMemory, latents: Latents, t: Timesteps, noise: Features) -> PathMemory:
        """Add the log densities of the step from the memory's point to this one, where the experts see ``noise``."""
        alpha = jnp.asarray(self.schedule.alphas_cumprod)[t]
        z, sigma = latents / jnp.sqrt(alpha)[:, None, None, None], jnp.sqrt((1 - alpha) / alpha)
        along = jnp.einsum("bhwc,nbhwc->nb", z - memory.z, memory.noise, precision=jax.lax.Precision.HIGHEST)
        energy = jnp.square(memory.noise).sum((2, 3, 4))
        change = -(along + jnp.abs(sigma - memory.sigma) * energy) / memory.sigma
        return PathMemory(log_densities=memory.log_densities + change, z=z, sigma=sigma, noise=noise)

    def weights(self, memory: PathMemory) -> Float[Array, "n b"]:
        """Return ``softmax_i(T log q_i + logit_i)``, the experts' weights for each picture."""
        logits = jnp.broadcast_to(jnp.asarray(self.logits, jnp.float32), memory.log_densities.shape[:1])
        return jax.nn.softmax(self.temperature * memory.log_densities + logits[:, None], axis=0)


jax.tree_util.register_dataclass(SuperDiff, data_fields=["experts", "temperature", "logits"], meta_fields=["schedule"])
