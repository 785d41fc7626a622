"""What an ensemble is worth: beside other methods, before training, and over merges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa_jax.cli.arguments import (
    COUNT,
    GUIDANCE,
    SEED,
    STEPS,
    check_method,
    check_prompt_file,
    check_prompts,
    checked,
    real,
    whole,
)
from afa_jax.config.method_options import check_entry, check_values
from afa_jax.config.schema import require
from afa_jax.errors import InputError
from afa_jax.exporting.outputs import check_model
from afa_jax.files import COMPARISON, FIGURES, check_file, check_folder
from afa_jax.logs import printed
from afa_jax.names import FEWEST_PAIRS, SEARCHERS, SPACES
from afa_jax.pipeline.base import Place
from afa_jax.pipeline.sampling import Sampling
from afa_jax.training.run_folders import check_workdir

if TYPE_CHECKING:
    from PIL.Image import Image

    from afa_jax.evaluation.compared import Compared, Judge
    from afa_jax.evaluation.screening import Screening


class Comparing(Sampling):
    """What measures: ``compare``, ``screen``, ``evaluate`` and ``search``."""

    def compare(
        self,
        prompts: str | Sequence[str],
        methods: Sequence[str | Mapping[str, Any]] | None = None,
        *,
        seeds: int | Sequence[int] = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        negative_prompt: str = "",
        judge: Judge | None = None,
        resamples: int = 2000,
        quiet: bool = False,
    ) -> Compared:
        """Make pictures of the same prompts and seeds with several methods.

            ens.compare(["fox and pizza", "owl"], ["afa", "average", "expert:food"], seeds=3).grid
            ens.compare(prompts, ["afa", "average"], judge=score).difference("afa", "average")

        Args:
            methods: as in ``__call__``; by default each expert alone, "uniform", and the method of the trained run.
            seeds: the number of seeds, from 0 on, or a list of them.
            judge: a function of a PIL picture and its prompt that returns a number; the result then has figures with
                paired 95 % intervals over prompts.
            resamples: the number of resamples for the intervals.

        Raises:
            InputError: as ``__call__``, or two methods have the same name.
        """
        texts = [prompts] if isinstance(prompts, str) else [*prompts]
        if methods is None:
            methods = [*(f"expert:{name}" for name in self.experts), "uniform"]
            methods += [] if self.workdir is None else [self._default_method()]
        own = [*range(seeds)] if isinstance(seeds, int) else [*seeds]
        if not own or not texts or isinstance(methods, str) or not methods:
            raise InputError("compare: give one or more prompts, methods (a list) and seeds")
        check_prompts(texts)
        labels = [text if isinstance(text, str) else str(text.get("name", text.get("kind"))) for text in methods]
        if len({*labels}) < len(labels):
            raise InputError(f"compare: methods {', '.join(labels)}: name each once")
        for seed in own:
            checked("seeds", seed, SEED)
        for method in methods:
            check_method(method, self.config)

        def made(method: str | Mapping[str, Any]) -> list[list[Image]]:
            by_seed = [
                self(
                    texts, method=method, seed=seed, steps=steps, guidance_scale=guidance_scale, size=size,
                    negative_prompt=negative_prompt, quiet=quiet,
                ).images
                for seed in own
            ]  # fmt: skip
            return [[*row] for row in zip(*by_seed, strict=True)]

        images = {label: made(method) for label, method in zip(labels, methods, strict=True)}

        from afa_jax.evaluation.bootstrap import Resamples
        from afa_jax.evaluation.compared import Compared, judged

        scores = {} if judge is None else judged(images, texts, judge)
        counted = Resamples(prompts=len(texts), count=resamples)
        return Compared(prompts=texts, seeds=own, images=images, scores=scores, resamples=counted)

    def screen(
        self, *, pairs: int = 64, draws: int = 4, seed: int = 0, out: Place | None = None, quiet: bool = True
    ) -> Screening:
        """Measure whether the experts can be fused, and whether training is worth it: the routing gain.

            ens.screen().verdict

        Args:
            pairs: the number of held-out pictures with captions from the config's data.
            draws: the number of noise draws for each pair and timestep.
            seed: the seed of pairs, timesteps, noise and intervals.
            out: a new JSON file for all figures.
            quiet: print no tables.

        Raises:
            InputError: the config has no data, experts cannot be read, or ``out`` exists.
        """
        require(self.config, "data")
        pairs, draws = checked("pairs", pairs, COUNT) or 0, checked("draws", draws, COUNT) or 0
        checked("seed", seed, SEED)
        if pairs < FEWEST_PAIRS or draws < 2:
            raise InputError(f"choose --pairs of {FEWEST_PAIRS} or more and --draws of 2 or more")
        file = None if out is None else Path(out)
        if file:
            FIGURES.check_name(file)
            check_file(file)
        self._heavy()

        from afa_jax.evaluation.screening import screen

        with printed(not quiet):
            return screen(self.config, pairs=pairs, draws=draws, seed=seed, out=file)

    def evaluate(
        self,
        out: Place | None = None,
        *,
        methods: Sequence[str] | None = None,
        prompts: int | None = None,
        pictures_only: bool = False,
        quiet: bool = True,
    ) -> dict[str, Any] | None:
        """Compare all methods of the config's ``evaluation``, write report.html, and return report.json's contents.

        Args:
            out: the folder of pictures and report; ``evaluation`` in the workdir by default.
            methods: only these, named in the config's list or KIND[,OPTION=VALUE]...; the report is then in ``part``.
            prompts: only so many prompts.
            pictures_only: make pictures and no report; returns None.
            quiet: do not print the table of figures and how far it is.

        Raises:
            InputError: the config has no evaluation, or it cannot be used.
            NotFinite: a method computes no finite pictures; raised at the end, after all other methods.
        """
        config = self.config
        if "evaluation" not in config:
            raise InputError("the config has no evaluation; configs/emoji.py and configs/sd15.py show what it says")
        if out is None and self.workdir is None:
            raise InputError("--out is missing; without --workdir there is no folder for the report")
        folder = Path(out) if out is not None else Path(self.workdir or "", "evaluation")
        check_folder(folder)
        _check_place(folder, folder / "part" if methods or prompts else folder)
        checked("prompts", prompts, COUNT)
        for method in methods or ():
            check_method(method, config)
        for entry in config.evaluation.get("methods", ()):
            check_values(check_entry(entry), self.experts)
        own = config.evaluation.prompts
        if own.kind == "file" and own.get("path"):
            check_prompt_file(Path(own.path), "evaluation.prompts.path")

        from afa_jax.evaluation.comparison.main_metric import check_metrics  # numpy, and not JAX yet

        check_metrics(config.evaluation)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first needs the device
        self._heavy()

        from afa_jax.evaluation.comparison.evaluate import evaluate

        with printed(not quiet):
            return evaluate(
                config, folder, workdir=self.workdir, methods=methods, prompts=prompts, pictures_only=pictures_only
            )

    def search(
        self,
        workdir: Place,
        *,
        resume: bool = False,
        overwrite: bool = False,
        metric: str = "subject",
        trials: int = 250,
        minutes: float | None = None,
        space: str = "blocks",
        points: int = 4,
        sampler: str = "tpe",
        prompts: int = 32,
        prompt_file: Place | None = None,
        steps: int = 10,
        guidance_scale: float | None = None,
        batch: int = 16,
        seed: int = 1000,
        out: Place | None = None,
        write: Place | None = None,
        quiet: bool = True,
    ) -> dict[str, Any]:
        """Search for the merge weights with the best score; return them with every trial's score.

        Args:
            workdir: the search's folder; every trial is on the disk before the next one begins.
            write: the path to write the best merge to, as in ``merge(...).save``.
            quiet: do not print the best score and what is written.

        The other arguments are those of ``afa_jax.evaluation.search_options.SearchOptions``.

        Raises:
            InputError: the config, the metric or the workdir cannot be used.
            Stopped: SIGTERM or SIGINT stopped the search; all finished trials are in the log.
        """
        from afa_jax.evaluation.search_options import SearchOptions
        from afa_jax.evaluation.trials_log import check_result

        for name, number in dict(trials=trials, prompts=prompts, batch=batch).items():
            checked(name, number, COUNT)
        checked("points", points, whole(1, 1000))
        checked("steps", steps, STEPS)
        checked("guidance_scale", guidance_scale, GUIDANCE)
        checked("seed", seed, SEED)
        checked("minutes", minutes, real(0, 10**7))
        for name, text, known in (("space", space, SPACES), ("sampler", sampler, SEARCHERS)):
            if text not in known:
                raise InputError(f"{name}={text!r:.40}; choose {', '.join(known)}")
        options = SearchOptions(
            workdir=Path(workdir), resume=resume, overwrite=overwrite, metric=metric, trials=trials, minutes=minutes,
            space=space, points=points, sampler=sampler, prompts=prompts,
            prompt_file=None if prompt_file is None else Path(prompt_file), steps=steps, guidance=guidance_scale,
            batch=batch, seed=seed, out=None if out is None else Path(out),
            write=None if write is None else Path(write),
        )  # fmt: skip
        if minutes is not None and minutes <= 0:
            raise InputError(f"--minutes {minutes}; choose more than 0")
        check_workdir(options.workdir, resume=resume, overwrite=overwrite)
        check_prompt_file(options.prompt_file, "--prompt_file")
        if options.out:
            check_result(options.out, options.workdir, again=resume or overwrite)
        if options.write:
            check_model(options.write)
        # Torch, which computes the metrics of full scale, has what JAX does not need of a GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self._heavy()

        from afa_jax.evaluation.trials import run_search

        with printed(not quiet):
            return run_search(self.config, options)


def _check_place(out: Path, place: Path) -> None:
    """Raise InputError if a folder has files with the names that are written there, but holds no comparison."""
    COMPARISON.check(place / "report.json")
    if not os.path.lexists(place / "report.json") and not (out / "pictures").is_dir():
        for name in ("report.html", "grid.png"):
            check_file(place / name)
