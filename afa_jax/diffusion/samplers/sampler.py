"""The Sampler protocol, and the one loop that runs a sampler from noise to clean latents.

A sampler receives predictions and never a network. One iteration of the loop is one evaluation of the network, so the
compiled program contains the network once. A second-order sampler takes two iterations a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# They do not read properties to check them, before Python 3.12.
from typing_extensions import Protocol, runtime_checkable

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.trees import take
from afa_jax.types import Latents


@runtime_checkable
class Sampler(Protocol):
    """A sampler from x_T to x_0: a frozen dataclass, all of whose fields are constants of the compiled program."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the experts' noise schedule."""
        ...

    @property
    def adds_noise(self) -> bool:
        """Return whether its steps take fresh noise."""
        ...

    def constants(self, steps: int, strength: float = 1.0) -> Any:
        """Return the numbers of each evaluation, a tree of arrays ``[evaluations]``; ``t`` is the timestep.

        Args:
            strength: below 1, only the last ``strength * steps`` steps, to start from a noised picture (img2img).

        Raises:
            InputError: steps or strength out of range.
        """
        ...

    def start(self, x: Latents) -> Any:
        """Return the memory before the first evaluation: a tree of arrays, ``()`` for none."""
        ...

    def step(self, k: Any, x: Latents, prediction: Latents, memory: Any, noise: Latents | None) -> tuple[Latents, Any]:
        """Return x and the memory after an evaluation.

        Args:
            k: the constants of this evaluation, scalars.
            x: the latents that the network saw.
            prediction: the network's prediction for them, of the noise schedule's type.
            noise: fresh and standard normal, where ``adds_noise``.
        """
        ...


def sample(
    sampler: Sampler,
    predict: Callable[..., Any],
    x: Latents,
    constants: Any,
    *,
    count: Any = None,
    noise_at: Callable[[Array], Latents] | None = None,
    has_aux: bool = False,
    carry: Any = None,
    returns_carry: bool = False,
) -> Any:
    """Sample from x at the first timestep to clean latents.

    Args:
        predict: ``(x, t [b]) -> prediction`` of the schedule's type.
        x: standard normal noise at strength 1; a noised picture below.
        constants: the result of ``sampler.constants``; with ``count`` there may be more, which are not used.
        count: the number of evaluations to run; None runs all constants. It may be traced: one program then serves any
            number of steps.
        noise_at: ``evaluation -> noise`` shaped like x, for a sampler that adds noise.
        has_aux: ``predict`` returns ``(prediction, aux)``; the result is then ``(x, aux)``, aux stacked over the
            evaluations. Not with ``count``.
        carry: a method's memory of the path, before the first evaluation. ``predict`` is then ``(x, t, carry)
            -> (result, carry)``; its result is the one that it would have without ``carry``.
        returns_carry: the result is then ``(result, carry)``, with the carry after the last evaluation.

    Raises:
        ValueError: a sampler that adds noise without ``noise_at``; aux of a traced number of evaluations.
    """
    if sampler.adds_noise and noise_at is None:
        raise ValueError(f"{type(sampler).__name__} adds noise in each step and needs noise_at")
    if has_aux and count is not None:
        raise ValueError("what is kept of each evaluation needs a known number of them: leave out count")

    def turn(state: PathState, index: Array, k: Any) -> tuple[PathState, Any]:
        return evaluate(sampler, predict, state, index, k, noise_at=noise_at, has_aux=has_aux)

    state = PathState(x, sampler.start(x), carry)
    if count is not None:
        state = jax.lax.fori_loop(0, count, lambda i, state: turn(state, i, take(constants, i))[0], state)
        return (state.x, state.carry) if returns_carry else state.x
    numbers = jnp.arange(len(constants.t))
    state, aux = jax.lax.scan(lambda state, own: turn(state, *own), state, (numbers, constants))
    result = (state.x, aux) if has_aux else state.x
    return (result, state.carry) if returns_carry else result


class PathState(NamedTuple):
    """Where a path is between two evaluations: latents, the sampler's memory, and what the method carries along."""

    x: Any
    memory: Any
    carry: Any


def evaluate(
    sampler: Sampler,
    predict: Callable[..., Any],
    state: PathState,
    index: Any,
    k: Any,
    *,
    noise_at: Callable[[Array], Latents] | None = None,
    has_aux: bool = False,
) -> tuple[PathState, Any]:
    """Return the state after an evaluation, and its aux; ``index`` counts evaluations, the rest is as in ``sample``."""
    x, memory, carry = state
    t = jnp.broadcast_to(k.t, x.shape[:1])
    answer, carry = (predict(x, t), None) if carry is None else predict(x, t, carry)
    prediction, aux = answer if has_aux else (answer, None)
    noise = noise_at(index) if sampler.adds_noise and noise_at is not None else None
    return PathState(*sampler.step(k, x, prediction, memory, noise), carry), aux


def image_noise(key: Array, numbers: Array, shape: tuple[int, int, int]) -> Latents:
    """Return standard normal noise ``[b, h, w, c]``, each picture's from ``fold_in(key, its number)`` alone.

    So a picture does not depend on its batch-mates.
    """
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)
