"""Checks that U-Nets have one architecture, so that their features can be fused and their weights merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from afa_jax.models.configs import UNetConfig

# Fields with several spellings of one value (8 and [8, 8, 8, 8]) are compared by their meaning.
_MEANING = dict(
    attention_head_dim="heads",
    num_attention_heads="heads",
    layers_per_block="layers_per_level",
    transformer_layers_per_block="transformer_layers",
)
_WITHOUT_EFFECT = ("sample_size", "upcast_attention")


def different_architectures(configs: Sequence[UNetConfig], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and a message for each field in which an expert's architecture differs from the first one's."""
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
