"""Messages for a path that holds no model: what is there instead, and which path to give."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path
from urllib.parse import unquote

from afa_jax.errors import some
from afa_jax.weights.formats.foreign_files import LORA_ADVICE, PICKLES, pickle_advice

_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>.+)")
_COMPONENTS = ("unet", "vae", "text_encoder")
_PARTS = (*_COMPONENTS, "scheduler", "tokenizer")
_ADVICE = {  # by a file that only such a folder has
    "adapter_model.safetensors": f"is a LoRA; {LORA_ADVICE}",
    "pytorch_lora_weights.safetensors": f"is a LoRA; {LORA_ADVICE}",
    "ensemble.json": "is a trained run; give it as --workdir",
    "learned_embeds.safetensors": "is a textual inversion, for which an ensemble has no place; leave it out",
}
_URL = re.compile(
    r"https?://[^/]+/(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?:tree|blob|resolve)/(?P<revision>[^/?]+)/?(?P<file>[^?]*))?(?:\?.*)?"
)
_MANY = 10_000  # the most entries that are inspected


def is_model(folder: Path) -> bool:
    """Return whether a folder looks like one of a model: a diffusers folder, or one of a network alone."""
    names = ("model_index.json", "config.json", *(f"{name}/config.json" for name in _COMPONENTS))
    return any((folder / name).is_file() for name in names)


def explain(folder: Path) -> str:
    """Describe a folder without any component of a model, and the path to give instead."""
    try:
        entries = sorted(folder.iterdir())[:_MANY]
    except OSError as error:
        return f"cannot be read ({error.strerror}); give a folder that can"
    hidden = not folder.is_absolute() and len(folder.parts) == 2
    hides = "; it stands before the hub's repository of that name" if hidden else ""
    if not entries:
        return f"is empty; give a diffusers folder, a .safetensors file or a hub id{hides}"
    if folder.name in _PARTS and is_model(folder.parent):
        return f"is the {folder.name} of {folder.parent}; give that folder"
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.is_dir():
        cache = _CACHE.fullmatch(snapshots.parent.name)
        hub = f", or the hub id {cache['owner']}/{cache['name']}" if cache else ""
        found = sorted(path for path in snapshots.iterdir() if path.is_dir())
        if found:
            return f"is a folder of the hub's cache; give the snapshot in it, {found[-1]}{hub}"
        return f"is a folder of the hub's cache without a snapshot; download the model again{hub}"
    if kinds := [what for name, what in _ADVICE.items() if (folder / name).is_file()]:
        return kinds[0]
    if models := [entry for entry in entries if entry.is_dir() and is_model(entry)]:
        return f"holds models in its subfolders ({some(entry.name for entry in models)}); give one of them"
    if singles := [entry for entry in entries if entry.suffix.lower() in (".safetensors", ".sft")]:
        return f"is a folder of single files ({some(entry.name for entry in singles)}); give one of them"
    if pickles := [entry for entry in entries if entry.suffix.lower() in PICKLES]:
        return f"holds pickled weights ({some(entry.name for entry in pickles)}). {pickle_advice(pickles[0])}"
    return (
        f"is no diffusers folder, it has no unet/config.json or the like but {some(entry.name for entry in entries)}; "
        f"give a diffusers folder, a .safetensors file or a hub id{hides}"
    )


_EMOJI = "models/emoji"


def meant(path: str) -> str:
    """Return a guess at the meaning of a path that does not exist, to follow "no such file or folder"; may be ""."""
    if url := _URL.fullmatch(path):
        file, revision = (f"/{url['file']}" if url["file"] else ""), (f"@{url['revision']}" if url["revision"] else "")
        return f" (of a hub's address write {unquote(url['repo'] + file + revision)}; of another, download the file)"
    if path.startswith(f"{_EMOJI}/") and not os.path.exists(_EMOJI):
        return " (the emoji models come with the repository and not with the package: run this in a checkout of it)"
    plain = path.strip().strip("'\"\u201c\u201d")
    plain = unquote(re.sub("^file:(//(localhost)?)?(?=/)", "", plain)) if plain.startswith("file:") else plain
    plain = os.path.expanduser(plain)
    ways = (plain, plain.replace("\\", "/"), f"{plain}.safetensors", plain.rpartition(":")[0])
    if "\0" in path or not plain:
        return ""
    if found := next((way for way in ways if way and way != path and os.path.exists(way)), None):
        return f"; write {found}"
    folder, name = os.path.split(plain)
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in itertools.islice(entries, _MANY)]
    except OSError:
        return ""
    close = difflib.get_close_matches(name[:200], names, n=1, cutoff=0.8)
    return f"; there is {os.path.join(folder, close[0])}" if close else ""
