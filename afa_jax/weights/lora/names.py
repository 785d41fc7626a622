"""The names that LoRA files give to the layers of a Stable Diffusion model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from afa_jax.models.configs import UNetConfig
from afa_jax.weights.formats.ldm_keys import UNET, ldm_table
from afa_jax.weights.tensors import Tensors

COMPONENTS = ("unet", "text_encoder")  # the components that LoRAs change
Place = tuple[str, str]  # a component and the key of a weight
_DOTTED = {  # before a dotted name: diffusers, PEFT, ComfyUI; a file of one network alone may have none
    "unet": ("unet.", "base_model.model.", "diffusion_model.", ""),
    "text_encoder": ("text_encoder.", "base_model.model.", ""),
}
_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # before a name with underscores
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # diffusers 0.15


def find_places(weights: Mapping[str, Tensors], unet: UNetConfig | None = None) -> dict[str, Place]:
    """Return every name that LoRA files have for a layer of this model, with the weight it means.

    Args:
        weights: the tensors of the model's components.
        unet: the architecture of its U-Net, whose layers have a name in the LDM layout too.

    Dots become underscores here, not the other way round, as ``to_q`` could mean ``to_q`` or ``to.q``.
    """
    places: dict[str, Place] = {}
    table = ldm_table(unet) if unet else {}
    ldm = {key: ldm.removeprefix(UNET).removesuffix(".weight") for ldm, (key,) in table.items()}
    for component, tensors in weights.items():
        layers = [
            key.removesuffix(".weight") for key, t in tensors.items() if key.endswith(".weight") and len(t.shape) > 1
        ]
        for layer in layers:
            place = (component, f"{layer}.weight")
            for name in {*_spellings(component, layer), ldm.get(f"{layer}.weight", layer)}:
                places.update({prefix + name: place for prefix in _DOTTED[component]})
                places.update({prefix + name.replace(".", "_"): place for prefix in _KOHYA[component]})
    return places


def _spellings(component: str, layer: str) -> Iterator[str]:
    """Yield a layer's names in the versions of diffusers and transformers."""
    yield layer
    if component == "unet":
        yield layer.replace(".to_out.0", ".to_out")
        return
    block, _, last = layer.rpartition(".")
    for name in (layer, f"{block}.{_OLD_TEXT.get(last, last)}"):
        yield name
        yield name.removeprefix("text_model.")  # transformers 5
