"""DDIM (Song et al. 2021, arXiv 2010.02502)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.types import Latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMConstants:
    """The numbers of each step, ``[steps]`` each, with a_t of this timestep and a_s of the next.

    Attributes:
        t: the training timestep.
        signal, sigma: sqrt(a_t), sqrt(1 - a_t).
        next_signal, next_sigma: sqrt(a_s), sqrt(1 - a_s - std^2).
        std: the standard deviation of the fresh noise, eta * sqrt((1 - a_s) / (1 - a_t)) * sqrt(1 - a_t / a_s) (eq.
            16).
    """

    t: Any
    signal: Any
    sigma: Any
    next_signal: Any
    next_sigma: Any
    std: Any


jax.tree_util.register_dataclass(
    DDIMConstants, data_fields=[field.name for field in dataclasses.fields(DDIMConstants)], meta_fields=[]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """The Sampler of eq. 12, one evaluation a step.

    Attributes:
        schedule: the experts' noise schedule.
        eta: 0 is deterministic, 1 has the variance of DDPM.

    Raises:
        InputError: a negative eta.
    """

    schedule: NoiseSchedule
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise InputError(f"eta={self.eta}; choose 0 or more")

    @property
    def adds_noise(self) -> bool:
        """Return whether eta is above 0."""
        return self.eta > 0

    def constants(self, steps: int, strength: float = 1.0) -> DDIMConstants:
        """Return the constants of the steps, float32; see Sampler.constants."""
        if not 0 < strength <= 1:
            raise InputError(f"strength={strength}; choose more than 0, at most 1")
        t = self.schedule.timesteps(steps)
        # float64 here costs nothing; the constants become float32 at the end.
        alphas = self.schedule.alphas_cumprod.astype(np.float64)
        last = 1.0 if self.schedule.set_alpha_to_one else alphas[0]
        s = t - self.schedule.num_train_timesteps // steps
        a_t, a_s = alphas[t], np.where(s >= 0, alphas[np.maximum(s, 0)], last)
        std = self.eta * np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        first = steps - max(1, min(steps, int(steps * strength)))

        def of_steps(values: np.ndarray) -> jax.Array:
            return jnp.asarray(values[first:], jnp.float32)

        return DDIMConstants(
            t=jnp.asarray(t[first:]),
            signal=of_steps(np.sqrt(a_t)),
            sigma=of_steps(np.sqrt(1 - a_t)),
            next_signal=of_steps(np.sqrt(a_s)),
            next_sigma=of_steps(np.sqrt(np.maximum(1 - a_s - std**2, 0))),
            std=of_steps(std),
        )

    def start(self, x: Latents) -> tuple[()]:
        """Return no memory: a step depends on nothing before it."""
        return ()

    def step(
        self, k: DDIMConstants, x: Latents, prediction: Latents, memory: tuple[()], noise: Latents | None
    ) -> tuple[Latents, tuple[()]]:
        """Return x at the next timestep: ``sqrt(a_s) x_0 + sqrt(1 - a_s - std^2) eps + std noise`` (eq. 12)."""
        x0, eps = self.schedule.split(x, prediction, k.signal, k.sigma)
        x = k.next_signal * x0 + k.next_sigma * eps
        return (x if noise is None else x + k.std * noise), memory
