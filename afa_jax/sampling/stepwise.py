"""Pictures whose latents are shown to a callback after every step; each step is a program of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.diffusion.samplers.sampler import PathState, evaluate
from afa_jax.mesh.collectives import ROWS, on_mesh
from afa_jax.sampling.generation import Program, StepNumbers, decode, specs_of_models, trajectory_of
from afa_jax.trees import take

Callback = Callable[[int, int, np.ndarray], object]
"""Takes the number of the step, its timestep, and the latents after it, ``[b, h, w, c]`` of a batch's pictures."""


def stepwise(callback: Callback, count: int) -> Callable[..., dict[str, Any]]:
    """Return a ``sampler`` for ``generate``, which makes ``count`` pictures, that calls back after every step."""
    made = 0

    def sampler(
        denoiser: Any,
        text_encoder: Any,
        vae: Any,
        rows: tuple[np.ndarray, np.ndarray, np.ndarray],
        seed: np.uint32,
        steps: StepNumbers,
        *,
        program: Program,
        mesh: Mesh | None = None,
    ) -> dict[str, Any]:
        nonlocal made
        own, made = count - made, made + len(rows[0])  # the last batch is filled up
        turn = functools.partial(_turn, denoiser, text_encoder, vae, rows, seed, program=program, mesh=mesh)
        state, aux = turn(None, 0, None, None, part="start"), []
        constants = jax.device_get(steps.constants)
        for index in range(len(constants.t) if steps.count is None else int(steps.count)):
            k = take(constants, index)
            state, kept = turn(state, np.int32(index), k, steps.guidance, part="step")
            aux.append(jax.device_get(kept))
            callback(index, int(k.t), _joined(jax.device_get(state.x))[:own])
        decoded = jax.device_get(turn(state, 0, None, None, part="end"))
        of_steps = jax.tree.map(lambda *leaves: np.stack([_joined(leaf) for leaf in leaves], 1), *aux) or {}
        return jax.tree.map(_joined, decoded) | of_steps

    return sampler


def _joined(leaf: np.ndarray) -> np.ndarray:
    """Return rows ``[b, ...]`` from what each device, or each row, has: ``[parts, b / parts, ...]``."""
    return leaf.reshape(-1, *leaf.shape[2:])


@functools.partial(jax.jit, static_argnames=("program", "mesh", "part"))
def _turn(
    denoiser: Any,
    text_encoder: Any,
    vae: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seed: jax.Array,
    state: Any,
    index: jax.Array,
    k: Any,
    guidance: Any,
    *,
    program: Program,
    mesh: Mesh | None,
    part: str,
) -> Any:
    """Start the paths of a batch, evaluate them once, or end them in pixels.

    As in ``sample_batch`` a device has its own rows, and takes them one by one where the program says so. The prompts
    are encoded in every step: that is little beside the U-Nets, and no state of theirs leaves its device.
    """

    def of_part(
        models: tuple[Any, Any, Any], rows: Any, state: Any, seed: Any, index: Any, k: Any, guidance: Any
    ) -> Any:
        if part == "end":
            return decode(models[-1], state.x)
        path = trajectory_of(program, *models, rows, jax.random.key(seed), guidance)
        if part == "start":
            return PathState(path.start, program.sampler.start(path.start), path.carry)
        own: dict[str, Any] = dict(noise_at=path.noise_at, has_aux=path.has_aux)
        after, aux = evaluate(program.sampler, path.predict, state, index, k, **own)
        return after, aux if path.has_aux else {}

    def of_device(denoiser: Any, text_encoder: Any, vae: Any, rows: Any, state: Any, *numbers: Any) -> Any:
        models = denoiser, text_encoder, vae
        if not program.one_by_one:
            made = of_part(models, rows, jax.tree.map(lambda leaf: leaf[0], state), *numbers)
            return jax.tree.map(lambda leaf: leaf[None], made)
        alone = jax.tree.map(lambda leaf: leaf[:, None], rows)
        return jax.lax.map(lambda row: of_part(models, *row, *numbers), (alone, state))

    models = denoiser, text_encoder, vae
    if mesh is None:
        return of_device(*models, rows, state, seed, index, k, guidance)
    split, same = PartitionSpec(ROWS), PartitionSpec()
    specs = (*specs_of_models(models, mesh), split, split, same, same, same, same)
    made = on_mesh(of_device, mesh, specs, split)(*models, rows, state, seed, index, k, guidance)
    return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, same))
