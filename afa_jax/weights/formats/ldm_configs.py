"""The architecture of an LDM single file, as the fields of diffusers' config.json, from its keys and shapes.

Shapes do not say everything. Heads, norm groups, activations and scales are those of the published families: Stable
Diffusion 1.x, with 8 heads and 1x1 convolutions around its transformers, and 2.x, with heads of 64 channels and linear
layers there. Of other models they are in the file's own metadata (``afa_jax.weights.formats.single_file``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afa_jax.weights.formats.ldm_keys import CLIP, OPEN_CLIP, OPEN_CLIP_LAYERS, UNET, VAE
from afa_jax.weights.tensors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 64  # the head width of Stable Diffusion 2's U-Net and of both text encoders

OPEN_CLIP_WIDTH = 1024  # the width of Stable Diffusion 2's text encoder; that of 1 has 768


def found_config(component: str, shapes: Shapes, what: str) -> dict[str, Any]:
    """Return a network's config.json fields, as far as shapes and families tell.

    Args:
        component: ``unet``, ``vae`` or ``text_encoder``.
        shapes: the shapes of the file's tensors, by LDM's keys.
        what: names the file in errors.

    Raises:
        WeightsError: a tensor that is needed to tell a field is missing or has another rank.
    """
    finders: dict[str, Callable[[_Shapes], dict[str, Any]]] = dict(unet=_unet, vae=_vae, text_encoder=_text)
    return finders[component](_Shapes(shapes, what))


class _Shapes:
    """Shapes by key; one that is missing, or of another rank, is an error with its name."""

    def __init__(self, shapes: Shapes, what: str):
        self.shapes, self.what = shapes, what

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __call__(self, key: str, *ranks: int) -> tuple[int, ...]:
        if key not in self.shapes:
            raise WeightsError(f"{self.what}: 1 missing ({key}), which tells the architecture; fetch the file again")
        if len(self.shapes[key]) not in ranks:
            raise WeightsError(f"{self.what}: 1 misshapen ({key} is {self.shapes[key]}); fetch the file again")
        return self.shapes[key]

    def count(self, key: str) -> int:
        """Count the keys of the form ``key``, whose ``{}`` stands for a number, from 0 on."""
        number = 0
        while key.format(number) in self:
            number += 1
        return number


def _unet(shape: _Shapes) -> dict[str, Any]:
    down, up = _levels(shape, UNET + "input_blocks", 1), _levels(shape, UNET + "output_blocks", 0)
    middle = UNET + "middle_block.1"
    widths = [width for width, _, _ in down]
    linear = len(shape(f"{middle}.proj_in.weight", 2, 4)) == 2
    # The last level's depth is also the middle's; where there is no attention it has no other meaning.
    deepest = shape.count(middle + ".transformer_blocks.{}.norm1.weight")
    return dict(
        _class_name="UNet2DConditionModel",
        sample_size=64,
        in_channels=shape(UNET + "input_blocks.0.0.weight", 4)[1],
        out_channels=shape(UNET + "out.2.weight", 4)[0],
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for _, _, depth in down],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for _, _, depth in up],
        layers_per_block=_one_if_same([layers for _, layers, _ in down]),
        transformer_layers_per_block=_one_if_same([depth or deepest for _, _, depth in down]),
        attention_head_dim=[_heads(shape, "U-Net", width) for width in widths] if linear else 8,
        cross_attention_dim=shape(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        use_linear_projection=linear,
        upcast_attention=linear,  # as in the published 2.1, whose logits overflow float16
    )


def _levels(shape: _Shapes, blocks: str, place: int) -> list[tuple[int, int, int]]:
    """Return width, layers and transformer depth (0 without attention) of each level, in LDM's order."""
    levels, layers, depth = [], 0, 0
    while True:
        at = f"{blocks}.{place}"
        layer = f"{at}.0.in_layers.2.weight" in shape
        if layer:
            layers, depth = layers + 1, shape.count(at + ".1.transformer_blocks.{}.norm1.weight")
        resample = any(f"{at}.{key}.weight" in shape for key in ("0.op", "1.conv", "2.conv"))
        if resample or not layer:
            last = place if layer else place - 1
            levels.append((shape(f"{blocks}.{last}.0.in_layers.2.weight", 4)[0], layers, depth))
            layers, depth = 0, 0
        if not resample and not layer:
            return levels
        place += 1


def _vae(shape: _Shapes) -> dict[str, Any]:
    levels = shape.count(VAE + "encoder.down.{}.block.0.conv1.weight")
    return dict(
        _class_name="AutoencoderKL",
        sample_size=512,
        in_channels=shape(f"{VAE}encoder.conv_in.weight", 4)[1],
        out_channels=shape(f"{VAE}decoder.conv_out.weight", 4)[0],
        latent_channels=shape(f"{VAE}decoder.conv_in.weight", 4)[1],
        block_out_channels=[
            shape(f"{VAE}encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(max(levels, 1))
        ],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=shape.count(VAE + "encoder.down.0.block.{}.conv1.weight"),
        use_quant_conv=f"{VAE}quant_conv.weight" in shape,
        use_post_quant_conv=f"{VAE}post_quant_conv.weight" in shape,
        scaling_factor=0.18215,
    )


def _text(shape: _Shapes) -> dict[str, Any]:
    opened = f"{OPEN_CLIP}token_embedding.weight" in shape
    if opened:
        tokens, positions = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        mlp = f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"
        layers = min(shape.count(OPEN_CLIP + "transformer.resblocks.{}.ln_1.weight"), OPEN_CLIP_LAYERS)
    else:
        model = CLIP + "text_model"
        tokens, positions = (f"{model}.embeddings.{which}_embedding.weight" for which in ("token", "position"))
        mlp = f"{model}.encoder.layers.0.mlp.fc1.weight"
        layers = shape.count(model + ".encoder.layers.{}.layer_norm1.weight")
    vocabulary, width = shape(tokens, 2)
    if width == OPEN_CLIP_WIDTH and not opened:
        raise WeightsError(
            f"{shape.what}: its text encoder is Stable Diffusion 2's in transformers' layout, which does not say its "
            "activation; convert the model from a diffusers folder, or from a file with cond_stage_model.model.* keys"
        )
    return dict(
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape(mlp, 2)[0],
        num_hidden_layers=layers,
        num_attention_heads=_heads(shape, "text encoder", width),
        max_position_embeddings=shape(positions, 2)[0],
        hidden_act="gelu" if opened else "quick_gelu",
    )


def _heads(shape: _Shapes, network: str, width: int) -> int:
    if width == 0 or width % HEAD_WIDTH:
        raise WeightsError(
            f"{shape.what}: its {network} of width {width} could have any number of attention heads, as it is no "
            "published model; convert it from a diffusers folder"
        )
    return width // HEAD_WIDTH


def _one_if_same(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)
