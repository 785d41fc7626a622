"""Diffusers folders: ``model_index.json`` and one subfolder a component, whichever of diffusers' classes wrote them.

Layout of a Stable Diffusion 1.x/2.x folder::

    model_index.json
    unet/config.json            unet/diffusion_pytorch_model.safetensors
    vae/config.json             vae/diffusion_pytorch_model.safetensors
    text_encoder/config.json    text_encoder/model.safetensors
    tokenizer/vocab.json ...    scheduler/scheduler_config.json

Weights may come in variants and shards (variants.py, shards.py) and from Flax classes (flax_folders.py), with configs
that are older than some fields (old_configs.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from afa_jax.files import aside, replace_folder
from afa_jax.models.clip import TextEncoder
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, MemoryCheckpoint
from afa_jax.weights.flax_folders import open_flax
from afa_jax.weights.json_files import read_json, write_json
from afa_jax.weights.old_configs import todays
from afa_jax.weights.shards import open_shards, shard_files
from afa_jax.weights.tensors import Tensor, TensorFile, Tensors, WeightsError, check_finite, open_tensors, write_tensors
from afa_jax.weights.variants import PYTORCH, weights_name

_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
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
        variant: which of several stored versions of the weights to read, such as ``fp16``; ``weights_name`` says what
            is read without one, or where a component has none of that name.
    """

    path: Path
    variant: str | None = None

    @property
    def metadata(self) -> Mapping[str, str]:
        network = next((name for name in NETWORKS if name in self.components), None)
        return self._open(network).metadata if network else {}

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
            return todays(component, read_json(self.path / component / "scheduler_config.json"))
        index = self.path / "model_index.json"
        if index.is_file():
            pipeline = read_json(index).get("_class_name", "")
            if not isinstance(pipeline, str) or not _PIPELINE.fullmatch(pipeline):
                raise WeightsError(f"{index}: {pipeline!r} is not of the Stable Diffusion 1.x/2.x families")
        return todays(component, read_json(self.path / component / "config.json"))

    def tensors(self, component: str) -> Tensors:
        stored = self._open(component).tensors
        names = [name for name in stored if not name.endswith("position_ids")]
        tensors = {modern_key(component, name): without_pixels(component, name, stored[name]) for name in names}
        if len(tensors) < len(names):
            raise WeightsError(f"{self.what(component)}: some tensors are there under two names; fetch it again")
        return tensors

    def what(self, component: str, config: bool = False) -> str:
        return str(self.path / component / "config.json" if config else self.weights(component))

    def sha256(self, component: str) -> str:
        """Of one file its own hash; of shards that of their hashes, in the order of their names."""
        hashes = []
        for path in self.files(component):
            if not path.is_file():
                raise WeightsError(f"{path}: no such file")
            with open(path, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256"))
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(one.digest() for one in hashes))
        return whole.hexdigest()

    def weights(self, component: str) -> Path:
        """The file of a component's weights, or the index of its shards.

        Raises:
            WeightsError: as weights_name.
        """
        folders = (self.path / name for name in NETWORKS)
        files = (file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())
        names = {file.relative_to(self.path).as_posix() for file in files}
        return self.path / weights_name(names, component, self.variant, str(self.path))

    def files(self, component: str) -> list[Path]:
        """The files that hold a component's weights.

        Raises:
            WeightsError: as weights_name and shard_files.
        """
        path = self.weights(component)
        return shard_files(path) if path.suffix == ".json" else [path]

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
        dtype: of the stored weights; each tensor's own by default.
        metadata: kept in the header of every weights file, over the checkpoint's own.
        overwrite: replace a diffusers folder that is there, once the new one is complete; it may be the checkpoint's.

    Raises:
        WeightsError: as the checkpoint's readers; a tensor that is not finite; the folder exists and is not to be
            overwritten, or does not look like a diffusers folder.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder
    if not folder.exists() and aside(folder).exists():
        aside(folder).rename(folder)  # the last one to overwrite it was killed before it was done
    if folder.exists() and not overwrite:
        raise WeightsError(f"{folder} exists; remove it, overwrite it, or choose another folder")
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsError(f"{folder}: not overwritten, for it has no model_index.json; choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    classes, header = dict(_CLASSES), {"format": "pt"} | dict(checkpoint.metadata) | dict(metadata or {})
    try:
        for name in checkpoint.components:
            if name in NETWORKS:
                what = checkpoint.what(name)
                tensors = {key: _finite(tensor, key, what) for key, tensor in checkpoint.tensors(name).items()}
                if dtype is not None:
                    tensors = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
                write_json(partial / name / "config.json", checkpoint.config(name))
                write_tensors(partial / name / f"{PYTORCH[name]}.safetensors", tensors, header)
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")
        if "scheduler" in checkpoint.components:
            fields = dict(_class_name="DDIMScheduler") | checkpoint.config("scheduler")
            write_json(partial / "scheduler" / "scheduler_config.json", fields)
            classes["scheduler"] = ("diffusers", fields["_class_name"])
        present = {name: list(classes[name]) for name in checkpoint.components}
        write_json(partial / "model_index.json", dict(_class_name="StableDiffusionPipeline") | present)
        replace_folder(folder, partial)
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
