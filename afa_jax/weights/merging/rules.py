"""The kinds of merges, each a function that returns a rule: from a tensor's key to the merged tensor.

theta_i are an expert's weights, theta_0 the base model's, tau_i = theta_i - theta_0 the expert's task vector. Every
weight names its expert, and ``base`` is the base model. Keyword arguments are the options of a kind.

Of N equal experts average, mbw, slerp and model_stock make that expert; so do task_arithmetic with scales that sum to
1, ties with density 1 and scale 1, dare with p 0 before either of them, and add_difference where c is an expert, too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.names import BASE as BASE
from afa_jax.weights.merging.blocks import parse_blocks
from afa_jax.weights.merging.combine import block_average
from afa_jax.weights.merging.options import fractions, number, numbers, share, whole
from afa_jax.weights.merging.same_network import SameNetwork

OVER_BASE = ("task_arithmetic", "ties", "dare", "model_stock")  # the kinds that start from theta_0
PARALLEL = 0.9995  # above this cosine slerp is linear, as it would divide by a sine near 0
Rule = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """The input of a merge: one network of the experts, and of the base model if it is needed.

    Attributes:
        network: its sources are the experts by name, in order, and perhaps the base model as None.
        stages: the names of the U-Net's stages.
    """

    network: SameNetwork
    stages: tuple[str, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(name for name in self.network.sources if name is not None)

    def source(self, name: Any, what: str) -> str | None:
        """Check a name and return it if it is an expert's, or None if it is the base model's."""
        if name != BASE and name not in self.experts:
            raise InputError(f"{what}={name!r}: no such expert; there are {', '.join(self.experts)}, and {BASE}")
        return None if name == BASE else name

    def delta(self, expert: str, key: str) -> np.ndarray:
        """Return a tensor of a task vector."""
        return self.network.read(expert, key) - self.network.read(None, key)


def average(part: Part, *, weights: Any = None) -> Rule:
    """Merge to sum_i w_i theta_i; weights by name sum to 1, and are 1/N each by default."""
    count = len(part.experts)
    own = [1 / count] * count if weights is None else fractions(weights, part.experts, "average: weights")
    coefficients = dict(zip(part.experts, own, strict=True))
    return lambda key: part.network.weighted_sum(coefficients, key)


def add_difference(part: Part, *, a: Any = None, b: Any = None, c: Any = BASE, alpha: Any = 1.0) -> Rule:
    """Merge to theta_a + alpha (theta_b - theta_c); a, b and c are names, c is the base model by default."""
    alpha = number("add_difference: alpha", alpha)
    coefficients: dict[str | None, float] = {}
    for option, name, weight in (("a", a, 1.0), ("b", b, alpha), ("c", c, -alpha)):
        if name is None:
            raise InputError(
                f"add_difference: {option} is missing; name a and b, of {', '.join(part.experts)}, and {BASE}"
            )
        source = part.source(name, f"add_difference: {option}")
        coefficients[source] = coefficients.get(source, 0.0) + weight
    return lambda key: part.network.weighted_sum(coefficients, key)


def mbw(part: Part, *, weights: Any = None, preset: Any = None, of: Any = None) -> Rule:
    """Average with weights for each block; afa_jax/weights/merging/blocks.py explains the blocks' names."""
    if weights is not None and not isinstance(weights, Mapping):
        raise InputError(f"mbw: weights={weights!r} names no blocks; write dict(IN00=dict({part.experts[0]}=1.0))")
    chosen = {name: str(value) for name, value in dict(preset=preset, of=of).items() if value is not None}
    blocks = parse_blocks(weights or {}, part.experts, part.stages, **chosen)
    return block_average(part.network, blocks, part.experts)


