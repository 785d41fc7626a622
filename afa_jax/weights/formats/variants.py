"""The choice of a component's weight files by their names alone, in a folder or in a repository's listing.

diffusers and transformers put a variant's name (``fp16``, ``bf16``, ``non_ema``, ...) into the names of files::

    diffusion_pytorch_model.safetensors           diffusion_pytorch_model.fp16.safetensors
    ...safetensors.index.json                     ...safetensors.index.fp16.json, once ...safetensors.fp16.index.json
    ...-00001-of-00003.safetensors                ....fp16-00001-of-00003.safetensors, once ...-00001-of-00003.fp16...

The second line is the index of a model in several files (shards), such as those of the third.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from afa_jax.weights.checkpoint import NETWORKS
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.tensors import WeightsError

PYTORCH = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FLAX = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model", "text_encoder": "flax_model"}
_SHARD = r"-\d{5}-of-\d{5}"


def weights_name(names: Collection[str], component: str, variant: str | None = None, what: str = "") -> str:
    """Return the file of a component's weights, or the index of its shards.

    Safetensors come before Flax's msgpack. Without a ``variant``, the file without one is chosen, or else the only
    variant. With a ``variant``, that file is chosen. A component that lacks it gives its plain file if another
    component has the variant; so diffusers reads a repository with, say, a ``non_ema`` U-Net.

    Args:
        names: the names of all files, such as ``unet/config.json``.
        what: the folder or repository, for messages.

    Returns:
        One of ``names``; a pickle (which nothing opens) or a name that is not there if nothing can be read.

    Raises:
        WeightsError: no such variant, or several and none was asked for; lists those there are.
    """
    stored, flax = variants(names, component), f"{component}/{FLAX[component]}.msgpack"
    listing = ", ".join(name or "one without a variant" for name in sorted(stored)) or flax
    if variant in stored:
        return stored[variant]
    if variant is not None and (stored or flax in names):
        if "" in stored and any(variant in variants(names, other) for other in NETWORKS):
            return stored[""]
        raise WeightsError(f"{what}/{component}: no variant {variant!r}; there is {listing}")
    if "" in stored or len(stored) == 1:
        return stored.get("") or next(iter(stored.values()))
    if stored:
        raise WeightsError(f"{what}/{component}: several variants ({listing}); choose one with variant")
    if variant is None and flax in names:
        return flax
    pickles = sorted(name for name in names if name.startswith(f"{component}/") and name.endswith(PICKLES))
    return pickles[0] if pickles else f"{component}/{PYTORCH[component]}.safetensors"


def variants(names: Collection[str], component: str) -> dict[str, str]:
    """Return by variant ("" for none) a component's safetensors file, or the index of its shards if it has no file."""
    stem, name = f"{component}/{re.escape(PYTORCH[component])}", r"(?:\.([^/]+?))?"
    whole = re.compile(rf"{stem}{name}\.safetensors")
    index = re.compile(rf"{stem}{name}\.safetensors{name}\.index{name}\.json")
    found: dict[str, str] = {}
    for pattern in (whole, index):
        for file in sorted(names):
            match = pattern.fullmatch(file)
            if match and not re.search(_SHARD, file):
                found.setdefault(next(filter(None, match.groups()), ""), file)
    return found


def shard_names(names: Collection[str], index: str) -> list[str]:
    """Return the files that may be shards of the model whose index is called ``index``, in order."""
    component = index.partition("/")[0]
    variant = next(variant for variant, name in variants(names, component).items() if name == index)
    part = rf"(?:\.{re.escape(variant)})" if variant else ""
    stem = f"{component}/{re.escape(PYTORCH[component])}"
    pattern = re.compile(rf"{stem}(?:{part}{_SHARD}|{_SHARD}{part})\.safetensors")
    return sorted(filter(pattern.fullmatch, names))
