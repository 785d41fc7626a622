"""Random weights and inputs by name, so that golden files need not store them.

Both sides of a parity test call these functions: the scripts that make the golden files (PyTorch, Flax 0.39)
and the tests that read them. A tensor depends on its key and its shape alone. numpy only.
"""

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def _normal(key: str, shape: Sequence[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return generator.standard_normal(tuple(shape))


def random_input(key: str, shape: Sequence[int]) -> np.ndarray:
    """A standard normal float32 array, the same for the same key and shape."""
    return _normal(key, shape).astype(np.float32)


def random_weight(key: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """One float32 parameter. `key` is "<case>/<PyTorch state-dict key>", `shape` is in PyTorch's layout.

    Embeddings 0.5 n; other tensors of rank >= 2 n / sqrt(fan_in); norm weights 1 + 0.1 n; biases 0.1 n.
    `scale` multiplies all but the norm weights: a small one ("faint" cases) makes the epsilons of the norms count.
    """
    normal = _normal(key, shape)
    if len(shape) >= 2:
        spread = 0.5 if key.endswith("embedding.weight") else 1 / math.sqrt(math.prod(shape[1:]))
        value = spread * scale * normal
    elif key.endswith(".weight"):
        value = 1 + 0.1 * normal
    else:
        value = 0.1 * scale * normal
    return value.astype(np.float32)


def random_state_dict(case: str, shapes: Mapping[str, Sequence[int]], scale: float = 1.0) -> dict[str, np.ndarray]:
    """The weights of a whole model: {state-dict key: float32 array}."""
    return {key: random_weight(f"{case}/{key}", shape, scale) for key, shape in shapes.items()}


def shapes_digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """sha256 of the sorted lines "<key> <d0>,<d1>,...", each ended by a newline."""
    lines = sorted(f"{key} {','.join(str(d) for d in shape)}\n" for key, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
