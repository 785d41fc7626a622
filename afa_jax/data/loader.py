"""Batches by step through grain: a pure function of (config, step), so that a resumed run reads on where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.emoji.scenes import SceneSource
from afa_jax.data.folder import CaptionedFolder
from afa_jax.data.text import Tokenizer
from afa_jax.errors import InputError

Batch = dict[str, np.ndarray]
"""``image`` uint8 ``[b, rows, columns, 3]`` and ``ids`` int32 ``[b, tokens]``."""


def make_source(config: ConfigDict) -> Any:
    """The random-access source that ``config.kind`` names: "emoji" scenes or a "folder" of captioned pictures.

    The other fields are the source's arguments.

    Raises:
        InputError: an unknown kind, or an argument the source refuses.
    """
    arguments = {name: value for name, value in config.items() if name != "kind"}
    try:
        if config.kind == "emoji":
            return SceneSource(**arguments)
        if config.kind == "folder":
            return CaptionedFolder(**arguments)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"data: {error}") from error
    raise InputError(f"data.kind={config.kind!r}: choose emoji or folder")


def make_batches(source: Any, tokenizer: Tokenizer, *, batch: int, seed: int) -> Callable[[int], Batch]:
    """``step -> batch``: shuffled anew in each epoch from the seed, endless.

    Raises:
        InputError: fewer examples than a batch holds.
    """
    if len(source) < batch:
        raise InputError(f"{len(source)} pictures are fewer than a batch of {batch}")
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    dataset = examples.batch(batch, batch_fn=lambda rows: _collate(rows, tokenizer))
    return lambda step: dataset[step]


def _collate(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
    return dict(image=np.stack([row["image"] for row in rows]), ids=tokenizer([row["caption"] for row in rows]))
