"""Diffusers folders: ``model_index.json`` and one subfolder a component, weights in safetensors.

Layout of a Stable Diffusion 1.x/2.x folder::

    model_index.json
    unet/config.json            unet/diffusion_pytorch_model.safetensors
    vae/config.json             vae/diffusion_pytorch_model.safetensors
    text_encoder/config.json    text_encoder/model.safetensors
    tokenizer/vocab.json ...    scheduler/scheduler_config.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from afa_jax.models.clip import TextEncoder
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, MemoryCheckpoint
from afa_jax.weights.tensors import PICKLES, Tensor, Tensors, WeightsError, check_finite, open_tensors, write_tensors

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
# StableDiffusionPipeline, its image-to-image and Flax kin; StableDiffusionXL and StableDiffusion3 are other families.
_PIPELINE = re.compile(r"(Flax)?StableDiffusion(?!XL|3)\w*")
# The VAE's attention before diffusers 0.15.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class FolderCheckpoint:
    """A diffusers folder as a Checkpoint (which see).

    Attributes:
        path: the folder that holds ``unet/``, ``vae/``, ...
    """

    path: Path

    @property
    def metadata(self) -> Mapping[str, str]:
        return open_tensors(weights_file(self.path, "unet")).metadata

    @property
    def components(self) -> tuple[str, ...]:
        names = {**dict.fromkeys(NETWORKS, "config.json"), "scheduler": "scheduler_config.json"}
        found = [name for name, file in names.items() if (self.path / name / file).is_file()]
        return (*found, *(["tokenizer"] if self.tokenizer else []))

    @property
    def tokenizer(self) -> Path | None:
        return self.path / "tokenizer" if (self.path / "tokenizer").is_dir() else None

    def config(self, component: str) -> dict[str, Any]:
        if component == "scheduler":
            return read_json(self.path / component / "scheduler_config.json")
        index = self.path / "model_index.json"
        if index.is_file():
            pipeline = read_json(index).get("_class_name", "")
            if not _PIPELINE.fullmatch(pipeline):
                raise WeightsError(f"{index}: {pipeline!r} is not of the Stable Diffusion 1.x/2.x families")
        return read_json(self.path / component / "config.json")

    def tensors(self, component: str) -> Tensors:
        stored = open_tensors(weights_file(self.path, component)).tensors
        return {
            modern_key(component, name): without_pixels(component, name, tensor)
            for name, tensor in stored.items()
            if not name.endswith("position_ids")
        }

    def what(self, component: str, config: bool = False) -> str:
        return str(self.path / component / "config.json" if config else weights_file(self.path, component))

    def sha256(self, component: str) -> str:
        path = weights_file(self.path, component)
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(
    folder: Path | str,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint as a diffusers folder; components it lacks are left out of ``model_index.json``.

    Args:
        folder: must not exist; it appears when it is complete.
        dtype: of the stored weights; each tensor's own by default.
        metadata: kept in the header of every weights file, over the checkpoint's own.

    Raises:
        FileExistsError: the folder exists.
        WeightsError: as the checkpoint's readers; a tensor that is not finite.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    header = {"format": "pt"} | dict(checkpoint.metadata) | dict(metadata or {})
    try:
        for name in checkpoint.components:
            if name in NETWORKS:
                what = checkpoint.what(name)
                tensors = {key: _finite(tensor, key, what) for key, tensor in checkpoint.tensors(name).items()}
                if dtype is not None:
                    tensors = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
                write_json(partial / name / "config.json", checkpoint.config(name))
                write_tensors(partial / name / f"{_WEIGHTS[name]}.safetensors", tensors, header)
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")
        if "scheduler" in checkpoint.components:
            fields = dict(_class_name="DDIMScheduler") | checkpoint.config("scheduler")
            write_json(partial / "scheduler" / "scheduler_config.json", fields)
        present = {name: list(_CLASSES[name]) for name in checkpoint.components}
        write_json(partial / "model_index.json", dict(_class_name="StableDiffusionPipeline") | present)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_folder(
    folder: Path | str,
    *,
    unet: UNet | None = None,
    vae: VAE | None = None,
    text_encoder: TextEncoder | None = None,
    tokenizer: Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write modules as a diffusers folder: ``write_folder`` of ``MemoryCheckpoint.of``, which see."""
    parts: dict[str, Any] = dict(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    write_folder(folder, MemoryCheckpoint.of(**parts, scheduler=scheduler), dtype=dtype, metadata=metadata)


def weights_file(folder: Path, component: str) -> Path:
    """The file with a component's weights; a pickle only where there is nothing else, to be refused by name."""
    stem = folder / component / _WEIGHTS[component]
    found = [stem.with_name(f"{stem.name}{variant}.safetensors") for variant in ("", ".fp16", ".bf16")]
    pickles = sorted(path for path in stem.parent.glob("*") if path.suffix in PICKLES)
    return next((path for path in (*found, *pickles) if path.is_file()), found[0])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: the file is missing or does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; is {path.parent.parent} a diffusers folder?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def modern_key(component: str, key: str) -> str:
    """A network's key as today's diffusers and transformers spell it."""
    # transformers 5 writes the keys without the prefix that every folder before it has.
    if component == "text_encoder" and not key.startswith("text_model."):
        return f"text_model.{key}"
    match = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    if component == "vae" and match:
        return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}"
    return key


def without_pixels(component: str, key: str, tensor: Tensor) -> Tensor:
    """Old files store the VAE's attention projections as 1x1 convolutions."""
    if component == "vae" and ".attentions." in key and len(tensor.shape) == 4:
        return tensor.apply(lambda array: array[:, :, 0, 0], tensor.shape[:2])
    return tensor


def _finite(tensor: Tensor, name: str, what: str) -> Tensor:
    def checked(array: Any) -> Any:
        check_finite(array, name, what)
        return array

    return tensor.apply(checked)
