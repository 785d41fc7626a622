"""The defaults of diffusers and transformers for configs that lack newer fields or were written by a Flax class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FLAX_ONLY = ("split_head_dim", "use_memory_efficient_attention")
# transformers' CLIPTextConfig; in a config of the whole CLIP model it leaves out the fields that have these values.
_CLIP_TEXT = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)


def todays(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's config as it would be written today.

    * A Flax class becomes the PyTorch class of that name.
    * The U-Net: before diffusers 0.9, ``sample_size`` below 64 was a slip for 64.
    * The text encoder: of a whole CLIP model's config the half about text, ``text_config_dict`` over ``text_config``.
    * The scheduler: ``steps_offset`` 1 and no ``clip_sample``, whatever is stored, as in diffusers' pipelines.

    Fields that other versions of PyTorch's classes lack have those classes' defaults where our configs are read.
    """
    fields = {name: value for name, value in config.items() if name not in _FLAX_ONLY}
    if isinstance(fields.get("_class_name"), str):
        fields["_class_name"] = fields["_class_name"].removeprefix("Flax")
    if component == "scheduler":
        fields["steps_offset"] = 1
        if "clip_sample" in fields:
            fields["clip_sample"] = False
    elif component == "unet":
        old = re.match(r"0\.[0-8]\.", str(fields.get("_diffusers_version")))
        if old and isinstance(size := fields.get("sample_size"), int) and size < 64:
            fields["sample_size"] = 64
    elif component == "text_encoder" and fields.get("model_type") == "clip":
        halves = [half for name in ("text_config", "text_config_dict") if isinstance(half := fields.get(name), dict)]
        stored = {name: value for half in halves for name, value in half.items() if value is not None}
        fields = _CLIP_TEXT | stored | dict(model_type="clip_text_model", architectures=["CLIPTextModel"])
    return fields
