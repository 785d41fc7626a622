"""The registry of samplers by name; a new sampler is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable

from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import Sampler

SAMPLERS: dict[str, Callable[..., Sampler]] = dict(ddim=DDIM)
"""The class of each sampler by name, called with ``schedule`` and ``eta``."""
