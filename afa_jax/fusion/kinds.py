"""What can be trained to fuse frozen experts, by name: AFA's aggregators and their trained rivals.

Each is a module ``Kind(config, experts, stages, unet_config, rngs=...)`` with ``config``, ``experts`` and ``at`` (the
stages that its maps belong to); untrained it is a uniform average. ``assemble`` makes it a Denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from afa_jax.errors import InputError
from afa_jax.fusion.ensemble import Ensemble, Remat
from afa_jax.fusion.rivals.block_weights import BlockWeights, BlockWeightsConfig, Merged, merge_stacks
from afa_jax.fusion.rivals.gate import Gate, GateConfig
from afa_jax.fusion.rivals.router import Routed, Router, RouterConfig
from afa_jax.fusion.sabw import Aggregators, SABWConfig
from afa_jax.mesh.parallel import Mode
from afa_jax.models.unet import UNet

FusionConfig = SABWConfig | GateConfig | RouterConfig | BlockWeightsConfig
Fusion = Aggregators | Gate | Router | BlockWeights
KINDS: dict[str, tuple[type[FusionConfig], type[Fusion]]] = dict(
    afa=(SABWConfig, Aggregators),
    gate=(GateConfig, Gate),
    router=(RouterConfig, Router),
    mbw=(BlockWeightsConfig, BlockWeights),
)
REMATERIALISED = ("afa", "gate", "mbw")
"""The kinds whose gradient goes through the experts' stages, for which remat is."""

SPREAD = ("afa", "gate")
"""The kinds whose experts can be on several devices; the others need all of them on each."""

LARGEST = dict(transformer_layers=64, layers_per_block=64)
"""Options that count modules: what a pair from somebody else says is built as it says. Widths are below 2^16."""


def kind_of(config: FusionConfig) -> str:
    """The name of a configuration's kind."""
    return next(kind for kind, (own, _) in KINDS.items() if type(config) is own)


def fusion_config(kind: str, options: Mapping[str, Any]) -> FusionConfig:
    """The configuration that a kind's options, as a config or a JSON file has them, make.

    Raises:
        InputError: an unknown kind or option, or a value that does not fit.
    """
    if kind not in KINDS:
        raise InputError(f"fusion.kind={kind!r}; choose {', '.join(KINDS)}")
    own: Any = KINDS[kind][0]
    fields = {field.name: field for field in dataclasses.fields(own)}
    where = "sabw" if kind == "afa" else "fusion"
    options = {
        name: int(value) if isinstance(value, float) and value.is_integer() and _is_whole(fields.get(name)) else value
        for name, value in options.items()
    }
    for name, value in options.items():
        if name not in fields:
            known = f"; there are {', '.join(fields)}" if fields else ""
            raise InputError(f"{where}.{name}: {kind} has no such option{known}")
        expected = type(fields[name].default)
        if type(value) is not expected and not (expected is tuple and isinstance(value, list)):
            raise InputError(f"{where}.{name}={value!r}: expected {expected.__name__}")
        numbers = value if isinstance(value, list | tuple) else [value] if expected is int else []
        if any(type(number) is not int or not 0 <= number <= LARGEST.get(name, 2**16) for number in numbers):
            raise InputError(f"{where}.{name}={value!r}; choose 0 to {LARGEST.get(name, 2**16)}, in whole numbers")
    return own(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})


def _is_whole(field: dataclasses.Field[Any] | None) -> bool:
    """Whether a field holds a whole number, which a config may write as 1e2."""
    return field is not None and type(field.default) is int


def init_fusion(config: FusionConfig, unet: UNet, experts: int, seed: int) -> Any:
    """A fresh fusion for a stack of ``experts`` U-Nets, float32.

    Raises:
        InputError: a router that does not fit the experts.
    """
    create: Any = KINDS[kind_of(config)][1]
    return create(config, experts, list(unet.stages), unet.config, rngs=nnx.Rngs(seed))


def site_names(fusion: Fusion, unet: UNet) -> list[str]:
    """What each of a fusion's maps belongs to: the stage before it, and of block weights the last one ``base``."""
    names = [unet.stages[index].name for index in fusion.at]
    return [*names, "base"] if isinstance(fusion, BlockWeights) else names


def sites_of(denoiser: Any) -> list[str]:
    """What each map of a Denoiser's ``with_maps`` belongs to, as site_names; none where it has no maps."""
    if not hasattr(denoiser, "with_maps"):
        return []
    names = [stage.name for stage in denoiser.experts.stages]
    if isinstance(denoiser, Merged):
        return [*names, "base"]
    if isinstance(denoiser, Routed):
        return names[-1:]
    fused = denoiser.aggregators
    return [name for index, name in enumerate(names) if fused is None or fused.site(index) is not None]


def assemble(
    fusion: Fusion, unet: Any, text_encoder: Any, *, mode: Mode | None = None, remat: Remat = "none"
) -> tuple[Ensemble | Routed | Merged, Any]:
    """The Denoiser of a fusion, and the stack of text encoders whose states it takes.

    These are the experts' own, except for block weights: their merged U-Net and text encoder are stacks of one.

    Args:
        unet: a stack of N U-Nets.
        text_encoder: a stack of N text encoders; may be None where there is nothing to merge.
        mode: of map_experts.
        remat: as of an Ensemble.
    """
    if isinstance(fusion, BlockWeights):
        weights = fusion.weights()
        merged, one_encoder = merge_stacks(unet, text_encoder, weights)
        return Merged(experts=merged, weights=weights, remat=remat), one_encoder
    if isinstance(fusion, Router):
        return Routed(experts=unet, router=fusion, mode=mode), text_encoder
    return Ensemble(experts=unet, aggregators=fusion, mode=mode, remat=remat), text_encoder
