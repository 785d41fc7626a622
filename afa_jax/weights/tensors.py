"""Strict exchange of state dicts between safetensors files and modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from afa_jax.errors import InputError
from afa_jax.weights.keys import Key, dotted, flatten, from_pytorch, shape_in_pytorch, to_pytorch

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
M = TypeVar("M")


class WeightsError(InputError):
    """A weights file that cannot be used: the message names the file, the keys and what to do."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, as stored.

    Raises:
        WeightsError: the file is missing, a pickle, truncated, or not safetensors.
    """
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path}: pickled weights are refused, loading them can run any code. Convert them where you trust them: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, "np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error}); fetch or write it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file's header.

    Raises:
        WeightsError: as read_tensors.
    """
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error}); fetch or write it again") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file at once or not at all: to a temporary name beside it, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata=dict(metadata or {}))
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # for the new name to outlive a power cut, too
    finally:
        os.close(folder)


def state_dict(module: Any, key: Key, dtype: DTypeLike | None = None) -> dict[str, np.ndarray]:
    """The parameters by checkpoint key, in PyTorch's layout; floating-point ones cast to ``dtype`` if given."""
    result = {}
    for path, leaf in flatten(module).items():
        array = np.asarray(leaf)
        result[key(path)] = np.ascontiguousarray(to_pytorch(path, array if dtype is None else array.astype(dtype)))
    return result


def load_state_dict(
    create: Callable[[], M],
    tensors: Mapping[str, np.ndarray],
    key: Callable[[M], Key],
    *,
    what: str,
    param_dtype: DTypeLike = jnp.float32,
    ignore: Callable[[str], bool] = lambda name: False,
) -> M:
    """Build the module that ``create`` describes with the parameters of ``tensors``.

    Args:
        create: makes the module; only its shapes are evaluated.
        tensors: by checkpoint key, in PyTorch's layout.
        key: gives the module's key function.
        what: names the file in errors.
        param_dtype: dtype of the loaded parameters.
        ignore: keys that may be surplus, such as ``position_ids`` buffers.

    Raises:
        WeightsError: missing, surplus or misshapen keys, or a tensor that is not floating point.
    """
    abstract = jax.eval_shape(create)
    to_key = key(abstract)
    wanted = {to_key(path): (path, leaf.shape) for path, leaf in flatten(abstract).items()}
    missing = sorted(wanted.keys() - tensors.keys())
    surplus = sorted(name for name in tensors.keys() - wanted.keys() if not ignore(name))
    if missing or surplus:
        raise WeightsError(
            f"{what}: " + "; ".join(filter(None, (_some("missing", missing), _some("surplus", surplus))))
        )
    misshapen = [
        f"{name} is {tensors[name].shape}, expected {shape_in_pytorch(path, shape)}"
        for name, (path, shape) in wanted.items()
        if tensors[name].shape != shape_in_pytorch(path, shape)
    ]
    if misshapen:
        raise WeightsError(f"{what}: " + _some("misshapen", misshapen))
    if wrong := [name for name in wanted if not jnp.issubdtype(tensors[name].dtype, jnp.floating)]:
        raise WeightsError(f"{what}: {_some('not floating point', wrong)}")

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = dotted(path)
        return jnp.asarray(from_pytorch(name, tensors[to_key(name)]).astype(param_dtype))

    return jax.tree_util.tree_map_with_path(load, abstract)


def _some(what: str, names: list[str], most: int = 8) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({', '.join(names[:most])}{rest})"
