"""The golden cases: records, PyTorch's answers, and our networks with the same weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from afa_jax.models.clip import TextEncoder
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.networks import abstract_network
from afa_jax.weights.state_dicts import load_state_dict
from tests.reference.weights import random_input, random_state_dict

GOLDENS = Path(__file__).parent.parent / "goldens"

# Each program runs once, so LLVM need not optimise it: half the compile time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def record(case: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{case}.json").read_text())


@functools.cache
def reference(case: str) -> dict[str, np.ndarray]:
    """Pictures, latents and features as NHWC; the rest as it is."""
    return {key: _nhwc(value) for key, value in load_file(GOLDENS / f"{case}.safetensors").items()}


def weights(case: str, *, published: bool = False) -> dict[str, np.ndarray]:
    """The state dict; ``published`` spells its keys as SD1.5's folder does, without ``position_ids``."""
    shapes = record(case)["parameters"]
    tensors = random_state_dict(case, shapes, record(case)["weight_scale"])
    if not published:
        return tensors
    keys = [key for key in record(case)["parameters_published"] if not key.endswith("position_ids")]
    return dict(zip(keys, tensors.values(), strict=True))


def given(spec: dict[str, Any]) -> jax.Array:
    """An input by its key and shape, pictures as NHWC."""
    return jnp.asarray(_nhwc(random_input(**spec)))


def unet_inputs(case: str, which: str) -> tuple[jax.Array, jax.Array, Conditioning]:
    spec = record(case)["inputs"][which]
    return given(spec["sample"]), jnp.asarray(spec["timestep"]), Conditioning(text=given(spec["encoder_hidden_states"]))


@functools.cache
def unet(case: str) -> UNet:
    config = UNetConfig.from_json(record(case)["config"])
    network, key = abstract_network(config)
    return load_state_dict(network, weights(case), key, what=case)


@functools.cache
def vae(case: str) -> VAE:
    config = VAEConfig.from_json(record(case)["config"])
    network, key = abstract_network(config)
    return load_state_dict(network, weights(case), key, what=case)


@functools.cache
def text_encoder(case: str) -> TextEncoder:
    config = TextConfig.from_json(record(case)["config"])
    tensors = weights(case, published=True)
    network, key = abstract_network(config)
    return load_state_dict(network, tensors, key, what=case)


def deviation(value: Any, expected: Any) -> float:
    """The largest difference over the root mean square of what is expected."""
    value, expected = np.asarray(value, np.float32), np.asarray(expected, np.float32)
    assert value.shape == expected.shape
    return float(np.abs(value - expected).max() / np.sqrt(np.mean(np.square(expected))))


def assert_close(within: float, pairs: dict[str, tuple[Any, Any]]) -> None:
    """All pairs (ours, expected) agree; the message names those that do not."""
    deviations = {name: deviation(*pair) for name, pair in pairs.items()}
    worst = max(deviations, key=lambda name: deviations[name])
    print(f"{worst}: {deviations[worst]:.1e}, the largest deviation of {len(pairs)}")
    assert {name: value for name, value in deviations.items() if not value <= within} == {}


def abstract(create: Callable[[nnx.Rngs], Any]) -> Any:
    """A network's shapes without its memory."""
    return jax.eval_shape(lambda: create(nnx.Rngs(0)))


def _nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
