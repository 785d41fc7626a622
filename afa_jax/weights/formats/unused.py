"""Tensors that files carry beside a network's own, in one table for all containers."""

from __future__ import annotations

import re
from typing import Any

_ANYWHERE = re.compile(
    r"model_ema\..*"  # a second set of weights, which a single file's ``ema=True`` takes
    # buffers of the noise schedule, which the scheduler's config gives
    r"|(alphas_cumprod|betas|sqrt_|log_one_minus_|posterior_)\w*|logvar|lvlb_weights|denoiser\.\w+"
    r"|scale_factor|v_pred|ztsnr|global_step"  # marks that describe the model, not tensors of a network
    r"|embedding_manager\..*|epoch|iteration|pytorch-lightning_version"  # training state
)
_BESIDE = {
    "unet": re.compile(r"(?!)"),
    "vae": re.compile(r"loss\..*"),
    # CLIP beyond its text states, in transformers' names and in OpenCLIP's
    "text_encoder": re.compile(
        r"(.*\.)?position_ids|logit_scale|vision_model\..*|(text|visual)_projection(\.weight)?|attn_mask"
    ),
}
_LAYER = re.compile(r"(?:encoder\.layers|transformer\.resblocks)\.(\d{1,6})\.")


def is_unused_anywhere(key: str) -> bool:
    """Return whether a file carries this key for no network at all."""
    return _ANYWHERE.fullmatch(key) is not None


def is_unused(component: str, key: str, layers: Any = None) -> bool:
    """Return whether a network's file carries this key for something else than the network.

    Args:
        key: the key without the prefix of the network's keys in its container.
        layers: a text encoder's ``num_hidden_layers``; with clip skip the file stores more layers than are used.
    """
    if is_unused_anywhere(key) or _BESIDE[component].fullmatch(key):
        return True
    layer = _LAYER.search(key) if component == "text_encoder" else None
    return layer is not None and type(layers) is int and int(layer[1]) >= layers
