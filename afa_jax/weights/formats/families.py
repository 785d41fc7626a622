"""The model family of a safetensors file, told from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from afa_jax.errors import some
from afa_jax.models.configs import task_of
from afa_jax.weights.formats.foreign_files import LORA_ADVICE
from afa_jax.weights.tensors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

_OTHER = "only Stable Diffusion 1.x and 2.x can be read; take a checkpoint of one of these"
_LYCORIS = (
    "only LoRAs of linear and convolutional layers can be baked in; merge it into a checkpoint with its own tools"
)
_ADDITION = "it is no model by itself, and an ensemble has no place for it; leave it out"
_FOLDER = "put it into a diffusers folder, beside its config.json, and give the folder"


@dataclasses.dataclass(frozen=True)
class Family:
    """The family of models that a file belongs to.

    Attributes:
        name: the words after "this is" in a message.
        advice: why the file cannot be read as a checkpoint, and what to do; empty if it can.
    """

    name: str
    advice: str = ""

    @property
    def supported(self) -> bool:
        """Return whether SingleFileCheckpoint reads files of this family."""
        return not self.advice

    @property
    def is_lora(self) -> bool:
        """Return whether the file is a LoRA, judging by some of its keys."""
        return self.advice is LORA_ADVICE

    def check(self, path: Path) -> None:
        """Raise WeightsError for a file that cannot be read as a checkpoint, with its family and the remedy."""
        if self.advice:
            raise WeightsError(f"{path}: this is {self.name}: {self.advice}")


# The first rule that finds a key decides, so a family with all parts of another one, and more, comes before it.
_RULES = tuple(
    (re.compile(pattern), Family(name, advice))
    for pattern, name, advice in (
        (r"\.hada_w[12]_[ab]$", "a LoHa (LyCORIS)", _LYCORIS),
        (r"\.lokr_w[12](_[ab])?$", "a LoKr (LyCORIS)", _LYCORIS),
        (r"lora[._](down|up|A|B)\b", "a LoRA", LORA_ADVICE),
        (r"^(emb_params|clip_[lg]|string_to_param\..*|<.*>)$", "a textual inversion", _ADDITION),
        (
            r"^(control_model|controlnet_cond_embedding|controlnet_down_blocks|input_hint_block)\.",
            "a ControlNet",
            _ADDITION,
        ),
        (r"^(image_proj|ip_adapter)\.", "an IP-Adapter", _ADDITION),
        (r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b", "a T2I-Adapter", _ADDITION),
        (r"\bmotion_modules\.", "an AnimateDiff motion module", _ADDITION),
        (r"\b(time_stack|time_mixer)\b", "Stable Video Diffusion", _OTHER),
        (r"^conditioner\.embedders\.1\.|^add_embedding\.linear_1\.", "SDXL", _OTHER),
        (r"^conditioner\.embedders\.0\.", "the SDXL refiner", _OTHER),
        (r"\bindividual_token_refiner\.", "HunyuanVideo", _OTHER),
        (r"\bdistilled_guidance_layer\.", "Chroma", _OTHER),
        (r"\bsingle_stream_modulation\.", "Flux.2", _OTHER),
        (r"\bdouble_blocks\.0\.img_attn\.|^single_transformer_blocks\.0\.", "Flux", _OTHER),
        (r"\b(joint_blocks|transformer_blocks)\.0\.(context_block|norm1_context)\b", "SD3", _OTHER),
        (r"\bdouble_layers\.0\.attn\.w2q\.", "AuraFlow", _OTHER),
        (r"\bdouble_stream_blocks\.0\.", "HiDream", _OTHER),
        (r"\bclip_txt_mapper\.|\bchannelwise\.0\.", "Stable Cascade", _OTHER),
        (r"\bmlp_t5\.0\.|\bblocks\.0\.default_modulation\.", "Hunyuan-DiT", _OTHER),
        (r"\bpatchify_proj\.", "LTX-Video", _OTHER),
        (r"\.mlp\.inverted_conv\.", "Sana", _OTHER),
        (r"\bt_block\.1\.|^adaln_single\.", "PixArt", _OTHER),
        (r"\bcap_embedder\.0\.", "Lumina", _OTHER),
        (r"\bhead\.modulation$", "Wan", _OTHER),
        (r"^depth_model\.", "Stable Diffusion 2 depth-to-picture", _OTHER),
        (r"^cc_projection\.", "Zero123", _OTHER),
        (r"^cond_stage_model\.model\.visual\.", "Stable Diffusion image variations", _OTHER),
        (r"^cond_stage_model\.transformer\.token_emb\.", "the text-to-picture LDM of 2021", _OTHER),
        (r"^model\.diffusion_model\..*\.fuser\.", "GLIGEN", _OTHER),
        (r"^(body|model)\.\d+\.(sub|rdb1)\b|^(params_ema|conv_first)\.", "an upscaler of pictures", _OTHER),
    )
)
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_LAST = "model.diffusion_model.out.2.weight"
_LABELS = re.compile(r"model\.diffusion_model\.label_emb\.")
_CONTEXT = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")
_PROJECTION = re.compile(r"model\.diffusion_model\..*\.proj_in\.weight")


def family_of(shapes: Shapes) -> Family:
    """Return the family of a file with these tensors; for one that is unsupported or unknown it has advice."""
    if not shapes:
        return Family("a file without tensors", "fetch or write it again")
    for pattern, family in _RULES:
        if any(pattern.search(key) for key in shapes):
            return family
    if _FIRST in shapes:
        return _ldm(shapes)
    if any(key.startswith("model.diffusion_model.") for key in shapes):
        return Family("another U-Net or transformer in a single file", _OTHER)
    if any(key.startswith("cond_stage_model.") for key in shapes):
        return Family("a Stable Diffusion text encoder without a U-Net")
    for prefix in ("first_stage_model.", ""):
        if f"{prefix}decoder.conv_in.weight" in shapes:
            return _vae(shapes, prefix)
    if any(key.startswith("text_model.") for key in shapes):
        return Family("a text encoder in diffusers' layout", _FOLDER)
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.0.resnets.") for key in shapes):
        return Family("a U-Net in diffusers' layout", _FOLDER)
    return Family(f"no model that is known here (it has {some(sorted(shapes), 3)})", _OTHER)


def _ldm(shapes: Shapes) -> Family:
    """Return the family of a U-Net in LDM's layout, told by its conditioning."""
    context = next((shapes[key][-1] for key in shapes if _CONTEXT.fullmatch(key) and shapes[key]), None)
    if context is None:
        return Family("a latent diffusion model without text", _OTHER)
    if any(_LABELS.match(key) for key in shapes):
        names = {2048: "SDXL", 1280: "the SDXL refiner"}
        upscaler = "the Stable Diffusion x4 upscaler" if shapes[_FIRST][1:2] == (7,) else "Stable Diffusion 2.1 unCLIP"
        return Family(names.get(context, upscaler), _OTHER)
    linear = any(_PROJECTION.fullmatch(key) and len(shapes[key]) == 2 for key in shapes)
    name = f"Stable Diffusion {'2.x' if linear else '1.x'}"
    first, last = shapes[_FIRST], shapes.get(_LAST, ())
    if len(first) == len(last) == 4 and first[1] != last[0]:
        name += f", {task_of(first[1], last[0])} ({first[1]} input channels)"
    return Family(name)


def _vae(shapes: Shapes, prefix: str) -> Family:
    if any(key.startswith(f"{prefix}encoder.down_blocks.") for key in shapes):
        return Family("an autoencoder in diffusers' layout", _FOLDER)
    if f"{prefix}quant_conv.weight" not in shapes and shapes[f"{prefix}decoder.conv_in.weight"][1:2] == (16,):
        return Family("an autoencoder of SD3 or Flux", _OTHER)
    return Family("a Stable Diffusion autoencoder without a U-Net")
