"""Diffusers folders: ``model_index.json`` and one subfolder a component, weights in safetensors.

Layout of a Stable Diffusion 1.x/2.x folder::

    model_index.json
    unet/config.json            unet/diffusion_pytorch_model.safetensors
    vae/config.json             vae/diffusion_pytorch_model.safetensors
    text_encoder/config.json    text_encoder/model.safetensors
    tokenizer/vocab.json ...    scheduler/scheduler_config.json

Single-file checkpoints and folders written by diffusers' Flax classes will have their own readers beside this one; all
of them end in the same state dicts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import ConvOut, UNet
from afa_jax.models.vae import VAE
from afa_jax.weights.keys import Key, pytorch_name, text_key, unet_key
from afa_jax.weights.tensors import PICKLES, WeightsError, load_state_dict, read_tensors, state_dict, write_tensors

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


def load_unet(folder: Path | str, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> UNet:
    """The U-Net of a diffusers folder (the folder that holds ``unet/``).

    Args:
        dtype: compute dtype.
        param_dtype: dtype of the parameters in memory, whatever the file's.

    Raises:
        WeightsError: a file is missing, truncated, or has missing, surplus or misshapen keys.
        ConfigError: an architecture that is not of the Stable Diffusion 1.x/2.x families.
    """
    config = load_unet_config(folder)
    tensors, what = _tensors(folder, "unet")
    return load_state_dict(
        lambda: UNet(config, rngs=nnx.Rngs(0), dtype=dtype),
        tensors,
        unet_keys,
        what=what,
        param_dtype=param_dtype,
    )


def load_vae(folder: Path | str, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32) -> VAE:
    """The autoencoder of a diffusers folder; arguments and errors as load_unet's."""
    config = load_vae_config(folder)
    tensors, what = _tensors(folder, "vae")
    return load_state_dict(
        lambda: VAE(config, rngs=nnx.Rngs(0), dtype=dtype),
        {_modern_vae_key(name): _without_pixels(name, array) for name, array in tensors.items()},
        lambda module: pytorch_name,
        what=what,
        param_dtype=param_dtype,
    )


def load_text_encoder(
    folder: Path | str, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> TextEncoder:
    """The text encoder of a diffusers folder; arguments and errors as load_unet's."""
    config = load_text_config(folder)
    tensors, what = _tensors(folder, "text_encoder")
    # transformers 5 writes the keys without the prefix that every folder before it has.
    prefixed = {name if name.startswith("text_model.") else f"text_model.{name}": x for name, x in tensors.items()}
    return load_state_dict(
        lambda: TextEncoder(config, rngs=nnx.Rngs(0), dtype=dtype),
        prefixed,
        lambda module: text_key,
        what=what,
        param_dtype=param_dtype,
        ignore=lambda name: name.endswith("position_ids"),
    )


def load_unet_config(folder: Path | str) -> UNetConfig:
    """The architecture of a folder's U-Net, without its weights; raises as load_unet."""
    return UNetConfig.from_json(*_config(folder, "unet"))


def load_vae_config(folder: Path | str) -> VAEConfig:
    """The architecture of a folder's autoencoder, without its weights; raises as load_vae."""
    return VAEConfig.from_json(*_config(folder, "vae"))


def load_text_config(folder: Path | str) -> TextConfig:
    """The architecture of a folder's text encoder, without its weights; raises as load_text_encoder."""
    return TextConfig.from_json(*_config(folder, "text_encoder"))


def load_scheduler_config(folder: Path | str) -> dict[str, Any]:
    """The fields of ``scheduler/scheduler_config.json``.

    Raises:
        WeightsError: the file is missing or is not JSON.
    """
    return read_json(Path(folder) / "scheduler" / "scheduler_config.json")


def unet_keys(unet: UNet) -> Key:
    """The key function of this U-Net."""
    last = unet.stages[-1]
    assert isinstance(last, ConvOut)
    return unet_key([stage.name for stage in unet.stages], last.layer.name)


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
    """Write components as a diffusers folder; those that are not given are left out of ``model_index.json``.

    Args:
        folder: must not exist; it appears when it is complete.
        tokenizer: a folder of tokenizer files to copy.
        scheduler: fields of scheduler_config.json.
        dtype: of the stored weights.
        metadata: kept in the header of every weights file.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    present: dict[str, Any] = {}
    modules: dict[str, tuple[Any, Key, dict[str, Any]]] = {}
    if unet is not None:
        modules["unet"] = (unet, unet_keys(unet), dataclasses.asdict(unet.config))
    if vae is not None:
        levels = len(vae.config.block_out_channels)
        types = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
        modules["vae"] = (vae, pytorch_name, dataclasses.asdict(vae.config) | types)
    if text_encoder is not None:
        modules["text_encoder"] = (text_encoder, text_key, dataclasses.asdict(text_encoder.config))
    try:
        for name, (module, key, config) in modules.items():
            present[name] = _CLASSES[name]
            if name == "text_encoder":
                config |= dict(model_type="clip_text_model", architectures=["CLIPTextModel"])
            else:
                config |= dict(_class_name=_CLASSES[name][1])
            write_json(partial / name / "config.json", config)
            tensors = state_dict(module, key, dtype)
            write_tensors(
                partial / name / f"{_WEIGHTS[name]}.safetensors", tensors, {"format": "pt"} | dict(metadata or {})
            )
        if tokenizer is not None:
            present["tokenizer"] = _CLASSES["tokenizer"]
            shutil.copytree(tokenizer, partial / "tokenizer")
        if scheduler is not None:
            present["scheduler"] = _CLASSES["scheduler"]
            write_json(
                partial / "scheduler" / "scheduler_config.json", dict(_class_name="DDIMScheduler") | dict(scheduler)
            )
        write_json(partial / "model_index.json", dict(_class_name="StableDiffusionPipeline") | present)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def _config(folder: Path | str, component: str) -> tuple[dict[str, Any], str]:
    index = Path(folder) / "model_index.json"
    if index.is_file():
        pipeline = read_json(index).get("_class_name", "")
        if not _PIPELINE.fullmatch(pipeline):
            raise WeightsError(f"{index}: {pipeline!r} is not of the Stable Diffusion 1.x/2.x families")
    path = Path(folder) / component / "config.json"
    return read_json(path), str(path)


def _tensors(folder: Path | str, component: str) -> tuple[dict[str, np.ndarray], str]:
    path = weights_file(Path(folder), component)
    return read_tensors(path), str(path)


def _modern_vae_key(key: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}" if match else key


def _without_pixels(key: str, array: np.ndarray) -> np.ndarray:
    """Old files store the VAE's attention projections as 1x1 convolutions."""
    return array[:, :, 0, 0] if ".attentions." in key and array.ndim == 4 else array
