"""Diffusers folders: ``model_index.json`` and one subfolder a component, whichever of diffusers' classes wrote them.

Layout of a Stable Diffusion 1.x/2.x folder::

    model_index.json
    unet/config.json            unet/diffusion_pytorch_model.safetensors
    vae/config.json             vae/diffusion_pytorch_model.safetensors
    text_encoder/config.json    text_encoder/model.safetensors
    tokenizer/vocab.json ...    scheduler/scheduler_config.json

Weights may come in variants and shards (variants.py, shards.py) and from Flax classes (flax_folders.py), with configs
that are older than some fields (old_configs.py). A U-Net or VAE alone may be in the folder itself, not in a subfolder.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa_jax.errors import InputError
from afa_jax.files import check_new, is_empty, partial_output, remove_leftovers, replace_folder, writing
from afa_jax.models.configs import UNetConfig
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, MemoryCheckpoint, hash_tensors, rounded
from afa_jax.weights.formats.flax_folders import open_flax
from afa_jax.weights.formats.old_configs import todays
from afa_jax.weights.formats.shards import open_shards
from afa_jax.weights.formats.single_file import CONFIGS
from afa_jax.weights.formats.unused import is_unused
from afa_jax.weights.formats.variants import PYTORCH, weights_name
from afa_jax.weights.json_files import read_json, write_json
from afa_jax.weights.keys import OLD_VAE_ATTENTION, without_pixels
from afa_jax.weights.tensors import (
    Tensor,
    TensorFile,
    Tensors,
    WeightsError,
    checked,
    listed,
    open_tensors,
    write_tensors,
)
from afa_jax.weights.tokenizer.files import read_tokenizer

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from afa_jax.models.clip import TextEncoder
    from afa_jax.models.unet import UNet
    from afa_jax.models.vae import VAE

_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
_BARE = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
}  # component by the class in a single network's config.json
# StableDiffusionPipeline, its image-to-image and Flax kin; StableDiffusionXL and StableDiffusion3 are other families.
_PIPELINE = re.compile(r"(Flax)?StableDiffusion(?!XL|3)\w*")
_TASKS = {"inpainting": "StableDiffusionInpaintPipeline", "InstructPix2Pix": "StableDiffusionInstructPix2PixPipeline"}
# All entries that a folder written by diffusers can have.
_ENTRIES = ("model_index.json", *_CLASSES, "scheduler", "safety_checker", "feature_extractor", "image_encoder")
_NOT_KEPT = (CONFIGS, "modelspec.hash_sha256")  # metadata that only applies to the file that was read


@dataclasses.dataclass(frozen=True)
class FolderCheckpoint:
    """A diffusers folder as a Checkpoint.

    Attributes:
        path: the folder that holds ``unet/``, ``vae/``, ..., or the folder of a single U-Net or VAE.
        variant: the stored version of the weights to read, such as ``fp16``; ``weights_name`` explains
            which is read without one, or if a component has none of that name.
    """

    path: Path
    variant: str | None = None

    @property
    def metadata(self) -> Mapping[str, str]:
        network = next((name for name in NETWORKS if name in self.components), None)
        return self._open(network).metadata if network else {}

    @property
    def bare(self) -> str | None:
        """Return which component the folder itself is, ``unet`` or ``vae``; None if components are in subfolders."""
        own, index = self.path / "config.json", self.path / "model_index.json"
        if not own.is_file() or index.is_file() or any((self.path / name / own.name).is_file() for name in NETWORKS):
            return None
        return _BARE.get(str(read_json(own).get("_class_name")).removeprefix("Flax"))

    @property
    def components(self) -> tuple[str, ...]:
        if self.bare:
            return (self.bare,)
        names = {**dict.fromkeys(NETWORKS, "config.json"), "scheduler": "scheduler_config.json"}
        found = [name for name, file in names.items() if (self.path / name / file).is_file()]
        return (*found, *(["tokenizer"] if self.tokenizer else []))

    @property
    def tokenizer(self) -> Path | None:
        return self.path / "tokenizer" if (self.path / "tokenizer").is_dir() else None

    def config(self, component: str) -> dict[str, Any]:
        if component == "scheduler":
            return todays(component, read_json(self.path / component / "scheduler_config.json"))
        self.check_pipeline()
        return todays(component, read_json(self._folder(component) / "config.json"))

    def check_pipeline(self) -> None:
        """Raise WeightsError if a model_index.json exists and belongs to another family of models."""
        index = self.path / "model_index.json"
        if index.is_file():
            pipeline = read_json(index).get("_class_name", "")
            if not isinstance(pipeline, str) or not _PIPELINE.fullmatch(pipeline):
                raise WeightsError(f"{index}: {pipeline!r} is not of the Stable Diffusion 1.x/2.x families")

    def tensors(self, component: str) -> Tensors:
        stored = self._open(component).tensors
        layers = self.config(component).get("num_hidden_layers") if component == "text_encoder" else None
        names = [name for name in stored if not is_unused(component, name, layers)]
        tensors = {modern_key(component, name): as_linear(component, name, stored[name]) for name in names}
        if len(tensors) < len(names):
            raise WeightsError(f"{self.what(component)}: some tensors are there under two names; fetch it again")
        return tensors

    def what(self, component: str, config: bool = False) -> str:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return str(self._folder(component) / name if config else self.weights(component))

    def sha256(self, component: str) -> str:
        return hash_tensors(self.tensors(component))

    def weights(self, component: str) -> Path:
        """Return the file of a component's weights, or the index of its shards.

        Raises:
            WeightsError: as weights_name.
        """
        folders = {name: self._folder(name) for name in NETWORKS}
        names = {
            f"{name}/{file.name}"
            for name, folder in folders.items()
            if folder.is_dir()
            for file in folder.iterdir()
            if file.is_file()
        }
        found = weights_name(names, component, self.variant, str(self.path))
        return folders[component] / found.removeprefix(f"{component}/")

    def _folder(self, component: str) -> Path:
        return self.path if component == self.bare else self.path / component

    def _open(self, component: str) -> TensorFile:
        path = self.weights(component)
        readers = {".json": open_shards, ".msgpack": open_flax}
        return readers.get(path.suffix, open_tensors)(path)


def write_folder(
    folder: Path | str,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint as a diffusers folder; components it lacks are left out of ``model_index.json``.

    Args:
        folder: must not exist; it appears when it is complete.
        dtype: the dtype to store weights in; by default each tensor keeps its own.
        metadata: kept in the header of every weights file, over the checkpoint's own.
        overwrite: replace a diffusers folder that is there, once the new one is complete; it may be the checkpoint's.

    Raises:
        InputError: as check_target, also for what appears there during the writing; as ``rounded`` for the dtype; or
            the system does not let the folder be written, unless the disk is full.
        WeightsError: as the checkpoint's readers, before anything is written; a tensor that is not finite.
        ConfigError: a U-Net that is not of the Stable Diffusion 1.x/2.x families.
    """
    folder = Path(os.path.realpath(folder))
    if dtype is not None:
        checkpoint = rounded(checkpoint, dtype)
    header = {key: value for key, value in {**checkpoint.metadata, **(metadata or {})}.items() if key not in _NOT_KEPT}
    files: dict[str, Tensors] = {}
    for name in [name for name in checkpoint.components if name in NETWORKS]:
        what = checkpoint.what(name)
        files[f"{name}/{PYTORCH[name]}.safetensors"] = {
            key: checked(tensor, key, what) for key, tensor in checkpoint.tensors(name).items()
        }
    if not files and checkpoint.tokenizer is None:
        raise WeightsError(f"{checkpoint.path}: it has no U-Net, VAE or text encoder, so there is nothing to write")
    configs = _configs(checkpoint)
    with writing(folder):
        check_target(folder, overwrite)
        remove_leftovers(folder)
        with partial_output(folder) as partial:
            for file, fields in configs.items():
                write_json(partial / file, fields)
            if checkpoint.tokenizer is not None:
                read_tokenizer(checkpoint.tokenizer).write(partial / "tokenizer")
            for file, tensors in files.items():
                write_tensors(partial / file, tensors, header | {"format": "pt"}, reread=True)
            check_target(folder, overwrite)
            replace_folder(folder, partial, overwrite)


