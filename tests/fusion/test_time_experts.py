"""Experts along the time axis: which one answers, that no other is run, and that the answer is its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.rivals.time_experts import (
    TimeExperts,
    alternating,
    base_refiner_edges,
    binary_tree_edges,
    uniform_edges,
)
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import stack, take
from tests import tiny

EDGES = (250, 750)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Answers with its own number, and says that it was run."""

    number: Any

    def __call__(self, latents: Any, t: Any, conditioning: Any) -> Any:
        jax.debug.callback(lambda number: RUNS.append(int(number)), self.number)
        return jnp.full(latents.shape, self.number, jnp.float32) + conditioning.text.mean((1, 2))[:, None, None, None]


jax.tree_util.register_dataclass(Counted, data_fields=["number"], meta_fields=[])
RUNS: list[int] = []


@pytest.fixture(scope="module")
def unets() -> list[Any]:
    return [tiny.unet(seed, tiny.MICRO_UNET) for seed in range(3)]


@pytest.mark.parametrize("apart", [False, True])
def test_one_expert_is_run_at_each_timestep_and_those_asked_for_at_mixed_ones(apart: bool) -> None:
    counted: Any = tuple(Counted(jnp.float32(i)) for i in range(3)) if apart else Counted(jnp.arange(3.0))
    denoiser = TimeExperts(experts=counted, edges=(100, 250, 750), order=(1, 0, 1, 2))
    x, _, states = tiny.inputs(4, 3)
    run = jax.jit(lambda denoiser, *inputs: denoiser(*inputs))

    def runs(*t: int) -> list[int]:
        RUNS.clear()
        timesteps = jnp.asarray(t, jnp.int32)
        answer = run(denoiser, x, timesteps, states)
        jax.effects_barrier()
        chosen = [(1, 0, 1, 2)[sum(edge <= one for edge in (100, 250, 750))] for one in t]
        expected = np.asarray(chosen) + np.asarray(states.text.mean((2, 3)))[chosen, range(4)]
        np.testing.assert_allclose(answer[:, 0, 0, 0], expected, rtol=1e-6)
        assert denoiser.evaluations(timesteps) == len(RUNS)
        return sorted(RUNS)

    assert runs(0, 0, 0, 0) == runs(99, 99, 99, 99) == runs(250, 749, 250, 0) == [1]
    assert runs(100, 100, 249, 249) == [0]
    assert runs(750, 999, 750, 999) == [2]
    assert runs(0, 100, 251, 749) == [0, 1]
    assert runs(999, 100, 251, 749) == [0, 1, 2]


def test_the_chosen_expert_answers_and_no_other_matters(unets: list[Any]) -> None:
    """On both sides of each edge, and for mixed rows each row's own."""
    denoiser = TimeExperts(experts=stack(unets), edges=EDGES, order=(2, 0, 1))
    x, _, states = tiny.inputs(2, 3)
    run, alone = jax.jit(lambda denoiser, *inputs: denoiser(*inputs)), jax.jit(lambda unet, *inputs: unet(*inputs))
    # Bit for bit within one program: every expert replaced by the chosen one.
    only = [dataclasses.replace(denoiser, experts=stack([unet] * 3)) for unet in unets]
    for t, index in ((0, 2), (249, 2), (250, 0), (749, 0), (750, 1), (999, 1)):
        both = jnp.full(2, t)
        answer = run(denoiser, x, both, states)
        np.testing.assert_array_equal(
            answer, run(only[index], x, both, take(states, jnp.full(3, index))), err_msg=str(t)
        )
        np.testing.assert_allclose(answer, alone(unets[index], x, both, take(states, index)), atol=1e-5, err_msg=str(t))
    mixed = jnp.asarray([249, 750])
    answer = run(denoiser, x, mixed, states)
    for row, index in enumerate((2, 1)):
        np.testing.assert_array_equal(answer[row], run(only[index], x, mixed, take(states, jnp.full(3, index)))[row])


