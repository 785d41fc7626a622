"""The ensemble: N frozen U-Nets in lock-step, fused after every stage (Wang et al. 2025, arXiv 2405.17082)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from afa_jax.errors import InputError
from afa_jax.fusion.sabw import fuse
from afa_jax.mesh.collectives import experts_everywhere, for_own_experts, is_split, mean_over_experts, whole
from afa_jax.mesh.parallel import Mode, map_experts
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import Size, UNet, size_at
from afa_jax.trees import axis_size, stack, take
from afa_jax.types import ExpertTextStates, Latents, Maps, OwnTextStates, SiteMaps, Timesteps

# Fields that say the same in several ways (8 and [8, 8, 8, 8]) are compared by what they mean.
_MEANING = dict(
    attention_head_dim="heads",
    num_attention_heads="heads",
    layers_per_block="layers_per_level",
    transformer_layers_per_block="transformer_layers",
)
_WITHOUT_EFFECT = ("sample_size", "upcast_attention")

Remat = Literal["none", "stage", "fused"]
REMATS: tuple[Remat, ...] = ("none", "stage", "fused")


def stack_experts(unets: Sequence[UNet], names: Sequence[str]) -> UNet:
    """N U-Nets of one architecture as one whose leaves have a leading axis N.

    Raises:
        InputError: two differ in architecture; names both and the first field that differs.
    """
    for _, message in different_architectures([unet.config for unet in unets], names):
        raise InputError(message)
    for unet in unets:
        unet.config = unets[0].config
    return stack(unets)


def different_architectures(configs: Sequence[UNetConfig], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name of each expert that is not built as the first one, with a line that says in which field, for each."""
    first = configs[0]
    for name, config in zip(names[1:], configs[1:], strict=True):
        for field in dataclasses.fields(config):
            meaning = _MEANING.get(field.name, field.name)
            same = getattr(first, meaning) == getattr(config, meaning)
            if not same and field.name not in _WITHOUT_EFFECT:
                message = (
                    f"experts {names[0]!r} and {name!r} have different architectures: "
                    f"{field.name} is {getattr(first, field.name)!r} and {getattr(config, field.name)!r}"
                )
                if field.name == "in_channels":
                    message += f" ({first.task} and {config.task}); only U-Nets of one task can be fused"
                yield name, message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """A Denoiser made of N experts and aggregators.

    Attributes:
        experts: a stack of N U-Nets.
        aggregators: Aggregators, trained or fresh; None takes ``weights`` everywhere.
        weights: ``[n]``, constant maps instead of the aggregators': 1/N each is the uniform average, a one-hot vector
            is one expert inside the ensemble.
        mode: of map_experts.
        remat: what a gradient computes again instead of keeping it. "none": nothing; "stage": the inside of the
            experts' stages, an expert at a time, while their features and the inside of the aggregators are kept;
            "fused": all of a site, so that only the fused features are kept.
    """

    # Untyped where the leaves may be anything while JAX maps over the tree.
    experts: Any
    aggregators: Any = None
    weights: Any = None
    mode: Mode | None = None
    remat: Remat = "none"

    def __call__(self, latents: Latents, t: Timesteps, conditioning: OwnTextStates) -> Latents:
        """The fused prediction, float32."""
        return self.with_maps(latents, t, conditioning)[0]

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: OwnTextStates) -> tuple[Latents, SiteMaps]:
        """The fused prediction and the maps of every fused site, in the stages' order.

        On a mesh ``experts`` and ``conditioning`` are those of one device, the result is of all.

        Args:
            latents: ``[b, h, w, c]``, of any size.
            t: ``[b]``.
            conditioning: ``[n, b, s, d]``, each expert's own text states.

        Raises:
            ValueError: another number of text states than of experts.
        """
        experts = self.experts
        count = axis_size(experts)
        if conditioning.shape[0] != count:
            raise ValueError(f"text states of {conditioning.shape[0]} experts for an ensemble of {count}")
        context = conditioning.astype(experts.dtype)
        temb = map_experts(lambda unet, t: unet.embed_time(t), (experts,), (t,), self.mode)
        mean_temb, mean_context = mean_over_experts(temb), mean_over_experts(context)
        # What a stage is where its parameters are not split.
        shapes = jax.eval_shape(lambda: UNet(experts.config, rngs=nnx.Rngs(0))).stages if is_split() else None

        x: Any = latents.astype(experts.dtype)
        together = True  # x is one feature for all experts, as after every fusion
        skips: list[tuple[Any, bool]] = []
        all_maps: list[Maps] = []
        for index, stage in enumerate(experts.stages):
            skip, skip_together = skips.pop() if stage.takes_skip else (None, True)
            aggregator = None if self.aggregators is None else self.aggregators.site(index)
            full = None if shapes is None else shapes[index]
            size = size_at(latents.shape[1:3], stage.level)
            run = functools.partial(self._site, together, skip_together, full, size)
            x, maps = (jax.checkpoint(run) if self.remat == "fused" else run)(
                (stage, aggregator), x, skip, (temb, context), (mean_temb, mean_context)
            )
            together = maps is not None
            if maps is not None:
                all_maps.append(maps)
            if stage.leaves_skip:
                skips.append((x, together))
        return x.astype(jnp.float32), tuple(all_maps)

    def _site(
        self,
        together: bool,
        skip_together: bool,
        shapes: Any,
        size: Size,
        modules: tuple[Any, Any],
        x: Any,
        skip: Any,
        conditioning: tuple[Array, Array],
        mean_conditioning: tuple[Array, Array],
    ) -> tuple[Array, Maps | None]:
        """One stage of every expert, and its fusion: one feature for all and its maps.

        Where the experts are not fused it is their own features, and None.
        """
        stage, aggregator = modules
        features = self._run(stage, x, together, *conditioning, skip, skip_together, shapes, size)
        if self.weights is not None:
            shape = (experts_everywhere(features), *features.shape[1:-1])
            maps = jnp.broadcast_to(self.weights.astype(jnp.float32)[:, None, None, None], shape)
            return fuse(features, maps), maps
        if aggregator is None:
            assert self.aggregators is not None, "an Ensemble needs aggregators or weights"
            return features, None
        return aggregator(features, *mean_conditioning)

    def _run(
        self,
        stage: Any,
        x: Any,
        together: bool,
        temb: Array,
        context: Array,
        skip: Any,
        skip_together: bool,
        shapes: Any,
        size: Size,
    ) -> Array:
        """One stage of every expert, each on its own feature and skip or on those they share."""
        own = (None if together else x, None if skip_together else skip)

        def one(stage: Any, temb: Array, context: Array, own: Any, shared_x: Any, shared_skip: Any) -> Array:
            own_x, own_skip = own
            stage = whole(stage, shapes)
            x, skip = (shared_x if own_x is None else own_x), (shared_skip if own_skip is None else own_skip)
            return stage(x, temb, context, skip, size)

        shared = for_own_experts((x if together else None, skip if skip_together else None))
        # The loop's body is checkpointed, not the loop: the gradient then holds the inside of one expert at a time.
        return map_experts(
            one if self.remat == "none" else jax.checkpoint(one), (stage, temb, context, own), shared, self.mode
        )


jax.tree_util.register_dataclass(
    Ensemble, data_fields=["experts", "aggregators", "weights"], meta_fields=["mode", "remat"]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleExpert:
    """A Denoiser that is one expert of a stack, alone.

    Attributes:
        experts: a stack of N U-Nets.
        index: which, an integer or an integer array.
    """

    experts: Any
    index: Any

    def __call__(self, latents: Latents, t: Timesteps, conditioning: ExpertTextStates) -> Latents:
        """That expert's own prediction, with its own text states."""
        unet: UNet = take(self.experts, self.index)
        return unet(latents, t, conditioning[self.index])


# The index is data, so that all experts share one compiled program.
jax.tree_util.register_dataclass(SingleExpert, data_fields=["experts", "index"], meta_fields=[])
