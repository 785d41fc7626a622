"""A search for merge weights, trial by trial, with a log from which it can be resumed."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.errors import InputError, Stopped
from afa_jax.evaluation.comparison.prompts import load_items
from afa_jax.evaluation.search import LIMIT, Score, Space, emoji_score, full_scale_score, score_weights
from afa_jax.evaluation.search_options import SearchOptions
from afa_jax.evaluation.trials_log import check_result, open_study, optuna
from afa_jax.experts.frozen import Experts, load_experts
from afa_jax.files import replace_text, writing
from afa_jax.json_files import read_object
from afa_jax.logs import LOGGER
from afa_jax.methods.options import SampleOptions
from afa_jax.progress import progress
from afa_jax.records import record_text, recorded
from afa_jax.training.stopping import Interrupted, StopSignals
from afa_jax.training.workdir import begin_run, check_workdir, locked, open_workdir


def run_search(config: ConfigDict, options: SearchOptions) -> dict[str, Any]:
    """Run the missing trials, write the best weights, and return their summary.

    Raises:
        InputError: the config, the metric or the workdir cannot be used.
        Stopped: SIGTERM or SIGINT stopped the search; all finished trials are in the log.
    """
    optuna()
    check_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    out = options.out or options.workdir / "best.json"
    if options.out:
        check_result(out, options.workdir, again=options.resume or options.overwrite)
    recorded(config)  # raises if the config cannot be written as JSON
    if options.write:
        from afa_jax.exporting.written import check_out

        check_out(options.write, None)
    score = _score(options, config)
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype, averaged=True)
    guidance = config.sample.guidance if options.guidance is None else options.guidance
    sampling = SampleOptions(
        size=tuple(config.sample.size), steps=options.steps, guidance=float(guidance), batch=options.batch
    )
    sampling.check(experts)
    stages = tuple(stage.name for stage in experts.unet.stages)
    kind: Any = options.space  # one of SPACES
    space = Space(kind=kind, experts=experts.names, stages=stages, points=options.points)
    settings = _settings(options, sampling, score, experts, str(config.dtype))
    if options.out:
        with writing(options.out):
            options.out.parent.mkdir(parents=True, exist_ok=True)
    open_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    _keep_settings(options.workdir / "config.json", settings, config, resume=options.resume)

    def evaluate(parameters: Mapping[str, float]) -> float:
        return score_weights(space.weights(parameters), experts, score, seed=options.seed, options=sampling)

    def write(study: Any) -> dict[str, Any]:
        found = summary(study, space, settings)
        replace_text(out, json.dumps(found, indent=2) + "\n")
        return found

    with locked(options.workdir):
        study = search(
            options.workdir / "trials.log", evaluate, space,
            better=score.better, sampler=options.sampler, seed=options.seed,
            trials=options.trials, minutes=options.minutes,
            on_trial=write,
        )  # fmt: skip
        best = write(study)  # also where no trial was missing, or a kill fell between a trial and its result
    LOGGER.info(
        f"{score.metric} {best['score']:.4f} by trial {best['trial']} of {best['trials']}; "
        f"the uniform average has {best['average']:.4f}"
    )
    LOGGER.info(out)
    if options.write:
        write_merge(options.write, config, best)
        LOGGER.info(options.write)
    return best


def search(
    log: Path,
    evaluate: Callable[[Mapping[str, float]], float],
    space: Space,
    *,
    better: str,
    sampler: str,
    seed: int,
    trials: int,
    minutes: float | int | None = None,
    on_trial: Callable[[Any], object] = lambda study: None,
) -> Any:
    """Evaluate until ``trials`` trials are finished or the time is over; return the study, which ``log`` holds.

    A trial's parameters depend only on the seed, its number and the trials before it, so a resumed search gets the same
    ones. An interrupted trial is evaluated again. A score that is not finite, such as that of a merge whose pictures
    are not, counts as the worst.

    Raises:
        Stopped: SIGTERM or SIGINT; all finished trials are in the log.
        InputError: the score of the first trial, the average, is no number; or as open_study.
    """
    library = optuna()
    study = open_study(log, "maximize" if better == "higher" else "minimize", space.average)
    range_ = library.distributions.FloatDistribution(-LIMIT, LIMIT)
    distributions = dict.fromkeys(space.average, range_)
    started = time.monotonic()
    finished = len(study.get_trials(states=(library.trial.TrialState.COMPLETE,)))
    with StopSignals() as signals, progress(total=trials, initial=finished, unit="trial") as bar:
        while finished < trials and (minutes is None or time.monotonic() - started < 60 * minutes or not finished):
            number, parameters = _begin(study, distributions, space.average, _sampler(sampler, seed, finished))
            try:
                # In a thread, since the first trial compiles and others are long: a signal need not wait for it.
                value = signals.compiling(functools.partial(evaluate, parameters))
            except Interrupted:
                assert signals.asked is not None
                raise Stopped(signals.asked, finished) from None
            if not math.isfinite(value):
                if not finished:
                    raise InputError(f"the uniform average scores {value}; try another --metric or --config.dtype")
                value = -math.inf if better == "higher" else math.inf
            study.tell(number, value)
            finished += 1
            on_trial(study)
            bar.update()
            bar.set_postfix(best=f"{study.best_value:.4f}", last=f"{value:.4f}")
    return study


def _begin(study: Any, distributions: Mapping[str, Any], first: Mapping[str, float], sampler: Any) -> tuple[int, Any]:
    """Return number and parameters of the next trial: an interrupted one, the average, or the sampler's suggestion."""
    states = optuna().trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if set(trial.params) == set(distributions):
            return trial.number, trial.params
        study.tell(trial.number, state=states.FAIL)  # killed while it was being written
    if not study.get_trials(deepcopy=False, states=(states.COMPLETE, states.WAITING)):
        study.enqueue_trial(dict(first))
    study.sampler = sampler
    trial = study.ask(dict(distributions))
    return trial.number, trial.params


