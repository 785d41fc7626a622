"""Pictures of the same prompts and seeds by several methods, side by side, with figures where a judge is given."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from afa_jax.evaluation.bootstrap import BootstrapEstimate, Resamples, mean
from afa_jax.report.sheet import labelled_grid

Judge = Callable[[Image.Image, str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Pictures by method, prompt and seed.

    Attributes:
        prompts, seeds: the prompts and seeds of the pictures.
        images: one picture for each prompt and seed, by method.
        scores: the judge's scores ``[prompts, seeds]``, by method; empty without a judge.
        resamples: resamples of the prompts, the same for every method, so that differences are paired.
    """

    prompts: list[str]
    seeds: list[int]
    images: dict[str, list[list[Image.Image]]]
    scores: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    resamples: Resamples

    @property
    def methods(self) -> list[str]:
        """Return the methods' names in the requested order."""
        return [*self.images]

    @property
    def grid(self) -> Image.Image:
        """Return all pictures as one image: a row for each prompt and seed, a column for each method."""
        rows = [
            [np.asarray(made[i][j]) for made in self.images.values()]
            for i in range(len(self.prompts))
            for j in range(len(self.seeds))
        ]
        labels = [prompt if j == 0 else "" for prompt in self.prompts for j in range(len(self.seeds))]
        scale = max(1, 128 // rows[0][0].shape[0])
        return labelled_grid(rows, labels, self.methods, scale=scale)

    def show(self) -> None:
        """Open the grid in a window, as PIL does."""
        self.grid.show()

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Return each method's mean score ``value`` and its 95 % interval over prompts, ``low`` to ``high``."""
        return {name: self._mean(name).to_json() for name in self.scores}

    def difference(self, one: str, other: str) -> dict[str, Any]:
        """Return the mean paired difference of two methods' scores, with its 95 % interval over prompts."""
        return self._mean(one).minus(self._mean(other)).to_json()

    def _mean(self, method: str) -> BootstrapEstimate:
        return mean(self.scores[method], self.resamples)

    def _repr_png_(self) -> bytes:
        """Show the grid in a notebook."""
        data = io.BytesIO()
        self.grid.save(data, format="PNG")
        return data.getvalue()


def judged(
    images: Mapping[str, Sequence[Sequence[Image.Image]]], prompts: Sequence[str], judge: Judge
) -> dict[str, np.ndarray]:
    """Return a judge's scores of pictures, by method ``[prompts, seeds]``."""
    return {
        name: np.asarray(
            [[float(judge(image, prompt)) for image in row] for row, prompt in zip(made, prompts, strict=True)]
        )
        for name, made in images.items()
    }
