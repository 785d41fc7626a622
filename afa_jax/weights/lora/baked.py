"""A checkpoint with LoRAs baked into its weights, one tensor at a time, when it is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from afa_jax.models.configs import UNetConfig
from afa_jax.weights.checkpoint import Checkpoint, DerivedCheckpoint
from afa_jax.weights.lora.files import Change, Lora, read_lora
from afa_jax.weights.lora.names import COMPONENTS, Place, find_places
from afa_jax.weights.tensors import Tensor, Tensors, WeightsError, check_finite, listed, result_dtype

METADATA = "afa_jax.loras"  # the metadata's field of the baked LoRAs, a JSON list
_WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # the width of the text states that a family's U-Net takes
_FAMILIES = {
    "SDXL": r"^lora_te2_|^text_encoder_2\.|add_embedding|label_emb",
    "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "SD3": r"joint_blocks",
    "a diffusion transformer (SD3, Flux, ...)": r"^lora_transformer_|^transformer\.",
}


@dataclasses.dataclass(frozen=True)
class _Applied:
    """A LoRA at a weight, with the weights of a checkpoint that it changes."""

    lora: Lora
    weight: float
    changes: Mapping[Place, tuple[str, Change]]  # the module's name in the LoRA, and its change


@dataclasses.dataclass(frozen=True)
class _Baked(DerivedCheckpoint):
    applied: tuple[_Applied, ...]

    @property
    def metadata(self) -> Mapping[str, str]:
        before = self.base.metadata
        try:
            baked = json.loads(before.get(METADATA, "[]"))
        except (ValueError, RecursionError):
            baked = None
        baked = baked if isinstance(baked, list) else []  # someone else's words
        baked += [dict(name=a.lora.name, sha256=a.lora.sha256, weight=a.weight) for a in self.applied]
        return {**before, METADATA: json.dumps(baked)}

    def tensors(self, component: str) -> Tensors:
        return {key: self._baked((component, key), tensor) for key, tensor in self.base.tensors(component).items()}

    def sha256(self, component: str) -> str:
        own = self.base.sha256(component)
        touching = [a for a in self.applied if any(place[0] == component for place in a.changes)]
        if not touching:
            return own
        recipe = [own, *(f"{a.lora.sha256} {a.weight!r}" for a in touching)]
        return hashlib.sha256("\n".join(recipe).encode()).hexdigest()

    def _baked(self, place: Place, tensor: Tensor) -> Tensor:
        changes = [applied for applied in self.applied if place in applied.changes]
        if not changes:
            return tensor
        what, key, dtype = self.base.what(place[0]), place[1], result_dtype([tensor.dtype])

        def read() -> np.ndarray:
            array = tensor.read()
            check_finite(array, key, what)
            with np.errstate(over="ignore", invalid="ignore"):
                total = array.astype(np.float32)
                for applied in changes:
                    total += _difference(applied, place, tensor.shape)
                result = total.astype(dtype)
            if not np.isfinite(result).all():
                names = ", ".join(f"{applied.lora.path} at {applied.weight}" for applied in changes)
                raise WeightsError(f"{what}: {key} is too large for {dtype} with {names}; take smaller weights")
            return result

        return Tensor(tensor.shape, dtype, read)


def with_loras(checkpoint: Checkpoint, loras: Sequence[tuple[Path | str, float | int]]) -> Checkpoint:
    """Bake LoRAs into a checkpoint: each weight W becomes W + sum of weight * alpha / rank * up @ down.

    The sum is taken in float32 when a tensor is read. It is rounded to the dtype in which the tensor is stored, or to
    float16 if that has 8 bits; to keep more digits, make the checkpoint float32 first (``rounded``). Tensors that no
    LoRA changes are the checkpoint's own. A component's sha256 is made of the checkpoint's and of hash and weight of
    the LoRAs that change it, in their order, which decides the last bits; without such LoRAs it is the checkpoint's
    own. LoRAs of weight 0 are checked and then left out; without others the result is the checkpoint itself. The
    metadata lists what is baked in under ``afa_jax.loras``.

    Args:
        loras: files, or folders that ``read_lora`` takes, each with its weight; any finite number, 1 as trained.

    Raises:
        WeightsError: as read_lora; modules that this model does not have, or of another shape; a weight that is not
            finite. And when a tensor is read: a matrix that is not finite, a result too large for its dtype.
    """
    weights = {name: checkpoint.tensors(name) for name in COMPONENTS if name in checkpoint.components}
    unet = UNetConfig.from_json(checkpoint.config("unet"), checkpoint.what("unet", True)) if "unet" in weights else None
    places = find_places(weights, unet)
    applied = []
    for path, weight in loras:
        if not math.isfinite(weight):
            raise WeightsError(f"{path}: the LoRA's weight is {weight}; give a finite number")
        lora = read_lora(path)
        changes = _placed(lora, places, weights)
        if weight:
            applied.append(_Applied(lora, float(weight), changes))
    return _Baked(checkpoint, tuple(applied)) if applied else checkpoint


def _difference(applied: _Applied, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """Return the difference that a LoRA adds to a weight, float32."""
    module, change = applied.changes[place]
    factors = {}
    for name, factor in change.factors.items():
        array = factor.read()
        check_finite(array, f"{name} of {module}", str(applied.lora.path))
        factors[name] = array.astype(np.float32)
    up, down = factors["up"].reshape(shape[0], -1), factors["down"].reshape(len(factors["down"]), -1)
    if "mid" in factors:
        product = np.einsum("op,pqhw,qi->oihw", up, factors["mid"], down, optimize=True)
    else:
        product = (up @ down).reshape(shape)
    return np.float32(applied.weight * change.scale) * product


def _placed(lora: Lora, places: Mapping[str, Place], weights: Mapping[str, Tensors]) -> dict[Place, tuple[str, Change]]:
    """Return the LoRA's changes by the weights they are for."""
    names = {module: module.replace(".processor.", ".") for module in lora.changes}
    if unmatched := sorted(module for module, name in names.items() if name not in places):
        lacking = [f"no {component}" for component in COMPONENTS if component not in weights]
        model = f"the model ({', '.join(lacking)} in it)" if lacking else "the model"
        other = _made_for(lora, weights)
        raise WeightsError(f"{lora.path}: {listed('unmatched', unmatched)}, which {model} does not have{other}")
    count = Counter(places[name] for name in names.values())
    if twice := sorted(module for module, name in names.items() if count[places[name]] > 1):
        raise WeightsError(f"{lora.path}: {listed('names for the same weights', twice)}; it must name each once")
    misshapen = []
    for module, change in lora.changes.items():
        component, key = places[names[module]]
        if not _fits(change, weights[component][key].shape):
            factors = ", ".join(f"{name} {factor.shape}" for name, factor in change.factors.items())
            misshapen.append(f"{module}: {factors} on {weights[component][key].shape}")
    if misshapen:
        raise WeightsError(f"{lora.path}: {listed('misshapen', misshapen, 3)}{_made_for(lora, weights)}")
    return {places[name]: (module, lora.changes[module]) for module, name in names.items()}


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    """Return whether the factors' product has a weight's shape; a 1x1 convolution counts as a linear layer."""

    def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if shape[2:] == (1, 1) else shape

    up, down = plain(change.up.shape), plain(change.down.shape)
    if change.mid is None:
        return up == (shape[0], down[0]) and down[1:] == plain(shape)[1:]
    mid = change.mid.shape
    return (
        len(shape) == len(mid) == 4 and up == (shape[0], mid[0]) and down == (mid[1], shape[1]) and mid[2:] == shape[2:]
    )


def _made_for(lora: Lora, weights: Mapping[str, Tensors]) -> str:
    """Return ``; it was made for ...`` if names or the width of its text states show another family; else ""."""
    for family, pattern in _FAMILIES.items():
        if any(re.search(pattern, module) for module in lora.changes):
            return f"; it was made for {family}"
    theirs = _text_width((module, change.down.shape) for module, change in lora.changes.items())
    own = _text_width(
        (key.removesuffix(".weight"), tensor.shape) for tensors in weights.values() for key, tensor in tensors.items()
    )
    if theirs is None or own is None or theirs == own:
        return ""
    family = _WIDTHS.get(theirs, "another model")
    return f"; it was made for {family}: its text states are {theirs} wide, this model's {own}"


def _text_width(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int | None:
    """Return the width of the text states, from the names and shapes of weights that take them; None if none does."""
    pattern = re.compile(r"attn2[._].*to_[kv]|.*self_attn[._](q_proj|to_q)")
    return max(
        (shape[1] for name, shape in shapes if pattern.fullmatch(name, max(name.find("attn2"), 0))), default=None
    )