def task_arithmetic(part: Part, *, scale: Any = 0.4, scales: Any = None) -> Rule:
    """Merge to theta_0 + sum_i s_i tau_i (Ilharco et al. 2023, arXiv 2212.04089).

    There is one ``scale`` for all, by default 0.4, which the paper advises where none can be tuned; or ``scales`` by
    name, 0 for experts that are not named. Scales of 1/N give the average.
    """
    own = dict.fromkeys(part.experts, number("task_arithmetic: scale", scale))
    if scales is not None:
        own = numbers(scales, part.experts, "task_arithmetic: scales")
    coefficients: dict[Any, float] = {None: 1 - math.fsum(own.values())} | own
    return lambda key: part.network.weighted_sum(coefficients, key)


def ties(part: Part, *, density: Any = 0.2, scale: Any = 1.0) -> Rule:
    """Merge by TIES: theta_0 + scale times the trimmed, elected, merged vectors (Yadav et al. 2023, arXiv 2306.01708).

    Trim: each network's whole task vector keeps its share ``density`` of the largest magnitudes. Elect: each weight's
    sign is that of the sum of the kept values, so one large change outweighs several small ones; where the sum is 0,
    theta_0 stays. Merge: the mean of the kept values of that sign is taken. Where nothing can be tuned, the paper keeps
    0.2 and scales by 1.
    """
    own = dict(density=share("ties: density", density), scale=number("ties: scale", scale))
    return _elected(part, part.delta, **own)


def dare(
    part: Part, *, p: Any = 0.9, seed: Any = 0, then: Any = "task_arithmetic", scale: Any = None, density: Any = 1.0
) -> Rule:
    """Drop random elements of task vectors, then merge by task arithmetic or ties (Yu et al. 2023, arXiv 2311.03099).

    Each number is dropped with probability p and multiplied by 1 / (1 - p) otherwise. The random numbers depend on
    (seed, expert's name, network, key). ``scale`` is by default that of the rule ``then``. ``density`` is for ties
    only, where by default nothing more is trimmed.
    """
    p = number("dare: p", p)
    if not 0 <= p < 1:
        raise InputError(f"dare: p={p:g}; choose a probability from 0 to below 1")
    seed = whole("dare: seed", seed)

    def delta(expert: str, key: str) -> np.ndarray:
        name = json.dumps([seed, expert, part.network.component, key])
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))
        whole = part.delta(expert, key)
        return np.where(rng.random(whole.shape, np.float32) < p, 0, whole / np.float32(1 - p))

    if then == "ties":
        scale = number("dare: scale", 1.0 if scale is None else scale)
        return _elected(part, delta, density=share("dare: density", density), scale=scale)
    if then != "task_arithmetic":
        raise InputError(f"dare: then={then!r}; choose task_arithmetic or ties")
    if density != 1:
        raise InputError("dare: density is for then=ties; leave it out")
    scale = np.float32(number("dare: scale", 0.4 if scale is None else scale))
    return lambda key: part.network.read(None, key) + scale * sum(delta(expert, key) for expert in part.experts)


def slerp(part: Part, *, a: Any = None, b: Any = None, t: Any = 0.5) -> Rule:
    """Interpolate on the great circle from expert a (t = 0) to b (t = 1), each tensor by itself (Shoemake 1985).

    Tensors that are nearly parallel or zero are interpolated linearly. With more than two experts, a and b must be
    named.
    """
    t = number("slerp: t", t)
    if not 0 <= t <= 1:
        raise InputError(f"slerp: t={t:g}; choose it from 0, all a, to 1, all b")
    if (a is None or b is None) and len(part.experts) != 2:
        raise InputError(f"slerp is between two of the {len(part.experts)} experts; name them, a=... and b=...")
    one = part.source(part.experts[0] if a is None else a, "slerp: a")
    other = part.source(part.experts[1] if b is None else b, "slerp: b")
    if one == other:
        raise InputError(f"slerp: a and b are both {a or one}; name two")

    def rule(key: str) -> np.ndarray:
        cosine = _cosine(part.network.read(one, key), part.network.read(other, key))
        if cosine is None or abs(cosine) > PARALLEL:
            return part.network.weighted_sum({one: 1 - t, other: t}, key)
        angle = math.acos(cosine)
        first, second = (math.sin(way * angle) / math.sin(angle) for way in (1 - t, t))
        return part.network.weighted_sum({one: first, other: second}, key)

    return rule


