"""The front end of the training step: what the diffusion loss gets, from pictures and captions or from the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.data.pictures import to_images
from afa_jax.experts.frozen import encode_prompts
from afa_jax.mesh.collectives import divided, own_experts
from afa_jax.models.conditioning import Conditioning
from afa_jax.types import Latents


def row_keys(key: Array, position: Any) -> Array:
    """A key for each row ``[b]``, a function of the run's key and the row's position in the run alone."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(position))


def latents_and_conditioning(
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    keys: Array,
    caption_dropout: float,
    no_caption: Any,
) -> tuple[Latents, Conditioning]:
    """Return sampled, scaled latents and the experts' conditioning, some captions dropped; pure.

    A row key gives the same sample and the same fate of the caption with the cache as without it. It is used up to the
    first two of ``jax.random.split(key, 3)``; the third is for what comes after, such as the loss.

    Args:
        frozen: ``vae`` and ``text_encoder`` (a stack). A cached batch reads none of their arrays: ``vae`` may hold
            shapes only, for its scaling factor, and ``text_encoder`` may be missing.
        batch: ``image`` uint8 ``[b, rows, columns, 3]`` and ``ids`` ``[b, s]``; or, cached, ``mean``, ``std``
            ``[b, h, w, c]`` and ``states`` ``[b, n, s, d]``.
        keys: ``[b]``, as row_keys makes them.
        caption_dropout: probability that a row gets the empty caption.
        no_caption: the empty caption in the batch's form: ids ``[s]``, or the cache's states ``[n, s, d]``.
    """
    latent_keys, drop_keys, _ = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, caption_dropout))(drop_keys)
    if "mean" in batch:
        latents = frozen["vae"].sample(batch["mean"], batch["std"], latent_keys)
        states = jnp.moveaxis(jnp.asarray(batch["states"]), 1, 0)
        nothing = own_experts(jnp.asarray(no_caption))[:, None]
        return latents, Conditioning(text=jnp.where(dropped[:, None, None], nothing, states))
    vae = frozen["vae"]
    latents = divided(lambda pixels, keys: vae.encode(to_images(pixels), keys), batch["image"], latent_keys)
    ids = jnp.where(dropped[:, None], jnp.asarray(no_caption), batch["ids"])
    return latents, encode_prompts(frozen["text_encoder"], ids)
