"""Writing of checkpoints: the output path, the recipe, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import afa_jax
from afa_jax.exporting.outputs import check_model
from afa_jax.files import check_file
from afa_jax.logs import LOGGER
from afa_jax.records import public_path, recorded
from afa_jax.report.checkpoints import log_components
from afa_jax.weights.checkpoint import NETWORKS, Checkpoint
from afa_jax.weights.description import component, container, file_sha256
from afa_jax.weights.formats.folders import check_target, write_folder
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.opened import open_checkpoint

RECIPE = "afa_jax.recipe"  # the metadata's key of the recipe, JSON


def identity(name: str, checkpoint: Checkpoint, components: Sequence[str] = NETWORKS) -> dict[str, Any]:
    """Describe an input in a recipe: its name without the folder, the networks' sha256 and, for a file, the file's."""
    networks = {part: checkpoint.sha256(part) for part in components if part in checkpoint.components}
    public = Path(name).name if Path(name).exists() else public_path(name)
    own: dict[str, Any] = dict(name=public, networks=networks)
    if checkpoint.path.is_file():
        own["sha256"] = file_sha256(checkpoint.path)
    return own


def is_single(out: Path) -> bool:
    """Return whether an output's name asks for a single file."""
    return out.suffix.lower() == ".safetensors"


def check_out(out: Path, overwrite: bool | None) -> None:
    """Raise InputError for an output that exists, or whose name belongs to another kind of file."""
    check_model(out, overwrite)
    if is_single(out):
        check_file(out, overwrite)
    else:
        check_target(out, overwrite)


def write(out: Path, checkpoint: Checkpoint, recipe: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a checkpoint with its recipe, and log what was written."""
    whole = dict(version=afa_jax.__version__, **recipe)
    if RECIPE in checkpoint.metadata:
        whole["before"] = parsed(checkpoint.metadata[RECIPE])
    metadata = {RECIPE: json.dumps(recorded(whole, "the recipe"))}
    if is_single(out):
        write_single_file(out, checkpoint, metadata=metadata, overwrite=overwrite)
    else:
        write_folder(out, checkpoint, metadata=metadata, overwrite=overwrite)
    written = open_checkpoint(out)
    LOGGER.info(f"wrote {out}, a {container(written)}" + (f", sha256 {file_sha256(out)}" if is_single(out) else ""))
    networks = [part for part in written.components if part in NETWORKS]
    log_components({part: component(written.tensors(part)) | dict(sha256=written.sha256(part)) for part in networks})
    if rest := [part for part in written.components if part not in NETWORKS]:
        LOGGER.info(f"  {', '.join(rest)}")


def parsed(text: str) -> Any:
    """Parse JSON from a file's metadata; return the text itself if it is no JSON or a record cannot keep it."""
    try:
        return recorded(dict(before=json.loads(text)))["before"]
    except (ValueError, RecursionError):
        return text
