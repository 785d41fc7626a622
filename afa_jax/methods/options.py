"""Sampling options, which all methods have in common."""

from __future__ import annotations

import dataclasses
import functools
import warnings

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
