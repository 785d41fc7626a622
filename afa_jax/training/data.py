"""The training data of a run: a source without the pairs held out for validation, read directly or from the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.bad_examples import BadExamples
from afa_jax.data.loader import Batch, Loader, loading, make_loader
from afa_jax.data.sources import BadExample, PictureSource, make_source
from afa_jax.data.split import Subset, hold_out
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts, frozen, with_encoders_here
from afa_jax.mesh.parallel import row_share
from afa_jax.mesh.processes import log_once
from afa_jax.training.cache.cache import build_cache, make_cached_loader
from afa_jax.training.validation import Pairs
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The batches of a run, and the frozen networks that a step on them needs.

    Attributes:
        source: the pictures that ``index`` in a batch refers to.
        held_out: the pictures of which validation sees some; None without validation.
        validation: the pictures and captions that validation sees.
        crop: cuts any picture to the training size.
        skip: whether bad examples are left out.
        loader: makes the batches.
        length: the number of examples that training could draw, including bad ones.
        seed: the seed of the order and of all randomness of an example.
        bad: (name, reason) of examples that the cache or validation left out.
        frozen: ``unet``, and unless batches are cached ``text_encoder`` and ``vae``.
        no_caption: the empty caption in the batch's form.
    """

    source: PictureSource
    held_out: PictureSource | None
    validation: tuple[np.ndarray, list[str]] | None
    crop: Crop
    skip: bool
    loader: Loader
    length: int
    seed: int
    bad: list[tuple[str, str]]
    frozen: dict[str, Any]
    no_caption: jax.Array

    @property
    def identity(self) -> dict[str, Any]:
        """Return the facts that fix which example a position in the run gets; checkpoints keep them."""
        return dict(
            source=self.source.fingerprint,
            held_out=None if self.held_out is None else self.held_out.fingerprint,
            examples=self.loader.length,
            batch=self.loader.batch,
            seed=self.seed,
        )

    def batches(self, first: int, bad: BadExamples) -> Iterator[Batch]:
        """Yield batches from step ``first`` on; count the examples left out, and report them after the first epoch."""
        bad.add(self.bad)
        for step, batch in enumerate(self.loader.iterate(first), first):
            if summary := bad.take(step, batch):
                log_once(summary)
            yield batch

    def names(self, batch: Batch) -> list[str]:
        """Return the source's names of a batch's examples."""
        return [self.source.name(int(index)) for index in batch["index"]]

    def validation_pairs(self, experts: Experts, batch: int) -> Pairs:
        """Encode the validation pairs, ``batch`` at a time, with encoders on one device (``with_encoders_here``)."""
        assert self.validation is not None, "a run without validation"
        return Pairs.encode(experts, *self.validation, batch)


def read_held_out(
    held_out: PictureSource, crop: Crop, tokenizer: Tokenizer, count: int, skip: bool
) -> tuple[tuple[np.ndarray, list[str]], list[tuple[str, str]]]:
    """Return the first ``count`` good pictures and captions, and the bad ones; each random crop is always the same.

    Raises:
        InputError: there is no good example.
        BadExample: an example is bad, and bad ones are not skipped.
    """
    images: list[np.ndarray] = []
    captions: list[str] = []
    bad: list[tuple[str, str]] = []
    for index in range(len(held_out)):
        name = held_out.name(index)
        try:
            example = held_out[index]
            tokenizer([example["caption"]], quiet=True)
        except InputError as error:
            reason = error.reason if isinstance(error, BadExample) else str(error)
            if not skip:
                raise BadExample(name, reason) from error
            bad.append((name, reason))
            continue
        images.append(crop(example["image"], np.random.default_rng((0, index))))
        captions.append(example["caption"])
        if len(images) == count:
            break
    if not images:
        raise InputError(f"validation: none of the {len(held_out)} held-out examples can be read")
    return (np.stack(images), captions), bad


