"""Adaptive feature aggregation: one picture from several text-to-image diffusion models, in JAX and Flax."""

__version__ = "0.1.0"
