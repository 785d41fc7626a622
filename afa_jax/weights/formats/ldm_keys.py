"""The key tables between diffusers' state dicts and LDM's single files (Rombach et al. 2022; CompVis' code).

LDM names a model's parts by their place in its lists (``input_blocks.4.1``), diffusers by what they are
(``down_blocks.1.attentions.0``). For a given architecture the two are one to one, but for OpenCLIP's attention, which
keeps query, key and value in one tensor. A file may spell some keys in another way, and carry tensors that no
network needs: both are listed here, and whatever is not is an error.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from afa_jax.models.configs import UNetConfig, VAEConfig
from afa_jax.weights.expected import NetworkConfig, expected_shapes
from afa_jax.weights.formats import unused

Table = Mapping[str, tuple[str, ...]]
"""LDM's key -> the diffusers key, or the several keys whose tensors are concatenated along the rows."""

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

_NETWORKS = ((UNET, "unet"), (VAE, "vae"), (CLIP, "text_encoder"), (OPEN_CLIP, "text_encoder"))
OPEN_CLIP_LAYERS = 23
"""Layers of the text encoder in diffusers' files of Stable Diffusion 2, which uses the penultimate states of ViT-H's 24
layers."""

_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^state_dict\.", ""),
        # the oldest files (NovelAI's and merges of it)
        (r"^cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.", CLIP + r"text_model.\1."),
        # the VAE's attention as diffusers named it before and since 0.15
        (r"(\.mid\.attn_1)\.(?:query|to_q)\.", r"\1.q."),
        (r"(\.mid\.attn_1)\.(?:key|to_k)\.", r"\1.k."),
        (r"(\.mid\.attn_1)\.(?:value|to_v)\.", r"\1.v."),
        (r"(\.mid\.attn_1)\.(?:proj_attn|to_out\.0)\.", r"\1.proj_out."),
        (r"(\.mid\.attn_1)\.group_norm\.", r"\1.norm."),
    )
)
_AS_PIXELS = re.compile(r"first_stage_model\..*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")

_RESNET = dict(
    norm1="in_layers.0",
    conv1="in_layers.2",
    time_emb_proj="emb_layers.1",
    norm2="out_layers.0",
    conv2="out_layers.3",
    conv_shortcut="skip_connection",
)
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = (
    (r"conv_norm_out", r"norm_out"),
    (r"mid_block\.resnets\.0", r"mid.block_1"),
    (r"mid_block\.resnets\.1", r"mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", r"mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", r"mid.attn_1.proj_out"),
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_shortcut", r"nin_shortcut"),
)
_OPEN_CLIP = (
    (r"text_model\.embeddings\.token_embedding", r"token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", r"positional_embedding"),
    (r"text_model\.final_layer_norm", r"ln_final"),
    (r"text_model\.encoder\.layers\.(\d+)", r"transformer.resblocks.\1"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn\.[qkv]_proj\.(\w+)", r"attn.in_proj_\1"),
    (r"self_attn\.out_proj", r"attn.out_proj"),
    (r"mlp\.fc1", r"mlp.c_fc"),
    (r"mlp\.fc2", r"mlp.c_proj"),
)


def common_spelling(key: str) -> str:
    """Return a single file's key as LDM spells it."""
    for pattern, replacement in _SPELLINGS:
        key = pattern.sub(replacement, key)
    return key


def is_unused(key: str, layers: Any = None) -> bool:
    """Return whether this key of single files belongs to none of the networks.

    Args:
        layers: number of the text encoder's; at most OPEN_CLIP_LAYERS for OpenCLIP.
    """
    for prefix, component in _NETWORKS:
        if key.startswith(prefix):
            used = OPEN_CLIP_LAYERS if prefix == OPEN_CLIP and layers is None else layers
            return unused.is_unused(component, key.removeprefix(prefix), used)
    return unused.is_unused_anywhere(key) or key == "cond_stage_model.logit_scale"


@functools.lru_cache(maxsize=16)
def ldm_table(config: NetworkConfig) -> Table:
    """Return, by LDM's key with its prefix, the key or keys of a network that it stands for."""
    table: dict[str, list[str]] = defaultdict(list)
    rename = _rename(config)
    # OpenCLIP stacks query, key and value, in this order; diffusers' other keys are one to one, so order is free.
    for key in sorted(expected_shapes(config), key=lambda key: ("q_proj" not in key, "k_proj" not in key, key)):
        table[rename(key)].append(key)
    assert all(len(keys) in (1, 3) for keys in table.values()), "two parameters with one key"
    return {key: tuple(keys) for key, keys in table.items()}


def ldm_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that LDM gives to a tensor of diffusers; it projects by 1x1 convolutions in the VAE."""
    return (*shape, 1, 1) if _AS_PIXELS.fullmatch(key) else shape


def ema_key(key: str) -> str:
    """Return the key of the moving average of a U-Net's tensor: its name within ``model.`` without dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _rename(config: NetworkConfig) -> Callable[[str], str]:
    if isinstance(config, UNetConfig):
        return functools.partial(_unet_key, _unet_modules(config))
    if isinstance(config, VAEConfig):
        return functools.partial(_vae_key, len(config.block_out_channels))
    return (lambda key: CLIP + key) if config.hidden_act == "quick_gelu" else _open_clip_key


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """Return LDM's name of each module; LDM's lists count layers and resamplers between levels alike."""
    modules = dict(_UNET_ENDS)
    last = len(config.block_out_channels) - 1
    place = 1
    for level, (layers, attention) in enumerate(zip(config.layers_per_level, config.down_attention, strict=True)):
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            if attention:
                modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if level < last:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    for place, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        modules[f"mid_block.{part}"] = f"middle_block.{place}"
    place = 0
    for level, (layers, attention) in enumerate(zip(config.layers_per_level[::-1], config.up_attention, strict=True)):
        for layer in range(layers + 1):
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            if attention:
                modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
            if layer == layers and level < last:
                modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place}.{1 + attention}.conv"
            place += 1
    return modules


def _unet_key(modules: Mapping[str, str], key: str) -> str:
    module, _, rest = key.rpartition(".")
    while module not in modules:
        module, _, part = module.rpartition(".")
        rest = f"{part}.{rest}"
    if ".resnets." in key:
        part, _, rest = rest.partition(".")
        rest = f"{_RESNET[part]}.{rest}"
    return f"{UNET}{modules[module]}.{rest}"


def _vae_key(levels: int, key: str) -> str:
    key = _renamed(key, _VAE)
    # LDM counts the decoder's levels from the pictures' side, diffusers from the latents'.
    return VAE + re.sub(r"\bup\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)


def _open_clip_key(key: str) -> str:
    return OPEN_CLIP + _renamed(key, _OPEN_CLIP)


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(rf"\b{pattern}\b", replacement, key)
    return key
