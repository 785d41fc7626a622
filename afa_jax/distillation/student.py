"""The student of a distillation: one U-Net and its text encoder, and the further inputs that it may have."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from afa_jax.distillation.teacher import STYLES, find
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.single import SingleExpert
from afa_jax.fusion.steered import GuidedUNet, StyledUNet
from afa_jax.methods.method import Method, Models
from afa_jax.models.steering import Steering, SteeringConfig
from afa_jax.models.unet import Stage, UNet
from afa_jax.trees import flatten, stack, take, unflatten
from afa_jax.types import Latents, Timesteps, TokenIds


class Student(NamedTuple):
    """One U-Net and its text encoder, all of which is trained, with its further inputs; None where it has none."""

    unet: Any
    text_encoder: Any
    steering: Any = None

    def predict(
        self, latents: Latents, t: Timesteps, ids: TokenIds, scale: Any, style: Any, *, remat: bool = False
    ) -> tuple[Latents, list[tuple[Stage, Array]]]:
        """Return the prediction, float32, and every stage with its output.

        Args:
            scale: guidance scales ``[b]``, where the student takes them, else None.
            style: weights of the styles ``[b, n]``, where the student takes them, else None.
        """
        conditioning = self.text_encoder.encode(ids)
        if self.steering is not None:
            conditioning = dataclasses.replace(conditioning, temb=self.steering(scale, style))
        stages = list(self.unet.features(latents, t, conditioning, remat=remat))
        return stages[-1][1].astype(jnp.float32), stages

    def method(self, experts: Experts, style: Any) -> tuple[Any, Experts]:
        """Return the Denoiser of this student, and the experts to sample it with.

        Args:
            style: weights of the styles ``[n]``, where the student takes them, else None.
        """
        unet, text_encoder = stack([self.unet]), stack([self.text_encoder])
        experts = dataclasses.replace(experts, unet=unet, text_encoder=text_encoder)
        if self.steering is None:
            return SingleExpert(experts=unet, index=0), experts
        kind = StyledUNet if self.steering.config.guidance is None else GuidedUNet
        return kind(experts=unet, steering=self.steering, style=style), experts


def find_student(config: ConfigDict, models: Models) -> Method:
    """Return the method that ``distil.student`` names, which must be one U-Net.

    Raises:
        InputError: there is no such method, a part of it does not fit, or it is more than one U-Net.
    """
    method = find(config, "student", models)
    if not isinstance(method.denoiser, SingleExpert | GuidedUNet | StyledUNet):
        raise InputError(
            f"distil.student={config.distil.student}: it is not one U-Net; choose average, expert:NAME, base, "
            "checkpoint,path=MODEL or distilled,workdir=RUN"
        )
    return method


def load_student_as_it_was(config: ConfigDict, method: Method) -> Student:
    """Return the networks of a distilled model with the inputs that it has, in float32.

    Raises:
        InputError: guidance is an input of it and not of the new student, or the other way round.
    """
    denoiser: Any = method.denoiser
    before: SteeringConfig = denoiser.steering.config
    if (before.guidance is None) != (config.distil.get("guidance") is None):
        raise InputError(
            f"distil.guidance={config.distil.get('guidance')}: distil.student={config.distil.student} was distilled "
            f"with {before.guidance}; a further style takes the same"
        )
    networks = take((denoiser.experts, method.experts.text_encoder), 0)
    return Student(*jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (*networks, denoiser.steering)))


def load_student(config: ConfigDict, method: Method, names: tuple[str, ...]) -> Student:
    """Return the networks of a method that is one U-Net, with the inputs that a config asks for; in float32.

    Args:
        names: the names of the config's experts, which become styles if they are the teachers.

    Raises:
        InputError: the start has an input that the config does not ask for.
    """
    denoiser: Any = method.denoiser
    index = denoiser.index if isinstance(denoiser, SingleExpert) else 0
    networks = take((denoiser.experts, method.experts.text_encoder), index)
    unet, text_encoder = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), networks)
    before: Steering | None = None if isinstance(denoiser, SingleExpert) else denoiser.steering
    guidance = config.distil.get("guidance")
    known = () if before is None else before.config.styles
    teaches_styles = config.distil.teacher == STYLES
    styles = (*known, *(name for name in names if name not in known)) if teaches_styles else known
    text = f"distil.student={config.distil.student}"
    if before is not None and before.config.guidance is not None and guidance is None:
        low, high = before.config.guidance
        raise InputError(f"{text}: its guidance is an input; choose distil.guidance=({low:g}, {high:g})")
    if known and not teaches_styles:
        raise InputError(f"{text}: it has the styles {', '.join(known)}; choose distil.teacher={STYLES}")
    if guidance is None and not styles:
        return Student(unet, text_encoder)
    steering = SteeringConfig(
        width=unet.config.block_out_channels[0],
        time_width=unet.config.time_width,
        guidance=None if guidance is None else (float(guidance[0]), float(guidance[1])),
        styles=styles,
    )
    return Student(unet, text_encoder, _steering(steering, before, config.train.seed))


def _steering(config: SteeringConfig, before: Steering | None, seed: int) -> Steering:
    """Return fresh further inputs, in which those of an earlier model stay what they were."""
    fresh = Steering(config, rngs=nnx.Rngs(seed))
    if before is None:
        return fresh
    flat, old = flatten(fresh), flatten(before)
    kept = {name: jnp.asarray(old[name], jnp.float32) for name in flat if name in old and name != "vectors"}
    if "vectors" in old:
        kept["vectors"] = jnp.concatenate([old["vectors"], flat["vectors"][len(old["vectors"]) :]])
    return unflatten(fresh, flat | kept)


def is_unet_of(unet: UNet, other: UNet) -> bool:
    """Return whether the stages of two U-Nets have the same widths."""
    return [stage.channels for stage in unet.stages] == [stage.channels for stage in other.stages]
