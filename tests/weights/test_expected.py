"""Names and shapes by formula are those of the networks, in their order, and cost no JAX."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.trees import flatten
from afa_jax.weights.expected import expected_shapes, unet_stages
from afa_jax.weights.keys import shape_in_pytorch
from afa_jax.weights.networks import abstract_network
from tests import tiny

ROOT = Path(__file__).parents[2]
CONFIGS = (
    *(tiny.UNET, tiny.SMALL_UNET, tiny.MICRO_UNET, tiny.VAE_CONFIG, tiny.TEXT, UNetConfig(), VAEConfig(), TextConfig()),
    dataclasses.replace(tiny.UNET, layers_per_block=(1, 2, 1, 3), use_linear_projection=True, in_channels=9),
    dataclasses.replace(tiny.UNET, transformer_layers_per_block=(1, 2, 1, 1)),
    dataclasses.replace(tiny.VAE_CONFIG, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_expected_are_the_networks(config):
    network, key = abstract_network(config)
    built = [(key(path), shape_in_pytorch(path, leaf.shape)) for path, leaf in flatten(network).items()]
    assert list(expected_shapes(config).items()) == built
    if isinstance(config, UNetConfig):
        names = [stage.name for stage in network.stages]
        assert list(dict.fromkeys(unet_stages(config).values())) == [*names, "time_embedding"]


@pytest.mark.parametrize(
    ("kind", "config"),
    [(UNet, tiny.UNET), (VAE, tiny.VAE_CONFIG), (TextEncoder, tiny.TEXT)],
    ids=["unet", "vae", "text"],
)
def test_abstract_networks_are_the_real_ones(kind, config):
    real = jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    network = abstract_network(config, jnp.bfloat16)[0]
    alike: Any = jax.tree.map(lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype), network, real)
    assert jax.tree.all(alike)


def test_looking_at_a_model_needs_no_jax():
    line = "import sys, afa_jax.exporting.inspect; sys.exit(str({'jax', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
