"""Strict exchange of state dicts between checkpoints and modules, one tensor in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from afa_jax.trees import dotted, flatten
from afa_jax.weights.expected import check_tensors
from afa_jax.weights.keys import Key, from_pytorch, shape_in_pytorch, to_pytorch
from afa_jax.weights.tensors import Tensor, cast, check_finite

M = TypeVar("M")


def state_dict(module: Any, key: Key, dtype: DTypeLike | None = None) -> dict[str, Tensor]:
    """Return parameters by checkpoint key, in PyTorch's layout; floating-point ones rounded to a given ``dtype``."""
    result = {}
    for path, leaf in flatten(module).items():
        tensor = Tensor.of(leaf).apply(functools.partial(to_pytorch, path), shape_in_pytorch(path, leaf.shape))
        result[key(path)] = tensor if dtype is None else tensor.astype(dtype)
    return result


def load_state_dict(
    abstract: M,
    tensors: Mapping[str, Any],
    key: Key,
    *,
    what: str,
    param_dtype: DTypeLike = jnp.float32,
) -> M:
    """Build the module of these shapes with the parameters of ``tensors``.

    Args:
        abstract: the module with shapes in place of arrays, as ``jax.eval_shape`` makes it.
        tensors: Tensors or arrays by checkpoint key, in PyTorch's layout.
        key: the module's key function.
        what: names the file in errors.
        param_dtype: dtype of the loaded parameters.

    Raises:
        WeightsError: missing, surplus or misshapen keys, or a tensor that is not floating point or not finite, or not
            in ``param_dtype``.
    """
    check_state_dict(abstract, tensors, key, what=what)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return _on_device(_loaded(dotted(path), what, tensors, key, param_dtype))

    return jax.tree_util.tree_map_with_path(load, abstract)


def load_stack(
    abstract: M,
    states: Sequence[tuple[str, Mapping[str, Any]]],
    key: Key,
    *,
    param_dtype: DTypeLike = jnp.float32,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> M:
    """Load N models of one architecture as one whose leaves have a leading axis N; else as load_state_dict.

    Memory holds the stack and the N tensors of one leaf, never a whole model beside the stack.

    Args:
        states: each model's file name for errors, and its tensors.
        sharding: returns the sharding of a leaf of this path and shape. A process then reads what its devices hold.

    Raises:
        WeightsError: as load_state_dict.
    """
    for what, tensors in states:
        check_state_dict(abstract, tensors, key, what=what)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = dotted(path), (len(states), *leaf.shape)
        if sharding is None:
            return _on_device(np.stack([_loaded(name, *state, key, param_dtype) for state in states]))
        read = functools.cache(lambda i: _loaded(name, *states[i], key, param_dtype))  # devices may hold the same

        def part(index: Any) -> np.ndarray:
            return np.stack([read(i)[index[1:]] for i in range(*index[0].indices(len(states)))])

        return jax.make_array_from_callback(shape, sharding(name, shape), part)

    return jax.tree_util.tree_map_with_path(load, abstract)


def _on_device(array: np.ndarray) -> jax.Array:
    return jax.device_put(array)  # jnp.asarray would compile a program for every shape


def _loaded(name: str, what: str, tensors: Mapping[str, Any], to_key: Key, dtype: DTypeLike) -> np.ndarray:
    """Return one parameter, checked, in our layout."""
    array = np.asarray(tensors[to_key(name)])
    check_finite(array, to_key(name), what)
    return cast(from_pytorch(name, array), dtype, to_key(name), what)


def check_state_dict(module: Any, tensors: Mapping[str, Any], key: Key, *, what: str) -> None:
    """Check, as check_tensors, tensors against the parameters of a module, whose leaves may be shapes."""
    wanted = {key(path): shape_in_pytorch(path, leaf.shape) for path, leaf in flatten(module).items()}
    check_tensors(wanted, tensors, what=what)
