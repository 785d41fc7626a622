"""A run of ``afa_jax.distil`` as it is read: the model, and the record and the further inputs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afa_jax.errors import InputError
from afa_jax.models.steering import Steering, SteeringConfig
from afa_jax.models.unet import UNet
from afa_jax.trees import flatten, unflatten
from afa_jax.weights.json_files import read_json
from afa_jax.weights.keys import pytorch_name
from afa_jax.weights.state_dicts import load_state_dict, state_dict
from afa_jax.weights.tensors import Tensor, read_tensors, write_tensors

FORMAT = "afa_jax.distilled 1"
RECORD = "distilled.json"
SINGLE, MODEL = "model.safetensors", "model"
"""The distilled model as a single file and as a diffusers folder, with its further inputs baked in."""
STEERING = "distilled.safetensors"
"""The networks of the further inputs, and the time embedding's bias without them."""
_BIAS = "time_embedding.linear_2.bias"


def read_distilled(folder: Path) -> dict[str, Any]:
    """Return the record of a distilled run.

    Raises:
        InputError: it cannot be read, or is of another format.
    """
    record = dict(read_json(folder / RECORD))
    if record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD}: its format is {str(record.get('format'))!r:.40}, not {FORMAT!r}")
    return record


def steering_of(record: Mapping[str, Any], folder: Path) -> SteeringConfig | None:
    """Return the configuration of a model's further inputs from its record; None if it has none."""
    match record.get("steering"):
        case None:
            return None
        case {"width": int(width), "time_width": int(time), "guidance": guidance, "styles": list(styles)}:
            scale = None if guidance is None else (float(guidance[0]), float(guidance[1]))
            return SteeringConfig(width=width, time_width=time, guidance=scale, styles=tuple(map(str, styles)))
    raise InputError(f"{folder / RECORD}: its steering is damaged; end the run again with --resume")


def style_weights(style: Any, styles: Sequence[str]) -> np.ndarray | None:
    """Return the share of each style, ``[n]``, from weights by name; without any, all alike. None without styles.

    Raises:
        InputError: a name is none of the styles, or the model has none.
    """
    if not styles:
        if style:
            raise InputError(f"style {next(iter(style))!r}: this model has no styles; leave it out")
        return None
    if not style:
        return np.full(len(styles), 1 / len(styles), np.float32)
    if unknown := [name for name in style if name not in styles]:
        raise InputError(f"style {unknown[0]!r}: no teacher has it; there are {', '.join(styles)}")
    weights = np.array([float(style.get(name, 0)) for name in styles], np.float32)
    return weights / weights.sum()


def save_steering(folder: Path, steering: Steering, unet: UNet) -> None:
    """Write the further inputs of a U-Net, into whose weights they are not baked."""
    bias = np.asarray(flatten(unet)[_BIAS], np.float32)
    tensors = state_dict(steering, _key) | {_BIAS: Tensor.of(bias)}
    write_tensors(folder / STEERING, tensors, {"format": "pt"})


def load_steered(folder: Path, config: SteeringConfig, unets: Any) -> tuple[Any, Steering]:
    """Return a stack of one U-Net, read from a run, without what is baked in; and its further inputs.

    Raises:
        WeightsError: the file is missing or damaged, or does not fit.
    """
    path = folder / STEERING
    tensors = dict(read_tensors(path))
    bias = tensors.pop(_BIAS, None)
    if bias is None:
        raise InputError(f"{path}: it has no {_BIAS}; end the run again with --resume")
    shapes = jax.eval_shape(lambda: Steering(config, rngs=nnx.Rngs(0)))
    steering: Steering = load_state_dict(shapes, tensors, _key, what=str(path), param_dtype=jnp.float32)
    flat = flatten(unets)
    whole = {_BIAS: jnp.asarray(bias)[None].astype(flat[_BIAS].dtype)}
    return unflatten(unets, flat | whole), steering


def baked(unet: UNet, steering: Steering, guidance: float | None, style: np.ndarray | None) -> UNet:
    """Return a U-Net that needs no further input, for one guidance scale and style: they are a part of its bias."""
    scale = None if guidance is None else jnp.full(1, guidance, jnp.float32)
    added = steering(scale, None if style is None else jnp.asarray(style, jnp.float32)[None])[0]
    flat = flatten(unet)
    return unflatten(unet, flat | {_BIAS: flat[_BIAS] + added.astype(flat[_BIAS].dtype)})


def _key(path: str) -> str:
    return f"steering.{path if path == 'vectors' else pytorch_name(path)}"
