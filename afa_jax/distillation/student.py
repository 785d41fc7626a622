"""The student of a distillation: one U-Net and its text encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from afa_jax.distillation.teacher import find
from afa_jax.errors import InputError
from afa_jax.fusion.single import SingleExpert
from afa_jax.methods.method import Method, Models
from afa_jax.models.unet import Stage
from afa_jax.trees import take
from afa_jax.types import Latents, Timesteps, TokenIds


class Student(NamedTuple):
    """One U-Net and its text encoder, both trained."""

    unet: Any
    text_encoder: Any

    def predict(
        self, latents: Latents, t: Timesteps, ids: TokenIds, *, remat: bool = False
    ) -> tuple[Latents, list[tuple[Stage, Array]]]:
        """Return the prediction, float32, and every stage with its output."""
        stages = list(self.unet.features(latents, t, self.text_encoder.encode(ids), remat=remat))
        return stages[-1][1].astype(jnp.float32), stages


def find_student(config: ConfigDict, models: Models) -> Method:
    """Return the method that ``distil.student`` names, which must be one U-Net.

    Raises:
        InputError: there is no such method, a part of it does not fit, or it is more than one U-Net.
    """
    method = find(config, "student", models)
    if not isinstance(method.denoiser, SingleExpert):
        raise InputError(
            f"distil.student={config.distil.student}: it is not one U-Net; choose average, expert:NAME, base or "
            "checkpoint,path=MODEL"
        )
    return method


def load_student(method: Method) -> Student:
    """Return the networks of a method that is one U-Net, their parameters in float32."""
    denoiser = method.denoiser
    assert isinstance(denoiser, SingleExpert)
    networks = take((denoiser.experts, method.experts.text_encoder), denoiser.index)
    return Student(*jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), networks))
