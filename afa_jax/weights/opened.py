"""Checkpoints opened, whatever their container, and compared to their architecture, all without JAX."""

from __future__ import annotations

from pathlib import Path

from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint, network_config
from afa_jax.weights.expected import check_tensors, expected_shapes, unet_stages
from afa_jax.weights.formats.folders import FolderCheckpoint
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.formats.single_file import SingleFileCheckpoint
from afa_jax.weights.formats.wrong_places import explain
from afa_jax.weights.tensors import WeightsError

Source = Checkpoint | Path | str


def open_checkpoint(
    source: Source, *, variant: str | None = None, prediction_type: str | None = None, ema: bool = False
) -> Checkpoint:
    """The checkpoint at a local path, whatever its container; one that is open as it is.

    Args:
        variant: of a folder's weights, such as ``fp16``.
        prediction_type: of a single file that does not say it, ``epsilon`` or ``v_prediction``.
        ema: take the moving average of the U-Net that a single file carries.

    Raises:
        WeightsError: there is nothing there, or nothing that can be read.
    """
    if not isinstance(source, Path | str):
        return source
    path = Path(source)
    if path.is_dir():
        if prediction_type is not None or ema:
            raise WeightsError(
                f"{path}: prediction_type and ema are for single files; a folder's configs say what it is"
            )
        checkpoint = FolderCheckpoint(path, variant)
        if not checkpoint.components:
            raise WeightsError(f"{path} {explain(path)}")
        return checkpoint
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.suffix.lower() not in (".safetensors", *PICKLES):  # which are refused with what to do
        raise WeightsError(f"{path}: not a .safetensors file or a diffusers folder; convert it to one of these")
    if variant is not None:
        raise WeightsError(f"{path}: variant={variant!r} is for folders; name the file itself")
    return SingleFileCheckpoint(path, prediction_type, ema)


def unet_config(checkpoint: Source) -> UNetConfig:
    """The architecture of a checkpoint's U-Net; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return UNetConfig.from_json(checkpoint.config("unet"), checkpoint.what("unet", config=True))


def vae_config(checkpoint: Source) -> VAEConfig:
    """The architecture of a checkpoint's autoencoder; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return VAEConfig.from_json(checkpoint.config("vae"), checkpoint.what("vae", config=True))


def text_config(checkpoint: Source) -> TextConfig:
    """The architecture of a checkpoint's text encoder; raises as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return TextConfig.from_json(checkpoint.config("text_encoder"), checkpoint.what("text_encoder", config=True))


def check_networks(checkpoint: Source) -> None:
    """Compare every network's tensors to its architecture, as loading would, without reading a tensor.

    Raises:
        WeightsError, ConfigError: as load_unet.
    """
    checkpoint = open_checkpoint(checkpoint)
    for component in checkpoint.components:
        if component in NETWORKS:
            check_network(checkpoint, component)


def check_network(checkpoint: Source, component: str) -> None:
    """Compare one network's tensors to its architecture; raises as check_networks."""
    checkpoint = open_checkpoint(checkpoint)
    tensors = checkpoint.tensors(component)  # first: what is wrong with a file goes before its architecture
    check_tensors(expected_shapes(network_config(checkpoint, component)), tensors, what=checkpoint.what(component))


def unet_blocks(checkpoint: Source) -> dict[str, str]:
    """By the key of each tensor of a U-Net the name of its stage, or ``time_embedding``; in the stages' order."""
    return unet_stages(unet_config(checkpoint))
