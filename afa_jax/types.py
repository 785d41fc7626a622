"""Array shapes used in every public signature.

Letters: ``n`` experts, ``b`` batch, ``h w`` rows and columns of latents or features, ``c`` channels, ``s`` tokens,
``d`` width of a vector. Pictures and features are NHWC. Shapes are checked while the tests run (jaxtyping's pytest
hook) and cost nothing in production.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:
    from jax import Array as Array
else:
    Array = Any  # anything with a shape and a dtype, so that a noise schedule can be read without JAX

Images = Float[Array, "b height width 3"]
"""Pictures in [-1, 1]."""
Pixels = UInt8[Array, "b height width 3"]
"""Pictures in 0..255."""
Latents = Float[Array, "b h w c"]
"""Scaled VAE latents, noise, or a prediction of a U-Net."""
Timesteps = Int[Array, " b"]
"""Training timesteps, 0 (clean) to 999 (noise)."""
TokenIds = Int[Array, "b s"]
TextStates = Float[Array, "b s d"]
"""Last hidden states of one text encoder."""
ExpertTextStates = Float[Array, "n b s d"]
"""Last hidden states of the experts' own text encoders for the same prompts."""
OwnTextStates = Float[Array, "own b s d"]
"""ExpertTextStates of the experts on one device of a mesh; without a mesh, of all experts."""
Feature = Float[Array, "b h w c"]
Features = Float[Array, "n b h w c"]
"""The experts' features at one site."""
OwnFeatures = Float[Array, "own b h w c"]
"""Features of the experts on one device of a mesh; without a mesh, of all experts."""
TimeEmbedding = Float[Array, "b time_width"]
Maps = Float[Array, "n b h w"]
"""The weight of each expert at each pixel of a site; sums to one over n."""
SiteMaps = tuple[Float[Array, "n b _ _"], ...]
"""The maps of all fused sites, each of its own size."""