def model_stock(part: Part) -> Rule:
    """Merge to t mean_i theta_i + (1 - t) theta_0, t = N cos / (1 + (N - 1) cos) (Jang et al. 2024, arXiv 2403.19522).

    cos is the cosine between the experts' task vectors, computed for each tensor by itself. With more than two experts
    it is the mean over the pairs, where a pair with a zero vector counts as 0. If it is negative, t is 0.
    """
    count = len(part.experts)
    if count < 2:
        raise InputError("model_stock: an angle is between two experts or more; name them")

    def rule(key: str) -> np.ndarray:
        deltas = [part.delta(expert, key) for expert in part.experts]
        cosines = [_cosine(*pair) or 0.0 for pair in itertools.combinations(deltas, 2)]
        cosine = max(math.fsum(cosines) / len(cosines), 0.0)
        t = count * cosine / (1 + (count - 1) * cosine)
        return part.network.weighted_sum({None: 1 - t, **dict.fromkeys(part.experts, t / count)}, key)

    return rule


MERGE_RULES: Mapping[str, Callable[..., Rule]] = {
    function.__name__: function
    for function in (average, add_difference, mbw, task_arithmetic, ties, dare, slerp, model_stock)
}


def _elected(part: Part, delta: Callable[[str, str], np.ndarray], *, density: float, scale: float) -> Rule:
    """Return the rule of ties for any task vectors; ``delta(expert, key)`` gives a tensor of one."""

    @functools.cache
    def threshold(expert: str) -> float:
        if density == 1:
            return 0.0
        count = sum(math.prod(tensor.shape) for tensor in part.network.tensors[expert].values())
        keep = max(1, round(density * count))
        return kth_largest(lambda: (np.abs(delta(expert, key)) for key in part.network.keys), keep)

    def rule(key: str) -> np.ndarray:
        deltas = np.stack([delta(expert, key) for expert in part.experts])
        least = np.array([threshold(expert) for expert in part.experts], np.float32)
        trimmed = np.where(np.abs(deltas) >= least.reshape(-1, *[1] * (deltas.ndim - 1)), deltas, 0)
        agree = (np.sign(trimmed) == np.sign(trimmed.sum(0))) & (trimmed != 0)
        mean = np.where(agree, trimmed, 0).sum(0) / np.maximum(agree.sum(0), 1).astype(np.float32)
        return part.network.read(None, key) + np.float32(scale) * mean

    return rule


def kth_largest(arrays: Callable[[], Iterable[np.ndarray]], k: int) -> float:
    """Return the exact k-th largest number of many non-negative float32 arrays, with one array in memory at a time.

    Such floats are in the order of their bits as integers. So a count of all upper halves (16 bits) finds the upper
    half of the answer, and a count of the lower halves of the numbers with that upper half finds its lower half.
    """

    def bits() -> Iterator[np.ndarray]:
        return (np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32) for array in arrays())

    def place(counts: np.ndarray, k: int) -> tuple[int, int]:
        """Return the bin of the k-th number from the top, and its rank in that bin."""
        from_top = np.cumsum(counts[::-1])
        steps = int(np.searchsorted(from_top, k))
        return len(counts) - 1 - steps, k - int(from_top[steps] - counts[::-1][steps])

    none = np.zeros(2**16, np.int64)
    upper, left = place(sum((np.bincount(own >> 16, minlength=2**16) for own in bits()), none), k)
    lowers = (own[own >> 16 == upper] & 0xFFFF for own in bits())
    lower, _ = place(sum((np.bincount(own, minlength=2**16) for own in lowers), none), left)
    return float(np.array([upper << 16 | lower], np.uint32).view(np.float32)[0])


def _cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the cosine between two arrays as vectors; None if one of them is zero."""
    a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return None if norms == 0 else min(1.0, max(-1.0, float(np.dot(a, b)) / norms))
