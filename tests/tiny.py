"""Tiny networks with random, not zero, weights: small enough to run anywhere, differing enough to fuse."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import sample
from afa_jax.fusion.afa import Aggregators, SABWConfig
from afa_jax.models.clip import TextEncoder
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.trees import dotted
from afa_jax.weights.networks import abstract_network

T = TypeVar("T")

# Four levels, as SD1.5, so that there are 25 stages.
UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16, 16, 16),
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)
# Two levels with attention in the middle only: 9 stages, and a fraction of the compile time.
SMALL_UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)
# One level: 5 stages, for what needs many compilations.
MICRO_UNET = dataclasses.replace(
    SMALL_UNET, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
)
SABW = SABWConfig(hidden=8, transformer_layers=1, heads=2, norm_num_groups=4)
# Without transformer blocks: two thirds of the compile time.
PLAIN_SABW = dataclasses.replace(SABW, transformer_layers=0)
TEXT = TextConfig(
    vocab_size=674,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    eos_token_id=673,
)
VAE_CONFIG = VAEConfig(
    block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.5
)


def randomised(tree: T, seed: int) -> T:
    """The same tree with every parameter random: a zero weight hides mistakes."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = dotted(path)
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        values = rng.standard_normal(leaf.shape)
        if name.endswith("kernel"):
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif name.endswith("scale"):
            values = 1 + 0.1 * values
        else:
            values *= 0.2
        return np.asarray(values, np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, tree))


def unet(seed: int, config: UNetConfig = SMALL_UNET) -> UNet:
    return randomised(abstract_network(config)[0], seed)


def text_encoder(seed: int) -> TextEncoder:
    return randomised(abstract_network(TEXT)[0], seed)


def vae(seed: int) -> VAE:
    return randomised(abstract_network(VAE_CONFIG)[0], seed)


def aggregators(experts: int, config: UNetConfig = SMALL_UNET, sabw: SABWConfig = SABW, seed: int = 0) -> Aggregators:
    """Untrained, as training starts: conv_out is zero."""
    stages = list(abstract_network(config)[0].stages)
    return Aggregators(sabw, experts, stages, config, rngs=nnx.Rngs(seed))


def trained(experts: int, config: UNetConfig = SMALL_UNET, sabw: SABWConfig = SABW, seed: int = 0) -> Aggregators:
    """Random in every parameter, so that their maps are far from even."""
    return randomised(_abstract_aggregators(experts, config, sabw), seed)


@functools.cache
def _abstract_aggregators(experts: int, config: UNetConfig, sabw: SABWConfig) -> Aggregators:
    return jax.eval_shape(lambda: aggregators(experts, config, sabw))


def inputs(batch: int, experts: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> tuple[Any, Any, Any]:
    """Latents, timesteps that differ, and the experts' conditioning."""
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.standard_normal((batch, *size, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, 1000, batch), jnp.int32),
        Conditioning(text=jnp.asarray(rng.standard_normal((experts, batch, 5, 8)), jnp.float32)),
    )


def copies(conditioning: Conditioning, count: int) -> Conditioning:
    """The first expert's, so often."""
    return jax.tree.map(lambda own: jnp.repeat(own[:1], count, axis=0), conditioning)


def ddim(
    predict: Any, schedule: Any, x: Any, *, steps: int, eta: float = 0.0, strength: float = 1.0, **options: Any
) -> Any:
    """Samples by DDIM."""
    sampler = DDIM(schedule=schedule, eta=eta)
    return sample(sampler, predict, x, sampler.constants(steps, strength), **options)
