"""Adaptive feature aggregation: one picture from several text-to-image diffusion models, in JAX and Flax.

``from afa_jax import Ensemble`` is what most people need. It is imported when it is first used; so is JAX.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
