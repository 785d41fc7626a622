"""Sparse execution: a router runs first, and then each picture's experts that it trusts, and no others.

All pairs (expert, row) that are needed are worked off in chunks of one expert's rows by a ``while_loop``, so the work
follows from what is needed, nothing is dropped, and one compiled program serves all of it. An expert is needed in a
row where the largest weight of its map exceeds a threshold: choosing by the picture and mixing by the pixel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.mesh.experts import slices_first
from afa_jax.models.conditioning import Conditioning, join_rows
from afa_jax.trees import axis_size, take
from afa_jax.types import Latents, Maps, SiteMaps, Timesteps

UNCONDITIONAL = ("own", "conditional")
"""Whose maps the unconditional half of guidance takes: those of the empty prompt, or the conditional half's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Which experts run.

    Attributes:
        threshold: an expert runs for a picture if the largest weight of its map is above this; 0 runs all of them.
        top: at most so many experts run for a picture, those of the largest weights; 0 sets no bound.
        unconditional: whose maps and experts the unconditional half of guidance takes.
        reuse: steps for which maps are kept before the router runs again.
        chunk: pictures that an expert works at together; 0 chooses a quarter of the rows, at most 32.
    """

    threshold: float = 0.0
    top: int = 0
    unconditional: str = "own"
    reuse: int = 1
    chunk: int = 0

    def check(self, experts: int, what: str) -> None:
        """Raise InputError for a number out of range."""
        if not 0 <= self.threshold < 1:
            raise InputError(f"{what}: threshold={self.threshold}; choose 0 (all experts run) to below 1")
        if not 0 <= self.top <= experts:
            raise InputError(f"{what}: top={self.top}; choose 1 to {experts}, the number of experts, or 0 for no bound")
        if self.unconditional not in UNCONDITIONAL:
            raise InputError(f"{what}: unconditional={self.unconditional!r}; choose {' or '.join(UNCONDITIONAL)}")
        if self.reuse < 1:
            raise InputError(f"{what}: reuse={self.reuse}; choose 1 (new maps in each step) or more")
        if self.chunk < 0:
            raise InputError(f"{what}: chunk={self.chunk}; choose 1 or more, or 0 for a size that fits")


def check_runs_first(router: Any) -> None:
    """Raise InputError for a fusion whose maps cannot be had before the experts run."""
    config = router.config
    if getattr(config, "features", False) or getattr(config, "residual", False):
        raise InputError(
            f"{router.kind}: it reads the experts' features or corrects their predictions, so no expert can be left "
            "out; train one with fusion.features=False and fusion.residual=False"
        )


def needed_experts(maps: Maps, threshold: Any, top: int = 0) -> Bool[Array, "n b"]:
    """Return which experts each row needs; the one of the largest weight always.

    Args:
        maps: ``[n, b, h, w]``.
        threshold: of the largest weight of a map.
        top: the most experts of a row; 0 for no bound.
    """
    largest = maps.max((2, 3))
    rank = jnp.argsort(jnp.argsort(-largest, axis=0), axis=0)  # ties go to the first expert
    chosen = (largest > threshold) | (rank == 0)
    return chosen & (rank < top) if top else chosen


def renormalised(maps: Maps, needed: Bool[Array, "n b"]) -> Maps:
    """Return the maps of the needed experts, which sum to one at each pixel again."""
    kept = jnp.where(needed[:, :, None, None], maps, 0)
    total = kept.sum(0, keepdims=True)
    # Where no kept expert has any weight, they share the pixel.
    even = needed / needed.sum(0, keepdims=True)
    return jnp.where(total > 1e-6, kept / jnp.maximum(total, 1e-6), even[:, :, None, None])


def predict_needed(
    experts: Any,
    latents: Latents,
    t: Timesteps,
    conditioning: Conditioning,
    maps: Maps,
    needed: Bool[Array, "n b"],
    chunk: int,
) -> tuple[Latents, Int[Array, ""]]:
    """Return ``sum_n maps[n] eps_n`` over the needed experts of each row, float32, and the evaluations that it took.

    The evaluations are those of needed pairs and of what fills each expert's last chunk.

    Args:
        experts: a stack of N U-Nets.
        maps: ``[n, b, h, w]``, of the needed experts; the others' are not read.
        needed: ``[n, b]``.
        chunk: rows that an expert works at together.
    """
    rows = latents.shape[0]
    order = jnp.argsort(~needed, axis=1, stable=True)  # of each expert, needed rows first
    counts = needed.sum(1)
    chunks = -(-counts // chunk)
    ends = jnp.cumsum(chunks)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        number, total = state
        expert = jnp.searchsorted(ends, number, side="right")
        places = (number - (ends[expert] - chunks[expert])) * chunk + jnp.arange(chunk)
        mine = order[expert, jnp.minimum(places, rows - 1)]
        own = jax.tree.map(lambda leaf: leaf[expert, mine], conditioning)
        unet = slices_first(take(experts, expert))
        weights = jnp.where((places < counts[expert])[:, None, None], maps[expert, mine], 0)
        made = unet(latents[mine], t[mine], own).astype(jnp.float32)
        return number + 1, total.at[mine].add(weights[..., None] * made)

    shape = (*latents.shape[:-1], experts.config.out_channels)
    done, total = jax.lax.while_loop(
        lambda state: state[0] < ends[-1], body, (jnp.zeros((), ends.dtype), jnp.zeros(shape, jnp.float32))
    )
    return total, done * chunk


@dataclasses.dataclass(frozen=True)
class SparseMemory:
    """What the sampler carries: of the rows of both halves, unconditional first.

    Attributes:
        step: evaluations of the sampler so far.
        previous: clean latents of the last step ``[2b, h, w, c]``, for a router that reads them.
        maps: the router's last maps ``[n, 2b, h, w]``.
        needed: the pairs that each picture needed so far ``[b]``.
        evaluations: evaluations so far, those that filled chunks too.
    """

    step: Array
    previous: Array
    maps: Array
    needed: Array
    evaluations: Array


jax.tree_util.register_dataclass(
    SparseMemory, data_fields=["step", "previous", "maps", "needed", "evaluations"], meta_fields=[]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseEnsemble:
    """A PathDenoiser: a router that does not read the experts' outputs, and the experts that it asks for.

    Attributes:
        experts: a stack of N U-Nets.
        router: what gives maps before the experts run: ``weigh(latents, t, conditioning, previous) -> maps``.
        schedule: the experts' noise schedule.
        options: which experts run.
    """

    experts: Any
    router: Any
    schedule: NoiseSchedule
    options: SparseOptions

    def start(self, latents: Latents) -> SparseMemory:
        """Return the memory before the first step."""
        rows, *shape = latents.shape
        return SparseMemory(
            step=jnp.zeros((), jnp.int32),
            previous=jnp.zeros((2 * rows, *shape)),
            maps=jnp.zeros((axis_size(self.experts), 2 * rows, *shape[:2])),
            needed=jnp.zeros((rows,)),
            evaluations=jnp.zeros(()),
        )

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: SparseMemory,
    ) -> tuple[Latents, SparseMemory]:
        """Return the guided prediction, float32, and the memory; a scale of 1 runs no unconditional half."""
        (prediction, _), memory = self.guided_with_maps(latents, t, conditional, unconditional, scale, memory)
        return prediction, memory

    def guided_with_maps(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: SparseMemory,
    ) -> tuple[tuple[Latents, SiteMaps], SparseMemory]:
        """Return the guided prediction with the conditional half's maps, renormalised; and the memory."""
        options, rows = self.options, latents.shape[0]
        x, twice = jnp.concatenate([latents, latents]), jnp.concatenate([t, t])
        both = join_rows(unconditional, conditional)

        def fresh() -> Maps:
            if options.unconditional == "conditional":
                own = self.router.weigh(latents, t, conditional, memory.previous[rows:])
                return jnp.concatenate([own, own], axis=1)
            return self.router.weigh(x, twice, both, memory.previous)

        if options.reuse == 1:
            maps = fresh()
        else:
            maps = jax.lax.cond(memory.step % options.reuse == 0, fresh, lambda: memory.maps)
        needed = needed_experts(maps, options.threshold, options.top)
        half = jnp.asarray(scale != 1)  # without guidance, no unconditional half
        needed = needed & jnp.concatenate([jnp.broadcast_to(half, (rows,)), jnp.ones((rows,), bool)])
        kept = renormalised(maps, needed | ~needed.any(0, keepdims=True))
        chunk = min(options.chunk or max(1, min(32, 2 * rows // 4)), 2 * rows)
        predictions, evaluations = predict_needed(self.experts, x, twice, both, kept, needed, chunk)
        u, c = jnp.split(predictions, 2)
        u = jnp.where(half, u, c)
        pairs = needed.sum(0)
        memory = SparseMemory(
            step=memory.step + 1,
            previous=self.schedule.clean(x, jnp.concatenate([u, c]), twice),
            maps=maps,
            needed=memory.needed + pairs[:rows] + pairs[rows:],
            evaluations=memory.evaluations + evaluations,
        )
        return (u + scale * (c - u), (kept[:, rows:],)), memory

    def work(self, memory: SparseMemory) -> dict[str, Array]:
        """Return the evaluations of each picture ``[b]`` on the path: needed, done, and those of all experts."""
        rows = memory.needed.shape[0]
        possible = 2.0 * axis_size(self.experts) * memory.step
        return dict(
            needed=memory.needed,
            done=jnp.full((rows,), memory.evaluations / rows),
            possible=jnp.full((rows,), possible),
        )

    @property
    def sites(self) -> list[str]:
        """Return the name of the one site, the prediction."""
        return [self.experts.stages[-1].name]


jax.tree_util.register_dataclass(SparseEnsemble, data_fields=["experts", "router"], meta_fields=["schedule", "options"])
