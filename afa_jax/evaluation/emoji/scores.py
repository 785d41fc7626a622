"""Scores of emoji pictures: the judge's answer for every place, and the features for the kernel distance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from afa_jax.data.emoji.scenes import PLACE, Prompt
from afa_jax.evaluation.bootstrap import Resamples, kernel
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.evaluation.emoji import features, judge
from afa_jax.evaluation.emoji.judge import Asked, hits, load_judge, real_scenes, shuffled

SIZE = (PLACE, 2 * PLACE)
"""The size (rows, columns) of the pictures that the judge takes."""


def emoji_scores(pictures: np.ndarray, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Score pictures, uint8 ``[k, 32, 64, 3]``: by metric ``[k]``, and the places' ``features`` ``[k, 2, d]``."""
    judgement = load_judge()(pictures)
    seen = hits(judgement, asked)
    scores = {name: np.nanmean(values, 1) for name, values in seen.items() if name != "subject_in_topic"}
    return scores | dict(both=(np.nan_to_num(seen["subject"], nan=1.0) == 1).all(1) * 1.0, features=judgement.features)


def weights() -> str:
    """Return the hash of the judge and of its feature network."""
    return hashlib.sha256(judge.WEIGHTS.read_bytes() + features.WEIGHTS.read_bytes()).hexdigest()


def real_features(items: Sequence[Item], seed: int = 1) -> np.ndarray:
    """Return features ``[prompts, 2, d]`` of one real scene per prompt: several crops would not be independent."""
    return load_judge()(real_scenes(_asked(items), seed=seed)).features


def bounds(
    items: Sequence[Item], reconstruct: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Return the judge's scores of real scenes: of these prompts, through the autoencoder, and of other prompts.

    The first are the best that any method can expect, the second the best with this autoencoder, the third those of
    pictures unrelated to their prompts. The third are no floor for the kernel distance: these pictures are as real, and
    of the same subjects. For a single prompt there are no other prompts and no kernel distance.
    """
    asked = _asked(items)
    real = real_scenes(asked, seed=seed)
    rows = {"real scenes (ceiling)": real, "real scenes through the autoencoder": reconstruct(real)}
    if len(asked) > 1:
        rows["real scenes of other prompts (floor)"] = real_scenes(shuffled(asked, seed), seed=seed)
    compared, none = real_features(items), Resamples(prompts=len(items), count=1)
    result: dict[str, dict[str, float | None]] = {}
    for name, pictures in rows.items():
        scores = emoji_scores(pictures, asked)
        result[name] = {key: float(values.mean()) for key, values in scores.items() if key != "features"}
        result[name]["kid"] = kernel(scores["features"], compared, none).to_json()["value"]
    return result


def _asked(items: Sequence[Item]) -> list[Prompt]:
    return [item.asked for item in items if item.asked is not None]