def _sampler(name: str, seed: int, number: int) -> Any:
    """Return a new sampler for a trial: its draws do not depend on earlier draws of this process."""
    samplers = optuna().samplers
    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    if name == "tpe":
        return samplers.TPESampler(seed=own)
    # It starts in the middle of the ranges, which is the average, with a sixth of their width, LIMIT / 3, as deviation.
    return samplers.CmaEsSampler(seed=own, warn_independent_sampling=False)


def summary(study: Any, space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's best trial, its weights as the method ``mbw`` takes them, and the score of every trial."""
    complete = study.get_trials(deepcopy=False, states=(optuna().trial.TrialState.COMPLETE,))
    best = study.best_trial
    return dict(
        version=1,
        kind="mbw",
        weights=space.by_block(space.weights(best.params)),
        metric=settings["metric"],
        score=best.value,
        average=next(trial.value for trial in complete if trial.params == space.average),
        trial=best.number,
        trials=len(complete),
        settings=dict(settings),
        history=[[trial.number, trial.value if math.isfinite(trial.value) else None] for trial in complete],
    )


def write_merge(out: Path, config: ConfigDict, best: Mapping[str, Any]) -> None:
    """Write the merge as an ordinary checkpoint, with VAE, tokenizer and schedule of the base."""
    from afa_jax.experts.checks import find_checkpoints
    from afa_jax.exporting.merge import recorded_sources
    from afa_jax.exporting.written import write
    from afa_jax.weights.merging.combine import with_base
    from afa_jax.weights.merging.merge import merge

    base, checkpoints = find_checkpoints(config)
    method = dict(weights=best["weights"])
    recipe = dict(made="search", kind="mbw", options=method, score=best["score"], settings=best["settings"])
    merged = with_base(merge("mbw", checkpoints, base, method), base)
    write(out, merged, recipe | recorded_sources(config, base, checkpoints, False))


def _score(options: SearchOptions, config: ConfigDict) -> Score:
    if options.prompt_file is None:
        return emoji_score(options.metric, options.prompts)
    items = load_items(ConfigDict(dict(kind="file", path=str(options.prompt_file))))
    weights = config.get("evaluation", ConfigDict()).get("weights") or {}
    given = {key: path for key, path in dict(weights).items() if path}
    return full_scale_score(options.metric, items, given, size=tuple(config.sample.size))


def _settings(
    options: SearchOptions, sampling: SampleOptions, score: Score, experts: Experts, dtype: str
) -> dict[str, Any]:
    """Return the settings that all trials of a search share; the batch and the budget are not among them."""
    return dict(
        metric=score.metric,
        space=f"curve of {options.points} points" if options.space == "curve" else options.space,
        sampler=options.sampler,
        captions=list(score.captions),
        **(dict(references=list(score.references)) if score.references else {}),
        size=list(sampling.size),
        steps=sampling.steps,
        guidance=sampling.guidance,
        seed=options.seed,
        dtype=dtype,
        experts=experts.record,
        vae=experts.vae_hash,
        tokenizer=experts.tokenizer.sha256,
    )


def _keep_settings(path: Path, settings: dict[str, Any], config: ConfigDict, *, resume: bool) -> None:
    """Write the settings of a new search; for a resumed one, compare them to the recorded ones."""
    if not resume:
        begin_run(path.parent, record_text(dict(search=settings, config=config)))
        return
    before = read_object(path, "restore it, or start again with --overwrite").get("search")
    if not isinstance(before, dict):
        raise InputError(f"{path}: not of a search; give another --workdir")
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"--resume: {path.parent} searched with other {name}; give it again, or another --workdir")
