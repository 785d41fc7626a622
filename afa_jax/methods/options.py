"""Sampling options, which all methods have in common."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import numpy as np

from afa_jax.diffusion.samplers.registry import SAMPLERS
from afa_jax.diffusion.samplers.sampler import Sampler
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.mesh.processes import is_process_0

_DDIM = ("DDIM", "DDIMScheduler", "FlaxDDIMScheduler")
"""The names of the only implemented sampler in a base model's scheduler_config.json."""


@functools.cache
def _warn_of_sampler(name: str) -> None:
    """Warn that the base model's scheduler is not implemented; cached, so that it warns once."""
    warnings.warn(f"the base model's scheduler is {name!r:.60}; pictures are sampled by DDIM", stacklevel=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The options of sampling.

    Steps, guidance and the other pictures of a batch do not change the compiled program, unless each step keeps
    something (``keeps_steps``).

    Attributes:
        size: (rows, columns) of the pictures in pixels.
        steps: the number of the sampler's steps.
        guidance: scale of classifier-free guidance; 1 turns it off.
        guidance_interval: the part of the path with guidance, from 0, its noisy start, to 1, its clean end. Outside,
            the unconditional half does not run (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        eta: the sampler's noise: 0 is deterministic, 1 has the variance of DDPM.
        sampler: the sampler's name in SAMPLERS.
        batch: pictures at once. The last batch is padded, so that there is one compilation.
        maps: keep the maps too.
        routing: keep a summary of each step's maps, ``routing_of``: a few numbers per step at any picture size.
        path: keep the clean picture that each step's prediction implies.
        one_by_one: run the pictures of a batch one after another, so that each is bit for bit the same in any batch and
            at any place in it; run together, the last bit of a float can depend on the place. None: on a CPU only,
            where it costs little.
    """

    size: tuple[int, int]
    steps: int = 50
    guidance: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    sampler: str = "ddim"
    batch: int = 4
    maps: bool = False
    routing: bool = False
    path: bool = False
    one_by_one: bool | None = None

    def check(self, experts: Experts) -> None:
        """Raise InputError if these experts cannot be sampled with these options.

        Warn, once in a process, if the base model names a sampler that this project does not implement.
        """
        experts.vae.config.check_size(self.size)
        if self.batch < 1:
            raise InputError(f"a batch of {self.batch}; choose 1 or more")
        if self.guidance < 1:
            raise InputError(f"guidance {self.guidance}; choose 1 (none) or more")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise InputError(f"guidance_interval={low},{high}; choose a part of the path, 0 <= from < to <= 1")
        self.make_sampler(experts.schedule).constants(self.steps)
        if experts.sampler not in _DDIM and is_process_0():
            _warn_of_sampler(experts.sampler)

    def make_sampler(self, schedule: NoiseSchedule) -> Sampler:
        """Return the sampler of a noise schedule.

        Raises:
            InputError: there is no sampler of this name, or it cannot have this eta.
        """
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler={self.sampler!r}; choose {', '.join(SAMPLERS)}")
        return SAMPLERS[self.sampler](schedule=schedule, eta=self.eta)

    @property
    def keeps_steps(self) -> bool:
        """Return whether the result includes something of each step."""
        return self.maps or self.routing or self.path


def guided_timesteps(t: np.ndarray, interval: tuple[float, float]) -> tuple[np.float32, np.float32]:
    """Return the greatest and the least timestep with guidance, of the evaluations' timesteps, descending.

    Args:
        interval: the part of the path with guidance, from 0, its noisy start, to 1, its clean end. The evaluation k of
            K is inside if ``low <= k / K < high``.
    """
    share = np.arange(len(t)) / len(t)
    inside = t[(share >= interval[0]) & (share < interval[1])]
    if not len(inside):
        return np.float32(-np.inf), np.float32(np.inf)
    return np.float32(inside.max()), np.float32(inside.min())
