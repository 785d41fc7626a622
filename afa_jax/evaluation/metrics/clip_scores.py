"""Scores of CLIP networks in transformers' format: CLIP-T, CLIP-I, LAION's aesthetic score and PickScore.

CLIP: Radford et al. 2021 (arXiv 2103.00020). PickScore: Kirstain et al. 2023 (arXiv 2305.01569), a CLIP ViT-H/14
trained on people's choices. Aesthetic: a linear head on CLIP ViT-L/14 (LAION, improved-aesthetic-predictor).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.evaluation.metrics.clip_pixels import cropped, to_pixels
from afa_jax.evaluation.metrics.table import MetricInfo, check_prompts, in_batches, on_device, read_state
from afa_jax.weights.tensors import WeightsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """transformers' CLIPModel and tokenizer; it embeds pictures and prompts as unit vectors, float32 ``[k, d]``."""

    model: Any
    tokenizer: Any
    device: str

    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings of uint8 pictures."""
        import torch

        size = self.model.config.vision_config.image_size

        def embed(batch: Sequence[np.ndarray]) -> np.ndarray:
            pixels = torch.from_numpy(to_pixels([cropped(picture, size, math.floor) for picture in batch]))
            with torch.inference_mode():
                pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
                return self.model.visual_projection(pooled).cpu().numpy()

        with on_device(self.device, self.model):
            return _unit(in_batches(pictures, embed))

    def prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of prompts; a long one is cut to the network's length (77 tokens)."""
        import torch

        length = self.model.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> np.ndarray:
            tokens = self.tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            with torch.inference_mode():
                pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
                return self.model.text_projection(pooled).cpu().numpy()

        with on_device(self.device, self.model):
            return _unit(in_batches(prompts, embed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipScores:
    """The metrics clip_t, clip_i and aesthetic, as far as ``infos`` has them, from one embedding of each picture.

    ``head`` has the weights and biases of aesthetic's linear layers, in the order of application.
    """

    infos: tuple[MetricInfo, ...]
    clip: Clip
    head: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], references: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        check_prompts(pictures, prompts)
        scores: dict[str, np.ndarray] = {}
        with on_device(self.clip.device, self.clip.model):
            seen = self.clip.pictures(pictures)
            for name in (info.name for info in self.infos):
                if name == "aesthetic":
                    scores[name] = apply_layers(self.head, seen)[:, 0].astype(np.float64)
                elif name == "clip_t":
                    scores[name] = 100 * _cosines(seen, self.clip.prompts(prompts))
                elif references is not None:
                    scores[name] = 100 * _cosines(seen, self.clip.pictures(references))
        return scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickScore:
    """The cosine of picture and prompt, times the scale that the network was trained with."""

    infos: tuple[MetricInfo, ...]
    clip: Clip

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], references: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        check_prompts(pictures, prompts)
        scale = float(self.clip.model.logit_scale.exp())
        with on_device(self.clip.device, self.clip.model):
            return {"pickscore": scale * _cosines(self.clip.pictures(pictures), self.clip.prompts(prompts))}


def load_clip_scores(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> ClipScores:
    """Load ClipScores from a folder ``clip`` in transformers' format and a state dict ``aesthetic``."""
    head = layers_of(read_state(paths["aesthetic"]), "layers.") if "aesthetic" in paths else ()
    clip = _load_clip(paths["clip"], paths["clip"], device)
    if head and head[0][0].shape[1] != clip.model.config.projection_dim:
        raise WeightsError(
            f"{paths['aesthetic']}: reads {head[0][0].shape[1]} features where the CLIP network of {paths['clip']} has "
            f"{clip.model.config.projection_dim}; take the head that was trained on this network"
        )
    return ClipScores(infos=infos, clip=clip, head=head)


def load_pickscore(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> PickScore:
    """Load PickScore from folders ``pickscore`` and ``pickscore_tokenizer`` in transformers' format."""
    return PickScore(infos=infos, clip=_load_clip(paths["pickscore"], paths["pickscore_tokenizer"], device))


def _load_clip(folder: Path, tokenizer: Path, device: str) -> Clip:
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    # transformers raises many kinds of exceptions for a folder that it cannot read.
    except Exception as error:
        raise WeightsError(f"{folder}: not a CLIP model with its tokenizer ({str(error).splitlines()[0]})") from error
    return Clip(model=model.eval(), tokenizer=words, device=device)


def layers_of(state: Mapping[str, Any], prefix: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return weights and biases of the layers ``prefix0.weight``, ``prefix0.bias``, ``prefix2.weight`` ... in order."""
    places = sorted(int(key.split(".")[-2]) for key in state if key.startswith(prefix) and key.endswith(".weight"))
    if not places:
        raise WeightsError(f"no tensors {prefix}*.weight, but {', '.join(sorted(state)[:3])} ...; not this metric's")
    return tuple((state[f"{prefix}{i}.weight"].numpy(), state[f"{prefix}{i}.bias"].numpy()) for i in places)


def apply_layers(layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> np.ndarray:
    """Apply linear layers with nothing between them but disabled dropout: ``[k, d]`` to ``[k, last outputs]``."""
    for weight, bias in layers:
        x = x @ weight.T + bias
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.einsum("kd,kd->k", one.astype(np.float64), two.astype(np.float64))
