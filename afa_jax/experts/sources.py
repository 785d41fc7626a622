"""Base model and experts, opened from what a config or the command line names.

An expert is given as ``dict(name="photo", path="models/photo.safetensors")``, the base model as a path or
``dict(path=...)``. A path is a diffusers folder, a single file, or either of them on the Hugging Face hub. Further
fields of both:

    revision         of a hub id: a branch, a tag or a commit
    variant          of a diffusers folder: "fp16", "non_ema", ...
    prediction_type  "epsilon" or "v_prediction", where a single file of SD2.x does not say
    ema              True takes the averaged weights that a single file carries beside the others

of an expert also ``loras=[(path, weight), ...]``, baked into its weights, and ``dtype``, to which its weights are
rounded after that; of the base model also ``tokenizer``, a folder or hub id for a base that has none, as single files.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.names import DTYPES, PREDICTIONS
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint, rounded
from afa_jax.weights.formats.hub import fetch_lora, fetch_model
from afa_jax.weights.lora.baked import with_loras
from afa_jax.weights.merging.combine import compose
from afa_jax.weights.opened import open_checkpoint

T = TypeVar("T", bound="Source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The place of a model and how to read it; the fields are explained at the top of this file."""

    path: str
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    ema: bool = False

    def open(self, components: Sequence[str], *, weights: bool = True) -> Checkpoint:
        """Open the model; if it is on the hub, first download these components.

        Args:
            weights: if False, only the files that describe a model on the hub are downloaded.

        Raises:
            InputError: the model does not exist or cannot be read.
        """
        path = fetch_model(self.path, components, revision=self.revision, variant=self.variant, weights=weights)
        return open_checkpoint(path, variant=self.variant, prediction_type=self.prediction_type, ema=self.ema)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSource(Source):
    """An expert as a config names it."""

    name: str
    loras: tuple[tuple[str, float], ...] = ()
    dtype: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSource(Source):
    """The base model as a config names it."""

    tokenizer: str | None = None

    def open(self, components: Sequence[str], *, weights: bool = True) -> Checkpoint:
        """Open the base model as Source.open does, with the tokenizer of ``tokenizer`` if that is given."""
        checkpoint = super().open(components, weights=weights)
        if self.tokenizer is None:
            return checkpoint
        folder = fetch_model(self.tokenizer, ("tokenizer",))
        within = folder / "tokenizer"
        return compose(checkpoint, tokenizer=MemoryCheckpoint({}, tokenizer=within if within.is_dir() else folder))


def bake(checkpoint: Checkpoint, loras: Sequence[tuple[str, float]], dtype: str | None = None) -> Checkpoint:
    """Return a checkpoint with LoRAs (local or on the hub) merged in, then converted to ``dtype``; rounded once.

    Raises:
        InputError: as fetch_lora, with_loras and rounded.
    """
    if loras:
        # Without ``dtype`` each tensor is rounded to its stored dtype after the LoRAs; with it, only to ``dtype``.
        exact = checkpoint if dtype is None else rounded(checkpoint, "float32")
        checkpoint = with_loras(exact, [(fetch_lora(path), weight) for path, weight in loras])
    return checkpoint if dtype is None else rounded(checkpoint, dtype)


def parse_expert(entry: Any) -> ExpertSource:
    """Parse an expert's entry of a config.

    Raises:
        InputError: a field is missing, unknown or of another type.
    """
    if not isinstance(entry, Mapping | ConfigDict):
        raise InputError(f"an expert is {entry!r}; write dict(name=..., path=...)")
    values = dict(entry)
    what = f"expert {values['name']!r}" if "name" in values else "an expert"
    if "loras" in values:
        try:
            values["loras"] = tuple((str(path), float(weight)) for path, weight in values["loras"])
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{what}: loras={values['loras']!r}; write a list of (path, weight)") from None
    return _build(ExpertSource, values, what)


def parse_base(entry: Any) -> BaseSource:
    """Parse the base model of a config: a path, or a mapping with ``path``; raise as parse_expert."""
    if not isinstance(entry, str | Mapping | ConfigDict):
        raise InputError(f"base is {entry!r}; write a path, or dict(path=...)")
    return _build(BaseSource, dict(path=entry) if isinstance(entry, str) else dict(entry), "base")


def find_checkpoints(
    base: Any, experts: Iterable[Mapping[str, Any]], *, weights: bool = True
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Return the checkpoint of a config's ``base``, and those of its ``experts`` by name, in order.

    An expert without a text encoder, such as a bare U-Net, takes the base model's, with a warning.

    Args:
        weights: if False, no weights are downloaded from the hub, and only the checkpoints' ``config`` may be used.

    Raises:
        InputError: there are no experts, two share a name, or one is missing or cannot be read.
    """
    sources = [parse_expert(entry) for entry in experts]
    if not sources:
        raise InputError("experts is empty; name at least one")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"experts have the same name: {', '.join(names)}")
    shared = ("vae", "tokenizer", "scheduler")
    parsed = parse_base(base)
    opened = parsed.open(shared, weights=weights)
    checkpoints = {}
    for source in sources:
        checkpoint = source.open(("unet", "text_encoder", "scheduler"), weights=weights)
        if "unet" not in checkpoint.components:
            raise InputError(f"expert {source.name!r}: {checkpoint.path} has no U-Net")
        if "text_encoder" not in checkpoint.components:
            other = parsed.open((*shared, "text_encoder"), weights=weights)
            if "text_encoder" not in other.components:
                raise InputError(f"expert {source.name!r}: neither {checkpoint.path} nor the base has a text encoder")
            warnings.warn(f"expert {source.name!r} has no text encoder; it takes the base model's", stacklevel=2)
            checkpoint = compose(checkpoint, text_encoder=other)
        checkpoints[source.name] = bake(checkpoint, source.loras, source.dtype) if weights else checkpoint
    return opened, checkpoints


def _build(cls: type[T], values: dict[str, Any], what: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise InputError(f"{what}: no such field {', '.join(unknown)}; there are {', '.join(fields)}")
    for name, field in fields.items():
        value = values.get(name)
        if value is None and field.default is dataclasses.MISSING:
            raise InputError(f"{what}: the field {name} is missing")
        expected = bool if name == "ema" else str
        if value is not None and name != "loras" and not isinstance(value, expected):
            raise InputError(f"{what}: {name}={value!r}; expected {expected.__name__}")
    for name, choices in dict(prediction_type=PREDICTIONS, dtype=DTYPES).items():
        if values.get(name) not in (None, *choices):
            raise InputError(f"{what}: {name}={values[name]!r}; choose {', '.join(choices)}")
    return cls(**{name: value for name, value in values.items() if value is not None})
