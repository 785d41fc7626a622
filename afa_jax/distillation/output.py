"""The files of a distilled model: one ordinary checkpoint in two containers, and the record of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.distillation.student import Student
from afa_jax.exporting.written import write
from afa_jax.files import replace_text
from afa_jax.methods.distilled import FORMAT, MODEL, RECORD, SINGLE
from afa_jax.records import record_text
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint, hash_components, rounded
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.merging.combine import with_base
from afa_jax.weights.opened import open_checkpoint


def publish(workdir: Path, student: Student, base: Checkpoint, *, record: Mapping[str, Any], dtype: str) -> None:
    """Write ``model``, ``model.safetensors`` and, last, ``distilled.json``, over those of an earlier end of the run.

    Args:
        base: has VAE, tokenizer and noise schedule.
        record: the facts on teacher, start, training and measured distance.
        dtype: the dtype of the student's written weights.
    """
    networks = rounded(MemoryCheckpoint.of(unet=student.unet, text_encoder=student.text_encoder), dtype)
    whole = with_base(networks, base)
    recipe = dict(made="distillation", **record)
    write(workdir / MODEL, whole, recipe, overwrite=True)
    write(workdir / SINGLE, whole, recipe, overwrite=True)
    sha256 = hash_components(open_checkpoint(workdir / MODEL), EXPERT_COMPONENTS)
    replace_text(workdir / RECORD, record_text(dict(format=FORMAT, sha256=sha256) | dict(record), RECORD))
