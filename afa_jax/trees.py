"""Trees of arrays: leaves by dotted path, and N trees of one structure as one with a leading axis N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a module or any pytree by dotted path, without the ``value`` that NNX variables add."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {dotted(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, flat: Mapping[str, Any]) -> Any:
    """Return a tree like ``tree``, whose leaves may be shapes, with the arrays of ``flat``, named as by ``flatten``."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[dotted(path)], tree)


def shapes_of(tree: T) -> T:
    """Return the tree with shapes and dtypes in place of its arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def dotted(path: tuple[Any, ...]) -> str:
    """Return a key path as dotted text: ``stages.0.conv_in.kernel``."""
    parts = [str(getattr(entry, "name", getattr(entry, "idx", getattr(entry, "key", entry)))) for entry in path]
    return ".".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def stack(trees: Sequence[T]) -> T:
    """Stack N trees of one structure into one tree with a leading axis N on every leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: T, index: Any) -> T:
    """Return the tree at one index of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def axis_size(tree: Any) -> int:
    """Return the common length of the leaves' leading axis."""
    return int(jax.tree.leaves(tree)[0].shape[0])


def parameter_count(tree: Any) -> int:
    """Return the number of parameters of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
