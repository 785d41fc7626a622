"""The static snapshot of an ensemble: the experts' weights in each block, and its loss against the ensemble."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from afa_jax.diffusion.guidance import Denoiser
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.afa import routing_of
from afa_jax.models.conditioning import encode_prompts
from afa_jax.training.noise_error import check_predictions, fixed_draws, noised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """A Denoiser's predictions on fixed pairs, timesteps and noises, float32.

    Attributes:
        noise: the true noise, ``[pictures, draws, h, w, c]``.
        predicted: the predicted noise, whatever the prediction type.
        weights: for FusedUNets, each expert's weight by site, averaged over the pixels: ``[pictures, draws, sites,
            n]``.
    """

    noise: np.ndarray
    predicted: np.ndarray
    weights: np.ndarray | None = None

    @property
    def mse(self) -> float:
        """Return the mean squared error of the noise."""
        return float(np.square(self.predicted - self.noise).mean(dtype=np.float64))

    def distance(self, other: Predictions) -> float:
        """Return the mean squared difference to another prediction, relative to the other's power."""
        apart = np.square(self.predicted - other.predicted).mean(dtype=np.float64)
        return float(apart / np.square(other.predicted).mean(dtype=np.float64))


def predictions(
    denoiser: Denoiser, experts: Experts, pixels: np.ndarray, captions: Sequence[str], *, draws: int, batch: int
) -> Predictions:
    """Return a Denoiser's predictions on the timesteps and noises that ``noise_errors`` draws.

    Raises:
        InputError: a prediction is not finite.
    """
    parts: list[tuple[np.ndarray, int, dict[str, np.ndarray]]] = []
    for rows, draw, inputs in fixed_draws(experts, pixels, captions, draws=draws, batch=batch):
        frozen = (experts.vae, experts.text_encoder)
        parts.append((rows, draw, jax.device_get(_predict(denoiser, frozen, inputs, schedule=experts.schedule))))
    whole = {name: np.empty((len(pixels), draws, *array.shape[1:]), np.float32) for name, array in parts[0][2].items()}
    for rows, draw, arrays in parts:
        for name, array in arrays.items():
            whole[name][rows, draw] = array
    check_predictions(whole["predicted"], experts)
    return Predictions(**whole)


@functools.partial(jax.jit, static_argnames="schedule")
def _predict(
    denoiser: Any, frozen: tuple[Any, Any], inputs: tuple[Any, ...], *, schedule: NoiseSchedule
) -> dict[str, Array]:
    vae, text_encoder = frozen
    noise, xt, t, ids = noised(vae, inputs, schedule)
    states = encode_prompts(text_encoder, ids)
    if not hasattr(denoiser, "with_maps"):
        return dict(noise=noise, predicted=schedule.noise(xt, denoiser(xt, t, states), t))
    prediction, maps = denoiser.with_maps(xt, t, states)
    return dict(noise=noise, predicted=schedule.noise(xt, prediction, t), weights=routing_of(maps)["weights"])


def block_weights(sites: Mapping[str, np.ndarray], stages: Sequence[str]) -> dict[str, list[float]]:
    """Return each expert's weight in every parameter block of the snapshot; a block's weights sum to 1.

    A stage takes the mean weights of its own site; without one, those of the nearest site, of two the later. The time
    embedding and the text encoder, which belong to no site, take the mean over the sites.

    Args:
        sites: the mean weights ``[n]`` of each site, by the name of its stage.
        stages: names of all stages, in order.
    """
    at = {stages.index(name): weights for name, weights in sites.items()}
    mean = np.mean(list(at.values()), axis=0)
    blocks = {name: at[min(at, key=lambda site: (abs(site - i), -site))] for i, name in enumerate(stages)}
    blocks |= dict(time_embedding=mean, text_encoder=mean)
    whole = {name: np.asarray(weights, np.float64) for name, weights in blocks.items()}
    return {name: list(weights / weights.sum()) for name, weights in whole.items()}
