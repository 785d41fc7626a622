"""Sparse execution: at threshold 0 the dense ensemble, above it the experts that are needed and no others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.diffusion.guidance import PathDenoiser, guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.registry import fusion_config, init_fusion
from afa_jax.fusion.rivals.blending import predict_each
from afa_jax.fusion.sparse import (
    SparseEnsemble,
    SparseOptions,
    check_runs_first,
    needed_experts,
    predict_needed,
    renormalised,
)
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import stack
from tests import tiny

UNETS = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(3)])
SCHEDULE = NoiseSchedule()
LATENTS, T, CONDITIONING = tiny.inputs(5, 3)
NOTHING = Conditioning(text=jnp.zeros_like(CONDITIONING.text))
KINDS = dict(
    router=dict(block_out_channels=[8], heads=2, norm_num_groups=4),
    ladder=dict(block_out_channels=[8], heads=2, norm_num_groups=4, features=False),
)

each_of = jax.jit(lambda conditioning: predict_each(UNETS, LATENTS, T, conditioning))


def router(kind: str, **options: Any) -> Any:
    return tiny.randomised(init_fusion(fusion_config(kind, {**KINDS[kind], **options}), UNETS, 3, 0), 4)


def sparse(kind: str = "router", **options: Any) -> SparseEnsemble:
    return SparseEnsemble(experts=UNETS, router=router(kind), schedule=SCHEDULE, options=SparseOptions(**options))


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_the_needed_pairs_are_computed_and_nothing_else(chunk):
    """Against a masked sum over all pairs, for counts of rows that do and do not fill the chunks."""
    rng = np.random.default_rng(0)
    maps = jnp.asarray(rng.random((3, 5, 8, 8)), jnp.float32)
    needed = jnp.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    run = jax.jit(predict_needed, static_argnums=6)
    prediction, evaluations = run(UNETS, LATENTS, T, CONDITIONING, maps, needed, chunk)
    each = each_of(CONDITIONING)
    wanted = jnp.einsum("nb,nbhw,nbhwc->bhwc", needed * 1.0, maps, each)
    np.testing.assert_allclose(prediction, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))
    assert evaluations == sum(-(-count // chunk) * chunk for count in (3, 0, 5))
    nan = jnp.where(needed[:, :, None, None], maps, jnp.nan)  # the others' maps are not read
    np.testing.assert_array_equal(run(UNETS, LATENTS, T, CONDITIONING, nan, needed, chunk)[0], prediction)


def test_an_expert_is_needed_by_its_largest_weight_and_the_first_always():
    maps = jnp.asarray([[0.7, 0.2], [0.2, 0.5], [0.1, 0.3]])[:, None, None, :]  # one row of two pixels
    for threshold, top, wanted in (
        (0.0, 0, [1, 1, 1]),
        (0.4, 0, [1, 1, 0]),
        (0.6, 0, [1, 0, 0]),
        (0.99, 0, [1, 0, 0]),
        (0.0, 2, [1, 1, 0]),
        (0.0, 1, [1, 0, 0]),
    ):
        needed = needed_experts(maps, threshold, top)
        np.testing.assert_array_equal(needed[:, 0], np.array(wanted, bool))
        kept = renormalised(maps, needed)
        np.testing.assert_allclose(kept.sum(0), 1, rtol=1e-6)
        assert (np.asarray(kept)[~np.asarray(needed)[:, 0]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_at_threshold_0_it_is_the_dense_ensemble(kind):
    """Guided and not, in two steps of a path: to rounding, as sums over experts are made in another order."""
    own = router(kind)
    dense = own.assemble(UNETS, None, SCHEDULE)[0]
    thin = SparseEnsemble(experts=UNETS, router=own, schedule=SCHEDULE, options=SparseOptions())
    memory, other = thin.start(LATENTS), dense.start(LATENTS) if isinstance(dense, PathDenoiser) else None
    step = jax.jit(thin.guided)
    for scale in (3.0, 2.0):
        prediction, memory = step(LATENTS, T, CONDITIONING, NOTHING, scale, memory)
        if isinstance(dense, PathDenoiser):
            wanted, other = jax.jit(dense.guided)(LATENTS, T, CONDITIONING, NOTHING, scale, other)
        else:
            wanted = jax.jit(guided(dense, CONDITIONING, NOTHING, scale))(LATENTS, T)
        np.testing.assert_allclose(prediction, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))
    work = thin.work(memory)
    np.testing.assert_array_equal(work["needed"], 2 * 2 * 3)
    np.testing.assert_array_equal(work["possible"], 2 * 2 * 3)


def test_above_it_fewer_run_and_none_for_a_half_that_is_not_there():
    thin = sparse(threshold=0.5, chunk=1)
    step = jax.jit(thin.guided)
    _, memory = step(LATENTS, T, CONDITIONING, NOTHING, 3.0, thin.start(LATENTS))
    needed, done = (np.asarray(thin.work(memory)[name]) for name in ("needed", "done"))
    assert needed.sum() == done.sum() < 30 and (needed >= 2).all()
    prediction, memory = step(LATENTS, T, CONDITIONING, NOTHING, 1.0, thin.start(LATENTS))
    half = np.asarray(thin.work(memory)["needed"])
    assert half.sum() < needed.sum() and (half >= 1).all()
    maps = thin.router.weigh(LATENTS, T, CONDITIONING, jnp.zeros_like(LATENTS))
    kept = renormalised(maps, needed_experts(maps, 0.5))
    each = each_of(CONDITIONING)
    np.testing.assert_allclose(prediction, jnp.einsum("nbhw,nbhwc->bhwc", kept, each), atol=1e-4)


def test_the_unconditional_half_may_take_the_conditional_maps_and_maps_may_be_kept():
    thin = sparse(unconditional="conditional", reuse=2)
    step = jax.jit(thin.guided)
    prediction, memory = step(LATENTS, T, CONDITIONING, NOTHING, 3.0, thin.start(LATENTS))
    maps = thin.router.weigh(LATENTS, T, CONDITIONING, jnp.zeros_like(LATENTS))
    c, u = map(each_of, (CONDITIONING, NOTHING))
    np.testing.assert_allclose(prediction, jnp.einsum("nbhw,nbhwc->bhwc", maps, u + 3 * (c - u)), atol=2e-4)
    moved = LATENTS + 1
    _, again = step(moved, T, CONDITIONING, NOTHING, 3.0, memory)
    np.testing.assert_array_equal(again.maps, memory.maps)
    _, third = step(moved, T, CONDITIONING, NOTHING, 3.0, again)
    assert np.abs(third.maps - memory.maps).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (dict(threshold=1.0), "threshold=1.0"),
        (dict(threshold=-0.1), "threshold"),
        (dict(threshold=float("nan")), "threshold"),
        (dict(top=4), "top=4; choose 1 to 3"),
        (dict(unconditional="mine"), "unconditional"),
        (dict(reuse=0), "reuse=0"),
        (dict(chunk=-1), "chunk"),
    ],
)
def test_options_out_of_range_are_named(options, field):
    with pytest.raises(InputError, match=field):
        SparseOptions(**options).check(3, "router")


def test_a_ladder_that_reads_the_experts_cannot_run_first():
    for options in (dict(features=True), dict(residual=True)):
        with pytest.raises(InputError, match=r"fusion\.features=False"):
            check_runs_first(router("ladder", **options))
