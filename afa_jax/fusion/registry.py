"""The registry of what can be trained to fuse frozen experts: AFA's aggregators and their trained rivals.

A new one is a class that satisfies ``TrainedFusion``, in a file of its own, and a line in ``FUSIONS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jax import Array

# Those of typing read properties to check them, before Python 3.12.
from typing_extensions import Protocol, runtime_checkable

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import Aggregators, Remat
from afa_jax.fusion.ladder import Ladder
from afa_jax.fusion.rivals.block_weights import BlockWeights
from afa_jax.fusion.rivals.gate import Gate
from afa_jax.fusion.rivals.router import Router
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.unet import UNet
from afa_jax.types import Latents, SiteMaps, Timesteps


@runtime_checkable
class HasPenalty(Protocol):
    """A Denoiser that is trained in another way than it is sampled, and with a penalty beside the noise's error."""

    def training_pass(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, keys: Array
    ) -> tuple[Latents, tuple[SiteMaps, Any]]:
        """Return the prediction, and ``(maps, more)`` for the penalty; ``keys`` ``[b]`` are the rows' own."""
        ...

    def penalty(self, maps: SiteMaps, more: Any, target: Latents, position: Array) -> Array:
        """Return what to add to the error of each row ``[b]``; ``position`` is the row's in the run."""
        ...


class TrainedFusion(Protocol):
    """A module of trainable parameters, ``Kind(config, experts, stages, unet_config, rngs=...)``.

    Before training it is a uniform average.

    Attributes:
        kind: its name in a config's ``fusion.kind`` and in the names of its tensors.
        Config: the dataclass of its options.
        spreads: whether the experts can be on several devices; else all of them are on each.
        rematerialises: whether its gradient goes through the experts' stages, so that ``train.remat`` applies.
        merges: whether it merges the experts' weights into one model, including the text encoders.
        config: the options that it was made with.
        experts: the number of experts, N.
        at: the indices of the stages that its maps belong to.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    spreads: ClassVar[bool]
    rematerialises: ClassVar[bool]
    merges: ClassVar[bool]
    config: Any
    experts: int
    at: tuple[int, ...]

    def site_names(self, unet: UNet) -> list[str]:
        """Return the names of the sites to which its maps belong."""
        ...

    def assemble(self, unet: Any, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none") -> tuple[Any, Any]:
        """Return the Denoiser of this fusion and stacks of N experts, and the text encoders whose states it takes.

        These are the experts' own, except for block weights: their merged U-Net and text encoder are stacks of one.
        """
        ...


FUSIONS: dict[str, Any] = {cls.kind: cls for cls in (Aggregators, Ladder, Gate, Router, BlockWeights)}
"""The class of each TrainedFusion, by its kind."""

LARGEST = dict(transformer_layers=64, layers_per_block=64)
"""The largest values of options that count modules. They bound what a downloaded pair can make us build; widths are
below 2^16."""


def fusion_class(config: Any) -> Any:
    """Return the class of the fusion that a configuration is for."""
    return next(cls for cls in FUSIONS.values() if type(config) is cls.Config)


def kind_of(config: Any) -> str:
    """Return the name of a configuration's kind."""
    return fusion_class(config).kind


def fusion_config(kind: str, options: Mapping[str, Any]) -> Any:
    """Return the configuration of a fusion from its options in a config or a JSON file.

    Raises:
        InputError: an unknown kind or option, or a value that does not fit.
    """
    if kind not in FUSIONS:
        raise InputError(f"fusion.kind={kind!r}; choose {', '.join(FUSIONS)}")
    own: Any = FUSIONS[kind].Config
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
    """Return whether a field holds a whole number, which a config may write as 1e2."""
    return field is not None and type(field.default) is int


def init_fusion(config: Any, unet: UNet, experts: int, seed: int) -> Any:
    """Return a fresh fusion for a stack of ``experts`` U-Nets, float32.

    Raises:
        InputError: a router that does not fit the experts.
    """
    create: Any = fusion_class(config)
    return create(config, experts, list(unet.stages), unet.config, rngs=nnx.Rngs(seed))
