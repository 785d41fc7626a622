"""The noise schedule: what a timestep means, and how predictions turn into one another.

Notation of Ho et al. 2020 (arXiv 2006.11239) and Song et al. 2021 (arXiv 2010.02502): x_t = sqrt(a_t) x_0 +
sqrt(1 - a_t) eps, with a_t the cumulative product of 1 - beta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.names import PREDICTIONS
from afa_jax.types import Array, Latents, Timesteps

SPACINGS = ("leading", "trailing", "linspace")


class ScheduleError(InputError):
    """A scheduler_config.json this project cannot follow; the message names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The fields of a scheduler_config.json that matter for training and DDIM.

    The defaults are Stable Diffusion 1.5's.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        for field, known in (
            ("beta_schedule", ("linear", "scaled_linear")),
            ("prediction_type", PREDICTIONS),
            ("timestep_spacing", SPACINGS),
        ):
            if getattr(self, field) not in known:
                raise ScheduleError(
                    f"{field}={getattr(self, field)!r} is not supported (supported: {', '.join(known)})"
                )
        for field, least, most in (("num_train_timesteps", 1, 100_000), ("steps_offset", 0, 1000)):
            if not least <= getattr(self, field) <= most:
                raise ScheduleError(f"{field}={getattr(self, field)} is not between {least} and {most}")
        for field in ("beta_start", "beta_end"):
            if not 0 <= getattr(self, field) < 1:
                raise ScheduleError(f"{field}={getattr(self, field)} is not a variance from 0 to 1")
        # Predictions are divided by the square roots of a_t and of 1 - a_t.
        for field, alpha in (("beta_start", 1 - self.alphas_cumprod[0]), ("beta_end", self.alphas_cumprod[-1])):
            if alpha < np.finfo(np.float32).tiny:
                part = "no noise" if field == "beta_start" else "no signal"
                raise ScheduleError(
                    f"{field}={getattr(self, field)} leaves {part} at one end of {self.num_train_timesteps} timesteps"
                )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], what: str = "") -> NoiseSchedule:
        """Read a scheduler_config.json of any diffusers scheduler that names the same forward process.

        Args:
            what: names the file in errors.

        Raises:
            ScheduleError: clipping, thresholding or a rescaled schedule is asked for, or an unknown value.
        """
        try:
            return cls._from_json(data)
        except ScheduleError as error:
            raise ScheduleError(f"{what}: {error}" if what else str(error)) from None

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> NoiseSchedule:
        for field in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            # Schedulers such as PNDM have no clip_sample; DDIM's own default, True, does not apply to latents.
            if data.get(field):
                raise ScheduleError(f"{field}={data[field]!r} is not supported for latents")
        if data.get("trained_betas") is not None:
            raise ScheduleError("trained_betas is not supported")
        fields = {field.name for field in dataclasses.fields(cls)}
        # diffusers' defaults where the file is silent.
        defaults: dict[str, Any] = dict(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0, set_alpha_to_one=True
        )
        values = defaults | {k: v for k, v in data.items() if k in fields}
        values["prediction_type"] = values.get("prediction_type") or "epsilon"  # null too
        if null := [field for field, value in values.items() if value is None]:
            raise ScheduleError(f"{null[0]} is null; write what the network was trained with, or remove the line")
        for field, value in values.items():
            kind = type(getattr(cls, field))
            if kind is float and type(value) is int and abs(value) < 2**53:
                values[field] = float(value)
            elif type(value) is not kind:
                raise ScheduleError(f"{field}={value!r} is not a value that this field can have")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a scheduler_config.json with which diffusers' DDIMScheduler does the same."""
        return dataclasses.asdict(self) | dict(clip_sample=False)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Return a_t for every training timestep, float32 ``[num_train_timesteps]``."""
        steps = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            # float32 throughout, as the models were trained.
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=np.float32) ** 2
        else:
            betas = np.linspace(self.beta_start, self.beta_end, steps, dtype=np.float32)
        return np.cumprod(1 - betas, dtype=np.float32)

    def _scales(self, t: Timesteps) -> tuple[Array, Array]:
        import jax.numpy as jnp  # here, so that a checkpoint's schedule is read without JAX

        alpha = jnp.asarray(self.alphas_cumprod)[t][:, None, None, None]
        return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)

    def add_noise(self, x0: Latents, noise: Latents, t: Timesteps) -> Latents:
        """Return x_t, the clean latents ``x0`` with the noise of timestep t."""
        signal, sigma = self._scales(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Latents, noise: Latents, t: Timesteps) -> Latents:
        """Return the target of a network with this prediction type at x_t: noise, clean latents or velocity."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._scales(t)  # v of Salimans and Ho 2022 (arXiv 2202.00512)
        return signal * noise - sigma * x0

    def min_snr_weights(self, t: Timesteps, gamma: float) -> Array:
        """Return loss weights ``[b]`` for this prediction type (Hang et al. 2023, arXiv 2303.09556, section 3.4)."""
        import jax.numpy as jnp

        alpha = jnp.asarray(self.alphas_cumprod)[t]
        snr = alpha / (1 - alpha)
        clipped = jnp.minimum(snr, gamma)
        if self.prediction_type == "sample":
            return clipped
        return clipped / (snr if self.prediction_type == "epsilon" else snr + 1)

    def split(self, xt: Latents, prediction: Latents, signal: Array, sigma: Array) -> tuple[Latents, Latents]:
        """Return (x_0, eps) that a prediction at x_t implies, with signal = sqrt(a_t) and sigma = sqrt(1 - a_t)."""
        if self.prediction_type == "epsilon":
            return (xt - sigma * prediction) / signal, prediction
        if self.prediction_type == "sample":
            return prediction, (xt - signal * prediction) / sigma
        return signal * xt - sigma * prediction, signal * prediction + sigma * xt

    def noise(self, xt: Latents, prediction: Latents, t: Timesteps) -> Latents:
        """Return the noise that a prediction at x_t implies, for any prediction type."""
        return self.split(xt, prediction, *self._scales(t))[1]

    def clean(self, xt: Latents, prediction: Latents, t: Timesteps) -> Latents:
        """Return the clean latents that a prediction at x_t implies, for any prediction type."""
        return self.split(xt, prediction, *self._scales(t))[0]

    def timesteps(self, steps: int) -> np.ndarray:
        """Return the ``steps`` training timesteps that a sampler visits, descending, int32.

        Raises:
            InputError: fewer than 1 or more than num_train_timesteps steps.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise InputError(f"{steps} sampling steps; choose 1 to {total}")
        if self.timestep_spacing == "leading":
            t = np.arange(steps) * (total // steps) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            t = np.round(np.arange(total, 0, -total / steps))[::-1] - 1
        else:
            t = np.round(np.linspace(0, total - 1, steps))
        return np.minimum(t[::-1], total - 1).astype(np.int32)