def check_target(folder: Path, overwrite: bool | None = False) -> None:
    """Check that write_folder may write a folder.

    Raises:
        InputError: it is there and is not to be overwritten, is no diffusers folder, or has more in it than diffusers
            writes.
    """
    check_new(folder, overwrite)
    if not folder.exists() or is_empty(folder):
        return
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: not overwritten, for it has no model_index.json; choose another folder")
    if others := sorted(entry.name for entry in folder.iterdir() if entry.name not in _ENTRIES):
        raise InputError(f"{folder}: not overwritten, for it has {listed('other entries', others)}; move them away")


def _configs(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return the JSON files of a checkpoint's folder by name, except the tokenizer's."""
    classes, task = dict(_CLASSES), ""
    configs: dict[str, Mapping[str, Any]] = {}
    for name in checkpoint.components:
        if name in NETWORKS:
            configs[f"{name}/config.json"] = fields = checkpoint.config(name)
            if name == "unet":
                task = UNetConfig.from_json(fields, checkpoint.what(name, config=True)).task
        elif name == "scheduler":
            fields = dict(_class_name="DDIMScheduler") | checkpoint.config(name)
            configs["scheduler/scheduler_config.json"] = fields
            classes["scheduler"] = ("diffusers", fields["_class_name"])
    index: dict[str, Any] = dict(_class_name=_TASKS.get(task, "StableDiffusionPipeline"))
    return {"model_index.json": index | {name: list(classes[name]) for name in checkpoint.components}} | configs


def save_folder(
    folder: Path | str,
    *,
    unet: UNet | None = None,
    vae: VAE | None = None,
    text_encoder: TextEncoder | None = None,
    tokenizer: Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
    dtype: DTypeLike = "float32",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write modules as a diffusers folder, with ``MemoryCheckpoint.of`` and ``write_folder``."""
    parts: dict[str, Any] = dict(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    new = MemoryCheckpoint.of(**parts, scheduler=scheduler)
    write_folder(folder, new, dtype=dtype, metadata=metadata, overwrite=overwrite)


def modern_key(component: str, key: str) -> str:
    """Return a network's key as today's diffusers and transformers spell it."""
    # transformers 5 writes the keys without the prefix that every folder before it has.
    if component == "text_encoder" and not key.startswith("text_model."):
        return f"text_model.{key}"
    match = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    if component == "vae" and match:
        return f"{match[1]}.{OLD_VAE_ATTENTION[match[2]]}.{match[3]}"
    return key


def as_linear(component: str, key: str, tensor: Tensor) -> Tensor:
    """Turn the VAE's attention projections, 1x1 convolutions in old files, into linear layers."""
    shape = without_pixels(tensor.shape) if component == "vae" and ".attentions." in key else tensor.shape
    return tensor if shape == tensor.shape else tensor.apply(lambda array: array.reshape(shape), shape)
