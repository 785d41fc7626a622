"""Options of a search for merge weights, checked before JAX is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search.

    Attributes:
        workdir: the folder of this search.
        resume, overwrite: continue, or replace, the search in the workdir.
        metric: for emoji scenes one of the judge's metrics or kid, else any metric of a comparison.
        trials: the total number of trials, including those before a resume.
        minutes: the time after which no trial begins.
        space: the parts that have weights of their own, the kind of a Space.
        points: the number of control points of the space "curve".
        sampler: the sampler that suggests the next weights.
        prompts: the number of emoji scenes, one picture each, per trial.
        prompt_file: a file of prompts to use instead of emoji scenes.
        steps, guidance: the options of sampling; None takes the config's guidance.
        batch: pictures at once.
        seed: the seed of the noise and of the search.
        out: the JSON file for the result; None for best.json in the workdir.
        write: the path for the best merge; None to write none.
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
