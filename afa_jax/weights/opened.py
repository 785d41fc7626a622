"""Checkpoints of any container, opened and checked against their architecture without JAX."""

from __future__ import annotations

from pathlib import Path

from afa_jax.diffusion.schedule import NoiseSchedule
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
    """Open the checkpoint at a local path, a folder or a file; return one that is already open unchanged.

    Args:
        variant: the variant of a folder's weights, such as ``fp16``.
        prediction_type: ``epsilon`` or ``v_prediction``, for a single file that does not give it.
        ema: take the moving average of the U-Net that a single file carries.

    Raises:
        WeightsError: the path does not exist, or cannot be read as a checkpoint.
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
    if path.suffix.lower() not in (".safetensors", *PICKLES):  # pickles are refused later, with advice
        raise WeightsError(f"{path}: not a .safetensors file or a diffusers folder; convert it to one of these")
    if variant is not None:
        raise WeightsError(f"{path}: variant={variant!r} is for folders; name the file itself")
    return SingleFileCheckpoint(path, prediction_type, ema)


def unet_config(checkpoint: Source) -> UNetConfig:
    """Return the architecture of a checkpoint's U-Net; raise as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return UNetConfig.from_json(checkpoint.config("unet"), checkpoint.what("unet", config=True))


def vae_config(checkpoint: Source) -> VAEConfig:
    """Return the architecture of a checkpoint's autoencoder; raise as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return VAEConfig.from_json(checkpoint.config("vae"), checkpoint.what("vae", config=True))


def text_config(checkpoint: Source) -> TextConfig:
    """Return the architecture of a checkpoint's text encoder; raise as load_unet."""
    checkpoint = open_checkpoint(checkpoint)
    return TextConfig.from_json(checkpoint.config("text_encoder"), checkpoint.what("text_encoder", config=True))


def noise_schedule(checkpoint: Source) -> NoiseSchedule:
    """Load the noise schedule of a checkpoint.

    Raises:
        WeightsError: the checkpoint has none, or one that is no JSON.
        ScheduleError: the schedule is one that this project cannot follow.
    """
    checkpoint = open_checkpoint(checkpoint)
    return NoiseSchedule.from_json(checkpoint.config("scheduler"), checkpoint.what("scheduler", config=True))


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
    """Compare one network's tensors to its architecture; raise as check_networks."""
    checkpoint = open_checkpoint(checkpoint)
    tensors = checkpoint.tensors(component)  # first, as a damaged file is reported before a wrong architecture
    check_tensors(expected_shapes(network_config(checkpoint, component)), tensors, what=checkpoint.what(component))


def unet_blocks(checkpoint: Source) -> dict[str, str]:
    """Return each U-Net tensor's stage, or ``time_embedding``, by its key; in the stages' order."""
    return unet_stages(unet_config(checkpoint))
