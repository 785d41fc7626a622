"""Scores of networks that were trained on people's preferences: HPSv2 and ImageReward.

Neither of their own packages is used: hpsv2 1.2.0 comes without its vocabulary, and image-reward 1.5 imports what
transformers 5 no longer has and wants OpenAI's clip, which is on no registry. HPSv2 (Wu et al. 2023, arXiv 2306.09341)
is an open_clip ViT-H/14; ImageReward (Xu et al. 2023, arXiv 2304.05977) is a BLIP with a head, and transformers has
BLIP.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.evaluation.metrics.clip_pixels import cropped, padded, to_pixels
from afa_jax.evaluation.metrics.clip_scores import apply_layers, layers_of
from afa_jax.evaluation.metrics.table import MetricInfo, check_prompts, in_batches, on_device, read_state
from afa_jax.weights.tensors import WeightsError

# Mean and deviation of the rewards on people's ratings, from the authors' code.
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35  # tokens of a prompt, as ImageReward was trained
_HEAD_WIDTH = 64  # heads of every attention in BLIP
# Names of the picture encoder's tensors: ImageReward's, and transformers'.
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.", "encoder.layers."),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HPSv2:
    """The cosine of picture and prompt under an open_clip network."""

    infos: tuple[MetricInfo, ...]
    model: Any
    tokenizer: Any
    device: str

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], references: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        import torch

        check_prompts(pictures, prompts)
        size = self.model.visual.image_size
        size = size if isinstance(size, int) else size[0]

        def score(batch: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
            pixels = torch.from_numpy(to_pixels([padded(picture, size) for picture, _ in batch]))
            with torch.inference_mode():
                seen = self.model.encode_image(pixels.to(self.device), normalize=True)
                asked = self.model.encode_text(self.tokenizer([p for _, p in batch]).to(self.device), normalize=True)
                return (seen * asked).sum(-1).double().cpu().numpy()

        with on_device(self.device, self.model):
            return {"hpsv2": in_batches(list(zip(pictures, prompts, strict=True)), score)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReward:
    """BLIP's prompt encoder, which attends to the encoded picture, and a head on its first token."""

    infos: tuple[MetricInfo, ...]
    vision: Any
    text: Any
    head: tuple[tuple[np.ndarray, np.ndarray], ...]
    tokenizer: Any
    device: str

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], references: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        import torch

        check_prompts(pictures, prompts)
        size, device = self.vision.config.image_size, self.device

        def encode(batch: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
            pixels = torch.from_numpy(to_pixels([cropped(picture, size) for picture, _ in batch]))
            tokens = self.tokenizer(
                [p for _, p in batch], padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                seen = self.vision(pixel_values=pixels.to(device)).last_hidden_state
                states = self.text(
                    input_ids=tokens.input_ids.to(device),
                    attention_mask=tokens.attention_mask.to(device),
                    encoder_hidden_states=seen,
                )
                return states.last_hidden_state[:, 0].cpu().numpy()

        with on_device(device, self.vision, self.text):
            states = in_batches(list(zip(pictures, prompts, strict=True)), encode)
        rewards = apply_layers(self.head, states)[:, 0].astype(np.float64)
        return {"image_reward": (rewards - REWARD_MEAN) / REWARD_STD}


def load_hpsv2(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> HPSv2:
    """Load HPSv2 from ``hpsv2``: a state dict of open_clip's ViT-H-14, or a folder with its own open_clip config."""
    import open_clip

    path = paths["hpsv2"]
    name = f"local-dir:{path}" if path.is_dir() else "ViT-H-14"
    try:
        model = open_clip.create_model(name)
        if not path.is_dir():
            model.load_state_dict(read_state(path))
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: not the weights of an open_clip ViT-H-14; evaluation.weights.hpsv2") from error
    return HPSv2(infos=infos, model=model.eval(), tokenizer=tokenizer, device=device)


def load_image_reward(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> ImageReward:
    """Load ImageReward from the authors' state dict ``image_reward`` and BERT's vocabulary in ``bert_tokenizer``.

    The networks' sizes are read from the tensors.
    """
    import torch
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    path = paths["image_reward"]
    state = read_state(path)
    seeing = {_vision_name(key): x for key, x in _below(state, "blip.visual_encoder.").items()}
    reading = _below(state, "blip.text_encoder.")
    reading.pop("embeddings.position_ids", None)
    try:
        positions, patch = seeing["embeddings.position_embedding"], seeing["embeddings.patch_embedding.weight"]
        vision = BlipVisionModel(
            BlipVisionConfig(
                **_sizes(seeing, "encoder.layers", "mlp.fc1", patch.shape[0]),
                patch_size=patch.shape[-1],
                image_size=round((positions.shape[1] - 1) ** 0.5) * patch.shape[-1],
                layer_norm_eps=1e-6,
            )
        )
        words = reading["embeddings.word_embeddings.weight"]
        text = BlipTextModel(
            BlipTextConfig(
                **_sizes(reading, "encoder.layer", "intermediate.dense", words.shape[1]),
                vocab_size=words.shape[0],
                encoder_hidden_size=patch.shape[0],
                max_position_embeddings=reading["embeddings.position_embeddings.weight"].shape[0],
            ),
            add_pooling_layer=False,
        )
        vision.load_state_dict(seeing)
        text.load_state_dict(reading)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{path}: not ImageReward's weights; evaluation.weights.image_reward") from error
    tokenizer = BertTokenizer.from_pretrained(paths["bert_tokenizer"], local_files_only=True)
    networks = [network.to(dtype=torch.float32).eval() for network in (vision, text)]
    return ImageReward(
        infos=infos,
        vision=networks[0],
        text=networks[1],
        head=layers_of(state, "mlp.layers."),
        tokenizer=tokenizer,
        device=device,
    )


def _sizes(state: Mapping[str, Any], layers: str, wide: str, width: int) -> dict[str, int]:
    return dict(
        hidden_size=width,
        intermediate_size=state[f"{layers}.0.{wide}.weight"].shape[0],
        num_hidden_layers=len({key.split(".")[2] for key in state if key.startswith(f"{layers}.")}),
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
    )


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def _vision_name(key: str) -> str:
    for pattern, name in _VISION:
        key, count = re.subn(pattern, name, key)
        if count:
            break
    return key