def check_identity(stored: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """Raise InputError if ``what`` was trained on other data, or in another order, than this run."""
    changed = [name for name, value in identity.items() if stored.get(name) != value]
    if changed:
        raise InputError(
            f"{what} was trained on other data ({', '.join(changed)} changed), so a resumed run would not be the same; "
            "restore data, seed, batch and validation as they were, or start again with --overwrite"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The examples that a config trains and validates on; no picture is read yet, and no model is needed.

    Attributes:
        source: all examples, including those that validation sees.
        chosen: the examples to train on.
        held_out: the examples of which validation sees some; None without validation.
        crop: cuts any picture to the training size.
    """

    source: PictureSource
    chosen: PictureSource
    held_out: PictureSource | None
    crop: Crop


def split_data(config: ConfigDict) -> Split:
    """Open the source of ``config.data`` and split it by ``config.validation``.

    Validation takes its pairs from ``validation.data`` if that is a source, else from the training source, which then
    goes without them.

    Raises:
        InputError: as make_source, or there are too few pictures or pairs.
    """
    train, validation = config.train, config.validation
    source, held_out = make_source(config.data), None
    chosen: PictureSource = source
    if validation.every and validation.get("data"):
        own = [name for name in ("size", "flip", "bad", "workers") if name in validation.data]
        if own:
            raise InputError(f"validation.data.{own[0]}: pictures are cut and read as config.data says; leave it out")
        held_out = make_source(validation.data)
        if len(held_out) < validation.pairs:
            raise InputError(f"validation.pairs={validation.pairs}, but validation.data has {len(held_out)} examples")
    elif validation.every:
        chosen, held_out = hold_out(source, validation.pairs, validation.seed)
    if len(chosen) < train.batch:
        raise InputError(f"{len(chosen)} pictures are fewer than a batch of {train.batch}")
    crop = loading(config.data)["crop"] or Crop(source[0]["image"].shape[:2])
    return Split(source=source, chosen=chosen, held_out=held_out, crop=crop)


def make_training_data(config: ConfigDict, split: Split, experts: Experts, *, progress: bool = True) -> TrainingData:
    """Read a config's data, and cache them if it asks for that.

    The cache holds the whole source, so it serves every seed and every choice of validation pairs.

    Raises:
        InputError: as build_cache and Loader, or the networks cannot take the size.
    """
    train, validation, cache = config.train, config.validation, config.cache
    options, crop = loading(config.data), split.crop
    source, chosen, held_out = split.source, split.chosen, split.held_out
    experts.check_size(crop.size)
    index, count = (0, 1) if experts.mesh is None else row_share(experts.mesh)
    if train.batch % count:
        raise InputError(f"train.batch={train.batch} does not divide among {count} processes; choose a multiple")
    shown: tuple[np.ndarray, list[str]] | None = None
    bad: list[tuple[str, str]] = []
    if held_out is not None:  # checked before the cache is made, which takes hours
        skip = options["bad"] == "skip"
        shown, bad = read_held_out(held_out, crop, experts.tokenizer, validation.pairs, skip)
    parts = frozen(experts)
    shared = dict(batch=train.batch, seed=train.seed, process_index=index, process_count=count)
    common: dict[str, Any] = dict(
        held_out=held_out,
        validation=shown,
        crop=crop,
        skip=options["bad"] == "skip",
        length=len(chosen),
        seed=train.seed,
    )
    if not cache.path:
        return TrainingData(
            source=chosen,
            loader=make_loader(chosen, experts.tokenizer, **shared, **options),
            bad=bad,
            frozen=parts,
            no_caption=jnp.asarray(experts.tokenizer([""])[0]),
            **common,
        )
    made = build_cache(
        with_encoders_here(experts, config),
        source,
        crop,
        path=Path(cache.path),
        crops=cache.crops,
        shard=cache.shard,
        batch=cache.batch,
        seed=cache.seed,
        bad=options["bad"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        progress=progress,
    )
    among = chosen.indices if isinstance(chosen, Subset) else None
    return TrainingData(
        source=source,
        loader=make_cached_loader(made, among=among, workers=options["workers"], **shared),
        bad=[*made.bad.values(), *bad],
        frozen=dict(unet=parts["unet"]),
        no_caption=jnp.asarray(made.no_caption),
        **common,
    )
