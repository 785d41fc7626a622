"""What a folder is that holds no model where one was asked for, and which path to give instead."""

from __future__ import annotations

import re
from pathlib import Path

from afa_jax.errors import some
from afa_jax.weights.foreign_files import PICKLES, pickle_advice

_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>.+)")
_COMPONENTS = ("unet", "vae", "text_encoder")
_MANY = 10_000  # entries that are looked at


def is_model(folder: Path) -> bool:
    """Return whether a folder looks like one of a model: a diffusers folder, or one of a network alone."""
    names = ("model_index.json", "config.json", *(f"{name}/config.json" for name in _COMPONENTS))
    return any((folder / name).is_file() for name in names)


def explain(folder: Path) -> str:
    """Say what a folder without any component of a model holds, and what to give."""
    try:
        entries = sorted(folder.iterdir())[:_MANY]
    except OSError as error:
        return f"cannot be read ({error.strerror}); give a folder that can"
    if not entries:
        return "is empty; give a diffusers folder, a .safetensors file or a hub id"
    if folder.name in _COMPONENTS and is_model(folder.parent):
        return f"is the {folder.name} of {folder.parent}; give that folder"
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.is_dir():
        cache = _CACHE.fullmatch(snapshots.parent.name)
        hub = f", or the hub id {cache['owner']}/{cache['name']}" if cache else ""
        found = sorted(path for path in snapshots.iterdir() if path.is_dir())
        if found:
            return f"is a folder of the hub's cache; give the snapshot in it, {found[-1]}{hub}"
        return f"is a folder of the hub's cache without a snapshot; download the model again{hub}"
    if models := [entry for entry in entries if entry.is_dir() and is_model(entry)]:
        return f"holds models in its subfolders ({some(entry.name for entry in models)}); give one of them"
    if singles := [entry for entry in entries if entry.suffix.lower() in (".safetensors", ".sft")]:
        return f"is a folder of single files ({some(entry.name for entry in singles)}); give one of them"
    if pickles := [entry for entry in entries if entry.suffix.lower() in PICKLES]:
        return f"holds pickled weights ({some(entry.name for entry in pickles)}). {pickle_advice(pickles[0])}"
    return (
        f"is no diffusers folder, it has no unet/config.json or the like but {some(entry.name for entry in entries)}; "
        "give a diffusers folder, a .safetensors file or a hub id"
    )
