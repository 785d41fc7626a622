"""The names that LoRA files give to the layers of a Stable Diffusion model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from afa_jax.weights.tensors import Tensors

COMPONENTS = ("unet", "text_encoder")  # what LoRAs change
Place = tuple[str, str]  # a component and the key of a weight
_DOTTED = {  # before a dotted name: diffusers, PEFT, ComfyUI; a file of one network alone may have none
    "unet": ("unet.", "base_model.model.", "diffusion_model.", ""),
    "text_encoder": ("text_encoder.", "base_model.model.", ""),
}
_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # before a name with underscores
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # diffusers 0.15


def find_places(weights: Mapping[str, Tensors]) -> dict[str, Place]:
    """Every name under which LoRA files know a layer of this model, and the weight it means.

    Dots are made underscores here and not the other way round: ``to_q`` and ``to.q`` cannot be told apart.
    """
    places: dict[str, Place] = {}
    for component, tensors in weights.items():
        layers = [
            key.removesuffix(".weight") for key, t in tensors.items() if key.endswith(".weight") and len(t.shape) > 1
        ]
        ldm = dict(_ldm_names(layers)) if component == "unet" else {}
        for layer in layers:
            place = (component, f"{layer}.weight")
            for name in {*_spellings(component, layer), ldm.get(layer, layer)}:
                places.update({prefix + name: place for prefix in _DOTTED[component]})
                places.update({prefix + name.replace(".", "_"): place for prefix in _KOHYA[component]})
    return places


def _spellings(component: str, layer: str) -> Iterator[str]:
    """A layer's names in the versions of diffusers and transformers."""
    yield layer
    if component == "unet":
        yield layer.replace(".to_out.0", ".to_out")
        return
    block, _, last = layer.rpartition(".")
    for name in (layer, f"{block}.{_OLD_TEXT.get(last, last)}"):
        yield name
        yield name.removeprefix("text_model.")  # transformers 5


def _ldm_names(layers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Layers of the U-Net with their names in the LDM layout, where all blocks are numbered through."""
    inside = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    outside = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    found = {
        match[0] for layer in layers if (match := re.match(r"(down|up)_blocks\.\d+\.(resnet|attention)s\.\d+", layer))
    }
    count = Counter(name.rpartition(".")[0] for name in found)
    for layer in layers:
        if layer in outside:
            yield layer, outside[layer]
        elif match := re.match(r"mid_block\.(resnet|attention)s\.(\d)\.(.+)", layer):
            part = 1 if match[1] == "attention" else 2 * int(match[2])
            yield layer, f"middle_block.{part}.{inside.get(match[3], match[3])}"
        elif match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer):
            way, block, kind, number, rest = match.groups()
            sampler = int(way == "down")  # which is a block of its own on the way down, part of the last one going up
            first = sampler + sum(count[f"{way}_blocks.{i}.resnets"] + sampler for i in range(int(block)))
            last, attention = count[f"{way}_blocks.{block}.resnets"] - 1, count[f"{way}_blocks.{block}.attentions"] > 0
            index, part, tail = {
                "resnets": (int(number), 0, inside.get(rest, rest)),
                "attentions": (int(number), 1, rest),
                "downsamplers": (last + 1, 0, "op"),
                "upsamplers": (last, 1 + attention, rest),
            }[kind]
            side = "input" if way == "down" else "output"
            yield layer, f"{side}_blocks.{first + index}.{part}.{tail}"