def test_experts_of_different_architectures(unets: list[Any]) -> None:
    wide, other = (tiny.unet(seed, dataclasses.replace(tiny.MICRO_UNET, block_out_channels=(12,))) for seed in (7, 8))
    experts = (unets[0], wide)
    denoiser = TimeExperts(experts=experts, edges=base_refiner_edges(), order=(1, 0))
    x, _, states = tiny.inputs(2, 2)
    run, alone = jax.jit(lambda denoiser, *inputs: denoiser(*inputs)), jax.jit(lambda unet, *inputs: unet(*inputs))
    for t, index, others in ((199, 1, (unets[1], wide)), (200, 0, (unets[0], other))):
        both = jnp.full(2, t)
        answer = run(denoiser, x, both, states)
        np.testing.assert_allclose(answer, alone(experts[index], x, both, take(states, index)), atol=1e-5)
        instead = Conditioning(text=states.text.at[1 - index].set(0))
        np.testing.assert_array_equal(answer, run(dataclasses.replace(denoiser, experts=others), x, both, instead))


def test_sampling_with_equal_experts_is_sampling_with_that_expert(unets: list[Any]) -> None:
    schedule = NoiseSchedule()
    edges, order = alternating(schedule.timesteps(4), 2)
    x, _, states = tiny.inputs(1, 1)
    conditional = tiny.copies(states, 2)

    @jax.jit
    def sample(denoiser: Any, states: Any) -> Any:
        return tiny.ddim(guided(denoiser, states, jax.tree.map(jnp.zeros_like, states), 3.0), schedule, x, steps=4)

    together = TimeExperts(experts=stack([unets[0], unets[0]]), edges=edges, order=order)
    alone = TimeExperts(experts=stack([unets[0]]), edges=(), order=(0,))
    np.testing.assert_allclose(sample(together, conditional), sample(alone, states), atol=1e-5)


def test_edges() -> None:
    assert uniform_edges(1) == () and uniform_edges(4) == (250, 500, 750)
    assert uniform_edges(10) == tuple(range(100, 1000, 100))  # ERNIE-ViLG 2.0
    assert uniform_edges(3) == (333, 667)
    assert binary_tree_edges() == EDGES
    assert binary_tree_edges(low=3, high=1) == (125, 500)
    assert binary_tree_edges(low=3, high=9, total=1024) == (128, 1022)  # eDiff-I's leaves 0 of 8 and 511 of 512
    assert base_refiner_edges() == (200,)
    for wrong in (
        lambda: uniform_edges(0), lambda: uniform_edges(1001), lambda: binary_tree_edges(1, 1),
        lambda: binary_tree_edges(0, 2), lambda: binary_tree_edges(12, 2), lambda: base_refiner_edges(0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="choose"):
            wrong()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_alternating_experts_take_turns_along_the_samplers_grid(spacing: str) -> None:
    timesteps = NoiseSchedule(timestep_spacing=spacing).timesteps(7)
    edges, order = alternating(timesteps, 3)
    denoiser = TimeExperts(experts=Counted(jnp.arange(3.0)), edges=edges, order=order)
    assert denoiser.expert_at(jnp.asarray(timesteps)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_what_cannot_be_is_refused(unets: list[Any]) -> None:
    experts = stack(unets)
    for edges, order, message in (
        ((500, 500), (0, 1, 2), "ascend"),
        ((0, 500), (0, 1, 2), "ascend"),
        ((500,), (0, 1, 2), "each of the 2 intervals"),
        ((500,), (-1, 0), "counted from 0"),
    ):
        with pytest.raises(InputError, match=message):
            TimeExperts(experts=experts, edges=edges, order=order)
    x, t, states = tiny.inputs(2, 3)
    with pytest.raises(ValueError, match="for 3 experts in time"):
        TimeExperts(experts=experts, edges=(500,), order=(0, 3))(x, t, states)
    with pytest.raises(ValueError, match="text states of 2 experts"):
        TimeExperts(experts=experts, edges=(500,), order=(0, 1))(x, t, take(states, slice(2)))
