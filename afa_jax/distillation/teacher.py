"""The teacher of a distillation: any method of this project, with its predictions as targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from afa_jax.config.method_options import check_values
from afa_jax.diffusion.guidance import Denoiser, PathDenoiser, guided
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.single import SingleExpert
from afa_jax.fusion.steered import GuidedUNet
from afa_jax.methods.method import Method, Models, NotTrained, check_entry, make_method
from afa_jax.models.conditioning import encode_prompts
from afa_jax.names import SAMPLING
from afa_jax.sampling.pictures import find_method
from afa_jax.types import Latents, Timesteps, TokenIds

DATA = "data"
"""The name of the control that has no teacher: the same steps with the data's own noise as target."""
STYLES = "experts"
"""The name of the experts as N teachers, each of a style of its own (DMM)."""
_OF_A_RUN = ("afa", "gate", "router", "ladder", "learned_mbw", "distilled")
"""The kinds of methods that need ``workdir=RUN``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen Denoiser or PathDenoiser with the text encoders that feed it; a tree of arrays.

    A teacher that is a PathDenoiser alone, such as MagicFusion or SuperDiff, predicts on its own path only: its
    prediction depends on the steps before, or on one timestep for all rows.

    Attributes:
        denoiser: the method's Denoiser.
        text_encoder: the stack of its text encoders.
    """

    denoiser: Any
    text_encoder: Any

    @property
    def needs_path(self) -> bool:
        """Return whether it predicts on its own path only."""
        return not isinstance(self.denoiser, Denoiser | GuidedUNet)

    @property
    def is_guided(self) -> bool:
        """Return whether it has guided predictions alone, not a conditional and an unconditional one."""
        return not isinstance(self.denoiser, Denoiser)

    @property
    def on_path(self) -> bool:
        """Return whether it remembers its path where it has one."""
        return isinstance(self.denoiser, PathDenoiser)

    @property
    def has_maps(self) -> bool:
        """Return whether it gives each expert's weight at each pixel."""
        return hasattr(self.denoiser, "with_maps")

    def ask(
        self, latents: Latents, t: Timesteps, ids: TokenIds, no_caption: TokenIds, scale: Any, *, has_maps: bool = False
    ) -> tuple[Latents, Any]:
        """Return the prediction for prompts ``ids``, float32, and the maps, ``()`` unless asked for.

        Args:
            no_caption: token ids of the empty prompt ``[s]``.
            scale: the scales of classifier-free guidance, each row's own ``[b]``; None for the conditional prediction.
        """
        conditional, denoiser = encode_prompts(self.text_encoder, ids), self.denoiser
        if isinstance(denoiser, GuidedUNet):
            return denoiser.guided(latents, t, conditional, conditional, scale, ())
        function: Any = denoiser.with_maps if has_maps else denoiser
        if scale is None:
            answer = function(latents, t, conditional)
        else:
            unconditional = encode_prompts(self.text_encoder, jnp.broadcast_to(no_caption, ids.shape))
            scales = scale[:, None, None, None]
            answer = guided(function, conditional, unconditional, scales, has_maps=has_maps)(latents, t)
        return answer if has_maps else (answer, ())

    def of(self, index: Any) -> Teacher:
        """Return one of N experts as the teacher."""
        return dataclasses.replace(self, denoiser=dataclasses.replace(self.denoiser, index=index))


jax.tree_util.register_dataclass(Teacher, data_fields=["denoiser", "text_encoder"], meta_fields=[])


def find_teacher(config: ConfigDict, models: Models) -> Method | None:
    """Return the method that ``distil.teacher`` names; None for the control and for the experts as N teachers.

    Raises:
        InputError: there is no such method, it is not trained, or a part of it does not fit.
    """
    return None if config.distil.teacher in (DATA, STYLES) else find(config, "teacher", models)


def find(config: ConfigDict, field: str, models: Models) -> Method:
    """Return the method that a field of ``distil`` names; raise InputError, which names the field, if it cannot be."""
    text = config.distil[field]
    try:
        entry = check_entry(find_method(text, config, {}))
        check_values(entry, [str(expert["name"]) for expert in config.experts])
        if entry["kind"] in _OF_A_RUN and not entry.get("workdir"):
            raise InputError(f"it is trained; name the run, {entry['kind']},workdir=RUN")
        if sampled := [name for name in SAMPLING if name in entry]:
            raise InputError(
                f"{sampled[0]} says how it is sampled; set distil.trajectories and distil.guidance instead"
            )
        return make_method(entry, models)
    except NotTrained as error:
        raise InputError(f"distil.{field}={text}: it is not trained ({error})") from error
    except InputError as error:
        raise InputError(f"distil.{field}={text}: {error}") from error


def experts_as_teachers(experts: Experts) -> Teacher:
    """Return N experts as teachers, of whom ``Teacher.of`` chooses one."""
    denoiser = SingleExpert(experts=experts.unet, index=jnp.zeros((), jnp.int32))
    return Teacher(denoiser=denoiser, text_encoder=experts.text_encoder)


def load_teacher(method: Method) -> Teacher:
    """Load a method's networks as a teacher, all of whose leaves are arrays."""
    teacher = Teacher(denoiser=method.denoiser, text_encoder=method.experts.text_encoder)
    return jax.tree.map(jnp.asarray, teacher)
