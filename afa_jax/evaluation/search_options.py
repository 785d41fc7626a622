"""What a search for merge weights is asked for, looked at before JAX is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search.

    Attributes:
        workdir: folder of this search.
        resume, overwrite: continue, or replace, the search in the workdir.
        metric: emoji: the judge's, or kid; else any of a comparison's.
        trials: in all, with those before a resume.
        minutes: after which no trial begins.
        space: what has weights of its own.
        points: of the space "curve": its control points.
        sampler: what suggests the next weights.
        prompts: emoji: pictures of each trial.
        prompt_file: prompts instead of emoji scenes.
        steps, guidance: of sampling; guidance None: the config's.
        batch: pictures at once.
        seed: of the noise and of the search.
        out: JSON file for the result; None: best.json in the workdir.
        write: where to write the best merge; None: nowhere.
        quiet: print nothing.
    """

    workdir: Path
    resume: bool = False
    overwrite: bool = False
    metric: str = "subject"
    trials: int = 250
    minutes: float | None = None
    space: str = "blocks"
    points: int = 4
    sampler: str = "tpe"
    prompts: int = 32
    prompt_file: Path | None = None
    steps: int = 10
    guidance: float | None = None
    batch: int = 16
    seed: int = 1000
    out: Path | None = None
    write: Path | None = None
    quiet: bool = False
