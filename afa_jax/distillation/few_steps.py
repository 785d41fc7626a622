"""Few steps: one DDIM step of the student leads where several of the teacher's do.

Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, algorithm 2 and appendix D): from x_t the teacher
takes k steps of DDIM to x_s, and the student is to predict what leads from x_t to x_s in one. It is sampled by DDIM
as before. The first timestep must be the last one of the schedule, where latents are noise: timesteps are spaced
"trailing" (Lin et al. 2024, arXiv 2305.08891).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.teacher import Teacher
from afa_jax.errors import InputError
from afa_jax.types import Latents, TokenIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewSteps:
    """The steps of student and teacher.

    Attributes:
        schedule: the noise schedule of both.
        steps: the number of the student's steps.
        teacher_steps: the number of the teacher's steps, a multiple of the student's.

    Raises:
        InputError: they do not divide one another.
    """

    schedule: NoiseSchedule
    steps: int
    teacher_steps: int

    def __post_init__(self) -> None:
        total = self.schedule.num_train_timesteps
        if total % self.steps:
            raise InputError(f"distil.few.steps={self.steps}; choose a divisor of {total}, such as 1, 2, 4, 8")
        if self.teacher_steps % self.steps or not self.steps < self.teacher_steps <= total:
            raise InputError(
                f"distil.few.teacher_steps={self.teacher_steps}; choose a multiple of distil.few.steps={self.steps}, "
                "such as twice as many"
            )

    @property
    def stride(self) -> int:
        """Return the number of the teacher's steps in one of the student's."""
        return self.teacher_steps // self.steps

    @property
    def sampler(self) -> DDIM:
        """Return the sampler of both."""
        return DDIM(schedule=self.schedule)

    def at(self, point: Array, steps: int) -> Any:
        """Return DDIM's constants of step ``point`` ``[b]`` among ``steps``, in the shape of latents but for ``t``."""
        constants = jax.tree.map(lambda values: values[point], self.sampler.constants(steps))
        wide = jax.tree.map(lambda values: values[:, None, None, None], constants)
        return dataclasses.replace(wide, t=constants.t)

    def walk(
        self, teacher: Teacher, x: Latents, point: Array, ids: TokenIds, no_caption: TokenIds, scale: Array
    ) -> Latents:
        """Return where the teacher gets in the student's step ``point`` ``[b]`` from x, guided at scales ``[b]``."""

        def step(x: Latents, number: Array) -> tuple[Latents, None]:
            k = self.at(point * self.stride + number, self.teacher_steps)
            prediction, _ = teacher.ask(x, k.t, ids, no_caption, scale)
            return self.sampler.step(k, x, prediction, (), None)[0], None

        return jax.lax.scan(step, x, jnp.arange(self.stride))[0]

    def target(self, x: Latents, following: Latents, point: Array) -> Latents:
        """Return the prediction with which one step from x, the student's step ``point``, leads to ``following``."""
        k = self.at(point, self.steps)
        ratio = k.next_sigma / k.sigma
        clean = (following - ratio * x) / (k.next_signal - ratio * k.signal)
        noise = (x - k.signal * clean) / k.sigma
        if self.schedule.prediction_type == "epsilon":
            return noise
        if self.schedule.prediction_type == "sample":
            return clean
        return k.signal * noise - k.sigma * clean

    def weights(self, point: Array) -> Array:
        """Return loss weights ``[b]`` that make the error ``max(SNR, 1)`` times that of x_0 (the paper's section 4)."""
        k = self.at(point, self.steps)
        signal, noise = jnp.square(k.signal).ravel(), jnp.square(k.sigma).ravel()
        of_clean = jnp.maximum(signal / noise, 1)
        if self.schedule.prediction_type == "epsilon":
            return of_clean * noise / signal
        return of_clean * noise if self.schedule.prediction_type == "v_prediction" else of_clean
