"""The files of a distilled model: one ordinary checkpoint in two containers, and the record of its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.student import Student
from afa_jax.exporting.written import write
from afa_jax.files import replace_text
from afa_jax.methods.distilled import FORMAT, MODEL, RECORD, SINGLE, baked, save_steering, style_weights
from afa_jax.records import record_text
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint, hash_components, rounded
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.merging.combine import compose, with_base
from afa_jax.weights.opened import open_checkpoint


def publish(
    workdir: Path,
    student: Student,
    base: Checkpoint,
    *,
    schedule: NoiseSchedule | None,
    guidance: float | None,
    record: Mapping[str, Any],
    dtype: str,
) -> None:
    """Write ``model``, ``model.safetensors`` and, last, ``distilled.json``, over those of an earlier end of the run.

    A student with further inputs is written with one guidance scale and all its styles alike baked in, so that tools
    that know no such input sample it without guidance; ``distilled.safetensors`` has what the method ``distilled``
    needs to take any.

    Args:
        base: has VAE, tokenizer and noise schedule.
        schedule: the noise schedule in place of the base's; None for the base's.
        guidance: the guidance scale that is baked in; None without guidance as an input.
        record: the facts on teacher, start, training and measured distance.
        dtype: the dtype of the student's written weights.
    """
    unet, steering = student.unet, student.steering
    own = dict(record)
    if steering is not None:
        style = style_weights(None, steering.config.styles)
        unet = baked(unet, steering, guidance, style)
        own["steering"] = dataclasses.asdict(steering.config)
        own["baked"] = dict(guidance=guidance, style=None if style is None else style.tolist())
        save_steering(workdir, steering, student.unet)
    networks = MemoryCheckpoint.of(unet=unet, text_encoder=student.text_encoder)
    whole = with_base(rounded(networks, dtype), base)
    if schedule is not None:
        fields = base.config("scheduler") | dict(timestep_spacing=schedule.timestep_spacing)
        whole = compose(whole, scheduler=MemoryCheckpoint({}, scheduler=fields))
    recipe = dict(made="distillation", **own)
    write(workdir / MODEL, whole, recipe, overwrite=True)
    write(workdir / SINGLE, whole, recipe, overwrite=True)
    sha256 = hash_components(open_checkpoint(workdir / MODEL), EXPERT_COMPONENTS)
    replace_text(workdir / RECORD, record_text(dict(format=FORMAT, sha256=sha256) | own, RECORD))
