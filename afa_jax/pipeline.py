"""The object that people use: experts as one ensemble, which makes pictures, trains, compares, merges and exports.

    from afa_jax import Ensemble

    ens = Ensemble.from_config("configs/emoji.py", workdir="models/emoji/afa")
    out = ens("octopus and pizza, noto style", num_images=4, seed=1, maps=True)
    out.save("pictures")

The commands are thin callers of it. What is wrong with an argument is an InputError, the line that the command prints,
before JAX is imported and before anything is read or written.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from afa_jax.cli.arguments import (
    COUNT,
    GUIDANCE,
    SEED,
    STEPS,
    check_method,
    check_prompt_file,
    check_prompts,
    check_run,
    check_run_start,
    check_size,
    checked,
    expert_names,
    license_name,
    one_size,
    real,
    whole,
)
from afa_jax.config.fields import SEEDS
from afa_jax.config.files import check_kind, load_config, make_config, override_of
from afa_jax.config.method_options import check_entry, check_values
from afa_jax.config.schema import require
from afa_jax.errors import InputError
from afa_jax.exporting.outputs import Wanted, check_model
from afa_jax.files import COMPARISON, FIGURES, check_file, check_folder
from afa_jax.json_files import read_object
from afa_jax.methods.specs import parse_method
from afa_jax.names import DTYPES, FEWEST_PAIRS, LEARNED, MERGES, PAIR, SEARCHERS, SPACES
from afa_jax.program_cache import keep_programs
from afa_jax.sampling.prompt_lines import read_lines
from afa_jax.training.run_folders import CONFIG, check_workdir
from afa_jax.weights.formats.hub_ids import check_named
from afa_jax.weights.tokenizer.prompts import check_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from afa_jax.evaluation.compared import Compared, Judge
    from afa_jax.evaluation.screening import Screening
    from afa_jax.exporting.merge import MergedModel
    from afa_jax.sampling.pictures import Loaded, Pictures

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A model: a diffusers folder, a single file, a hub id as ``owner/name@revision``; or a config's entry of one."""
Place = str | os.PathLike[str]

MERGE_KINDS = (*MERGES, LEARNED)
_BY_KIND = dict(mbw=LEARNED, router="router", gate="gate")  # the methods of trained fusions that are not AFA's
_CARD = "config.py"  # of a published pair


class Ensemble:
    """Experts with one base model, and optionally a trained run, that make pictures.

    Most people call ``from_pretrained``, ``from_config``, ``from_run`` or ``from_image``. Models are loaded when they
    are first needed and then kept; so is the last method's compiled program.

    Args:
        config: a complete config of an ensemble, as ``from_config`` makes it.
        workdir: a trained run, a folder or a hub id.
        arguments: the command-line arguments that give the config; they are recorded with what is trained.
        processes: how this process joins others, as ``afa_jax.mesh.cluster.settings`` returns it; None if it is alone.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        workdir: Place | None = None,
        arguments: Sequence[str] = (),
        processes: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self.workdir = None if workdir is None else Path(workdir)
        self.arguments = list(arguments)
        self.processes = processes
        self.recipe: dict[str, Any] | None = None
        """Of the picture that ``from_image`` was given."""
        self._own_size = False  # whether pictures are as large as the U-Net was trained for, not as the config says
        self._picture: str = ""
        self._loaded: Loaded | None = None
        self._joined = False

    def __repr__(self) -> str:
        run = "" if self.workdir is None else f", workdir={str(self.workdir)!r}"
        return f"Ensemble({', '.join(self.experts)}{run})"

    @property
    def experts(self) -> list[str]:
        """Return the experts' names in order."""
        return expert_names(self.config)

    # Where it comes from.

    @classmethod
    def from_pretrained(
        cls,
        models: Iterable[Source] | Mapping[str, Source],
        *,
        base: Source,
        tokenizer: Place | None = None,
        names: Sequence[str] | None = None,
        dtype: str | None = None,
        size: Sequence[int] | None = None,
        workdir: Place | None = None,
    ) -> Ensemble:
        """Return the ensemble of some models.

            Ensemble.from_pretrained(["photo.safetensors", "owner/anime@v2"], base="owner/base")
            Ensemble.from_pretrained({"a": dict(path="a", loras=[("l.safetensors", 0.8)]), "b": "b"}, base="base")

        Args:
            models: the experts, two or more; by name, or in a list, where each gets its file's name.
            base: the model whose VAE, tokenizer and noise schedule all experts share.
            tokenizer: a folder or hub id, for a base that has none, such as a single file.
            names: the experts' names, one for each.
            dtype: the dtype of weights and computation, "float32" (default), "bfloat16" or "float16".
            size: rows and columns of pictures in pixels; by default those that the U-Net was trained with.
            workdir: a run that was trained with these experts, a folder or a hub id.

        Raises:
            InputError: a model does not exist and cannot be on the hub, or a field is invalid.
        """
        if isinstance(models, str | os.PathLike):
            raise InputError(f"models={str(models)!r:.80}: write a list, one model an expert")
        if isinstance(models, Mapping):
            if names is not None:
                raise InputError("names: the models have names already; leave it out")
            names, sources = [*models], [*models.values()]
        else:
            sources = [*models]
        entries = [_entry(source) for source in sources]
        if names is None:
            names = _names([str(entry.get("name") or entry["path"]) for entry in entries])
        if isinstance(names, str) or len(names) != len(entries):
            raise InputError(f"names: {len(names)} of them for {len(entries)} models; name each once")
        experts = [entry | dict(name=name) for name, entry in zip(names, entries, strict=True)]
        shared = _entry(base) | ({} if tokenizer is None else dict(tokenizer=os.fspath(tokenizer)))
        fields: dict[str, Any] = dict(name="ensemble", base=shared, experts=experts)
        fields |= {} if dtype is None else dict(dtype=dtype)
        own = check_size(one_size(size, None, None), shared)
        fields |= {} if own is None else dict(sample=dict(size=own))
        config = make_config(fields)
        for entry in (shared, *experts):
            check_named(str(entry["path"]), entry.get("revision"))
        ensemble = cls(config, workdir=_run(workdir))
        ensemble._own_size = own is None
        return ensemble

    @classmethod
    def from_config(
        cls,
        config: Place | ConfigDict | Mapping[str, Any],
        *,
        workdir: Place | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Ensemble:
        """Return the ensemble of a config.

            Ensemble.from_config("configs/emoji.py", workdir="models/emoji/afa", overrides={"sample.steps": 10})

        Args:
            config: a .py file with ``get_config``, optionally with ``:VARIANT`` after it, or its fields.
            workdir: a trained run, a folder or a hub id.
            overrides: values by dotted name of the field.

        Raises:
            InputError: the file, variant or a field does not exist, or a value is invalid.
        """
        changes = [override_of(field, value) for field, value in (overrides or {}).items()]
        if isinstance(config, ConfigDict | Mapping):
            made, where, arguments = make_config(config, changes), "config", []
        else:
            spec = os.fspath(config)
            made, where, arguments = load_config(spec, changes), f"--config {spec}", ["--config", spec]
        check_kind(made, where)
        return cls(made, workdir=_run(workdir), arguments=[*arguments, *(f"--config.{change}" for change in changes)])

    @classmethod
    def from_run(
        cls,
        run: Place,
        *,
        models: Mapping[str, Source] | None = None,
        base: Source | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Ensemble:
        """Return the ensemble that a run was trained with, by its config.json, or config.py of a published pair.

        A run records files outside its folder only by their last names: say where these are.

            Ensemble.from_run("models/emoji/afa")
            Ensemble.from_run("owner/pair", models={"photo": "owner/photo", "anime": "anime.safetensors"})

        Args:
            run: a folder, or the hub id of a published pair, of which no code is run.
            models: places of the experts, by name.
            base: the place of the base model.
            overrides: values by dotted name of the field.

        Raises:
            InputError: the run does not exist, or an expert is not where its config says.
        """
        folder = _run(run)
        assert folder is not None
        changes = [override_of(field, value) for field, value in (overrides or {}).items()]
        arguments: list[str] = [f"--config.{change}" for change in changes]
        if (folder / CONFIG).is_file() or not (folder / _CARD).is_file():
            config = make_config(_moved(_kept_config(folder), models, base), changes)
        else:
            spec = str(folder / _CARD)
            config = load_config(spec)
            if models or base:
                config = make_config(_moved(config.to_dict(), models, base))
            config, arguments = make_config(config, changes), ["--config", spec, *arguments]
        check_kind(config, str(run))
        _check_found(config, str(run))
        return cls(config, workdir=folder, arguments=arguments)

    @classmethod
    def from_image(
        cls,
        picture: Place,
        *,
        models: Mapping[str, Source] | None = None,
        base: Source | None = None,
        workdir: Place | None = None,
    ) -> Ensemble:
        """Return the ensemble that made a picture: called without a prompt, it makes the same picture, bit for bit.

            again = Ensemble.from_image("picture.png")
            again.recipe["prompt"], again().images[0]

        Args:
            picture: a PNG of ``afa_jax.sample``, or of ``Pictures.save``.
            models: places of experts, by name, if they are not where the picture's recipe says.
            base: the place of the base model.
            workdir: the place of the trained run.

        Raises:
            InputError: the file is no picture or has no recipe, or a model is not found. The ensemble's call raises it
                if the hashes of the models or the run differ from those that made the picture.
        """
        from afa_jax.data.pictures import read_recipe

        path = Path(picture)
        if not path.is_file():
            raise InputError(f"{path}: no such file; name a picture of afa_jax.sample")
        recipe = read_recipe(path)
        missing = [field for field in ("prompt", "seed", "experts", "made_by", "size", "base") if field not in recipe]
        if missing:
            raise InputError(
                f"{path}: no recipe of afa_jax.sample in it (no {missing[0]}); name a picture that has one"
            )
        sources = recipe.get("sources") or {}
        # Pictures from before 2026-11-29 do not say the sources: then all experts are looked for by their names.
        experts = sources.get("experts") or [dict(name=own["name"], path=own["name"]) for own in recipe["experts"]]
        fields = dict(name="picture", dtype=recipe["dtype"], base=recipe["base"], experts=experts)
        fields["sample"] = dict(size=recipe["size"], steps=recipe["steps"], guidance=recipe["guidance"])
        config = make_config(_moved(fields, models, base))
        _check_found(config, str(path))
        run = sources.get("workdir") if workdir is None else workdir
        ensemble = cls(config, workdir=_run(run))
        made_by = recipe["made_by"]
        entry = sources.get("method") or dict(kind=made_by["kind"], name=recipe["method"]) | made_by["options"]
        if workdir is not None:
            entry = {field: value for field, value in entry.items() if field != "workdir"}
        ensemble.recipe = recipe | dict(sources=dict(method=entry))
        ensemble._picture = str(path)
        return ensemble

    # Pictures.

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        method: str | Mapping[str, Any] | None = None,
        maps: bool = False,
        callback: Callable[[int, int, Image], object] | None = None,
        out: Place | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
    ) -> Pictures:
        """Make pictures of one or several prompts.

            ens("fox, blob style", num_images=4, seed=1).images
            ens(["fox", "owl"], negative_prompt="text", steps=25, guidance_scale=5, size=(512, 768), maps=True).maps

        A picture depends on these arguments and on its number among those of its prompt, not on the other pictures that
        are made with it. The first call with a size compiles; new prompts, seeds, steps and guidance do not.

        Args:
            prompt: one or several prompts. It may be None only after ``from_image``: None, here and below, then takes
                the picture's own value.
            negative_prompt: what not to draw; none by default.
            num_images: the number of pictures of each prompt; 1 by default. Also num_images_per_prompt.
            seed: the noise's seed, 0 to 2**32 - 1; 0 by default. -1 draws a random one, which the recipe records.
            steps: the number of the sampler's steps; the config's by default. Also num_inference_steps.
            guidance_scale: 1 (none) or more; the config's by default. Also guidance.
            size: rows and columns in pixels; the config's by default. Also height and width.
            sampler: the sampler's name, "ddim" by default.
            eta: 0 (default) is deterministic, 1 has as much noise as DDPM.
            method: as ``--method`` of the command, ``KIND[:EXPERT][,OPTION=VALUE]...``; a name of the config's list; or
                a dict with ``kind``. By default the method that the run was trained as, or "uniform" without a run.
            maps: keep each expert's weight at each pixel, site and step.
            callback: is called with the number of pictures made, their total number, and the last picture.
            out: a folder to write each picture into as soon as it is made, with their grid; as ``Pictures.save``.
            overwrite: replace files of the same name there.
            quiet: show no bar.

        Raises:
            InputError: an argument cannot be used or is given in both spellings, models do not fit each other or the
                run, or a picture is not finite.
        """
        count = _one(num_images=num_images, num_images_per_prompt=num_images_per_prompt)
        steps = _one(steps=steps, num_inference_steps=num_inference_steps)
        scale = _one(guidance_scale=guidance_scale, guidance=guidance)
        recipe, numbers, again = self.recipe or {}, None, prompt is None
        if prompt is None:
            if not recipe:
                raise InputError("prompt is missing; say what to draw")
            prompt = str(recipe["prompt"])
            numbers = None if count is not None else [int(recipe.get("number", 0))]
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError("prompt: write a text, or a list of one or more")
        check_prompts(prompts)
        settings = dict(
            negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=scale, eta=eta, sampler=sampler
        )
        unasked = all(value is None for value in (*settings.values(), count, size, height, width, method))
        chosen = {name: recipe.get(name) if value is None else value for name, value in settings.items()}
        wanted = recipe.get("size") if (size, height, width) == (None, None, None) else size
        if method is None and recipe:
            method = recipe["sources"]["method"]
        asked = self._asked(
            **chosen, num_images=count, size=wanted, height=height, width=width, method=method, maps=maps,
            overwrite=overwrite,
        )  # fmt: skip
        folder = None if out is None else Path(out)
        if self.processes is None:  # else process 0 alone may have it
            if folder is not None:
                check_folder(folder)
            check_run(self.workdir)
        loaded = self._heavy()

        from afa_jax.diffusion.samplers.registry import SAMPLERS
        from afa_jax.sampling.pictures import Asked, sample_prompts

        if (name := asked["sampler"]) not in SAMPLERS:
            raise InputError(f"sampler={name!r:.40}; choose {', '.join(SAMPLERS)}")
        return sample_prompts(
            prompts, Asked(**asked), loaded, folder, numbers=numbers, callback=callback, quiet=quiet,
            **(dict(check=self._check_same) if again and unasked else {}),
        )  # fmt: skip

    def sample_file(
        self,
        prompts: Place,
        out: Place,
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        eta: float | None = None,
        method: str | Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Make the pictures of a file of prompts that are not in a folder yet, over all devices and processes.

        Args:
            prompts: a file with one prompt per line, or .jsonl with ``prompt`` and ``negative_prompt``.
            out: the folder; afa_jax/sampling/sample_many.py describes its contents.
            overwrite: remove the existing pictures first.

        The other arguments and the errors are those of ``__call__``; a folder with another recipe is an error, too.
        """
        file, folder = Path(prompts), Path(out)
        asked = self._asked(
            negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance_scale, eta=eta,
            num_images=num_images, size=size, method=method, overwrite=overwrite,
        )  # fmt: skip
        if self.processes is None:
            check_folder(folder)
            check_prompt_file(file)
            read_lines(file, asked["negative_prompt"], quiet=True)
            check_run(self.workdir)
        loaded = self._heavy()

        from afa_jax.sampling.pictures import Asked, sample_file

        sample_file(file, folder, Asked(**asked), loaded)

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

    def maps(
        self,
        prompt: str | Sequence[str] = (),
        *,
        out: Place = "maps",
        statistics: str | None = None,
        method: str | Mapping[str, Any] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write pictures, sheets and animations of the experts' maps, and maps.json; return the path of maps.html.

            ens.maps("octopus and pizza, noto style", out="maps")

        Args:
            statistics: "FILE" or "emoji:N", the prompts over which each site's weights are averaged.
            out: the folder.
            overwrite: replace files of the same name.

        The other arguments and the errors are those of ``__call__``; a method without maps is an error, too.
        """
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        if not prompts and not statistics:
            raise InputError("nothing to draw: give --prompt, --statistics or both; see python -m afa_jax.maps --help")
        check_prompts(prompts)
        asked = self._asked(seed=seed, steps=steps, guidance=guidance_scale, size=size, method=method)
        folder = Path(out)
        check_folder(folder)
        check_run(self.workdir)
        self._heavy()

        from afa_jax.report.maps import draw_maps

        own = {name: asked[name] for name in ("method", "seed", "size", "steps", "guidance")}
        return draw_maps(
            self.config, folder, prompts, statistics=statistics, workdir=self.workdir, overwrite=overwrite, **own
        )

    # Before, in and after training.

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

        return screen(self.config, pairs=pairs, draws=draws, seed=seed, out=file, quiet=quiet)

    def train(
        self,
        workdir: Place,
        *,
        data: Place | Mapping[str, Any] | None = None,
        method: str | None = None,
        steps: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        resume: bool = False,
        resume_step: int | None = None,
        resume_if_any: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> Ensemble:
        """Train a fusion of the experts in a workdir, which becomes this ensemble's run; return the ensemble.

            ens.train("runs/afa", data="pictures/", steps=2000)("fox and pizza").images[0]

        Args:
            workdir: the run's folder: metrics, checkpoints, and in the end the trained pair.
            data: pictures with captions, as a config's ``data`` or as the folder that holds them; the config's by
                default.
            method: "afa" (default), "gate", "router" or "mbw", with the fusion's own options.
            steps: the number of training steps.
            overrides: values of the config by dotted name of the field.
            resume: continue the existing run, as if it had never stopped.
            resume_step: continue it from the checkpoint of this step.
            resume_if_any: continue if there is a run, else begin.
            overwrite: replace the existing run.
            quiet: show no bar.

        Raises:
            InputError: the config, its models, its data or the workdir cannot be used.
            Stopped: SIGTERM or SIGINT stopped the run, which was saved.
        """
        changes = {"fusion.kind": method, "train.steps": steps}
        changes = {field: value for field, value in changes.items() if value is not None} | dict(overrides or {})
        own = [override_of(field, value) for field, value in changes.items()]
        arguments = [*self.arguments, *(f"--config.{change}" for change in own)]
        config = self.config
        if data is not None:
            section = dict(data) if isinstance(data, Mapping) else dict(kind="folder", path=os.fspath(data))
            config = make_config(config.to_dict() | dict(data=section))
            arguments.append(f"--config.{override_of('data', section)}")
        if own:
            config = make_config(config, own)
        require(config, "data")
        folder = Path(workdir)
        resume = resume or resume_step is not None
        check_run_start(
            folder, resume=resume, resume_if_any=resume_if_any, overwrite=overwrite, here=self.processes is None,
            cache=config.cache.path,
        )  # fmt: skip
        self._heavy()

        from afa_jax.training.run import train
        from afa_jax.training.workdir import found_run

        if resume_if_any:
            resume, overwrite = found_run(folder)
        train(
            config, folder, resume=resume, resume_step=resume_step, overwrite=overwrite, quiet=quiet,
            arguments=arguments,
        )  # fmt: skip
        self.config, self.workdir, self.arguments, self._loaded = config, folder, arguments, None
        return self

    def evaluate(
        self,
        out: Place | None = None,
        *,
        methods: Sequence[str] | None = None,
        prompts: int | None = None,
        pictures_only: bool = False,
    ) -> dict[str, Any] | None:
        """Compare all methods of the config's ``evaluation``, write report.html, and return report.json's contents.

        Args:
            out: the folder of pictures and report; ``evaluation`` in the workdir by default.
            methods: only these, named in the config's list or KIND[,OPTION=VALUE]...; the report is then in ``part``.
            prompts: only so many prompts.
            pictures_only: make pictures and no report; returns None.

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

        return evaluate(
            config, folder, workdir=self.workdir, methods=methods, prompts=prompts, pictures_only=pictures_only
        )

    # Models of it.

    def merge(self, method: str | Mapping[str, Any], *, dtype: str | None = None) -> Merge:
        """Return the experts merged into one ordinary model, which is computed when it is saved.

            ens.merge("ties,density=0.2").save("merged.safetensors")

        Args:
            method: a kind and its options, as ``--method`` of ``afa_jax.merge``, or a dict with ``kind``.
            dtype: the dtype of the weights; by default that in which they are stored.

        Raises:
            InputError: the kind or an option is unknown, or a value is invalid.
        """
        entry = parse_method(method) if isinstance(method, str) else dict(method)
        if entry.get("kind") not in MERGE_KINDS:
            text = method if isinstance(method, str) else entry.get("kind")
            raise InputError(f"--method {text}: no merge {entry.get('kind')!r}; there are {', '.join(MERGE_KINDS)}")
        check_values(check_entry(entry), self.experts)
        _check_dtype(dtype)
        return Merge(self, entry, dtype)

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
            quiet: print nothing.

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
            write=None if write is None else Path(write), quiet=quiet,
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

        return run_search(self.config, options)

    def export(
        self,
        *,
        pair: Place | None = None,
        snapshot: Place | None = None,
        bake: tuple[str, Place] | None = None,
        license: str | None = None,
        report: Place | None = None,
        pictures: Sequence[Place] = (),
        with_config: bool = False,
        pairs: int = 64,
        draws: int = 4,
        seed: int = 0,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the ensemble for other tools: its trained pair, one static model, or one expert with its LoRAs.

            ens.export(pair="published", license="mit", with_config=True)
            ens.export(snapshot="static.safetensors", bake=("photo", "photo.safetensors"))

        Args:
            pair: the folder for the trained pair, with its model card.
            snapshot: the file or folder for one static model.
            bake: the name of an expert, and the file or folder for it.
            pictures: PNGs for the card, instead of the run's samples.

        The other arguments are those of ``afa_jax.exporting.outputs.Wanted``.

        Raises:
            InputError: no output is requested, arguments exclude each other, or an output exists.
        """
        checked("pairs", pairs, COUNT)
        checked("draws", draws, COUNT)
        checked("seed", seed, SEED)
        _check_dtype(dtype)
        if license is not None:
            _check_license(license)
        if snapshot:
            require(self.config, "data")
        wanted = Wanted(
            pair=None if pair is None else Path(pair), snapshot=None if snapshot is None else Path(snapshot),
            bake=None if bake is None else (bake[0], Path(bake[1])), workdir=self.workdir, license=license,
            report=None if report is None else Path(report), picture=[Path(picture) for picture in pictures],
            with_config=with_config, pairs=pairs, draws=draws, seed=seed, dtype=dtype, overwrite=overwrite,
        )  # fmt: skip
        wanted.check()
        check_run(self.workdir)
        self._heavy()

        from afa_jax.exporting.export import export

        export(self.config, wanted)

    # Of all of them.

    def _asked(
        self,
        *,
        negative_prompt: str | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        size: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        method: str | Mapping[str, Any] | None = None,
        maps: bool = False,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Return the checked fields of ``Asked``; None stands for the config's or the method's value."""
        check_prompt(negative_prompt or "", "--negative_prompt")
        method = self._default_method() if method is None else method
        check_method(method, self.config)
        side = whole(1, 2**16)
        shape = one_size(size, height, width)
        if shape is not None:
            shape = checked("size", shape[0], side) or 0, checked("size", shape[1], side) or 0
        drawn = checked("seed", seed, whole(-1, SEEDS - 1)) or 0
        return dict(
            method=method,
            negative_prompt=negative_prompt or "",
            num_images=checked("num_images", num_images, COUNT) or 1,
            seed=secrets.randbelow(SEEDS) if drawn == -1 else drawn,
            size=check_size(shape, self.config.base),
            steps=checked("steps", steps, STEPS),
            guidance=checked("guidance_scale", guidance, GUIDANCE),
            eta=checked("eta", eta, real(0, 1000)),
            sampler=sampler or "ddim",
            maps=maps,
            overwrite=overwrite,
        )

    def _default_method(self) -> str:
        """Return the method that the run was trained as; "uniform" without a run."""
        if self.workdir is None:
            return "uniform"
        path = self.workdir / PAIR[1]
        record = read_object(path, "") if path.is_file() else {}
        fusion = record.get("fusion")
        return _BY_KIND.get(str(fusion.get("kind")), "afa") if isinstance(fusion, Mapping) else "afa"

    def _heavy(self) -> Loaded:
        """Import JAX, join the other processes, and return the models, which are loaded when they are first used."""
        keep_programs()

        from afa_jax.mesh.processes import join

        if not self._joined:
            join(None if self.processes is None else dict(self.processes))
            self._joined = True

        from afa_jax.sampling.pictures import Loaded

        if self._loaded is None:
            self._loaded = Loaded(self.config, self.workdir)
            if self._own_size:
                from afa_jax.weights.opened import unet_config, vae_config

                models = self._loaded.models()
                side = unet_config(next(iter(models.checkpoints.values()))).sample_size * vae_config(models.base).factor
                with self.config.unlocked():
                    self.config.sample.size = side, side
                self._own_size = False
        return self._loaded

    def _check_same(self, method: Any, recipe: Mapping[str, Any]) -> None:
        """Raise InputError if the picture of ``from_image`` would not be reproduced."""
        from afa_jax.sampling.sample_many import first_difference

        old = self.recipe or {}
        same = ("experts", "vae", "tokenizer", "made_by", "dtype", "steps", "guidance", "eta", "size", "sampler")
        different = first_difference({name: old.get(name) for name in same}, {name: recipe[name] for name in same})
        if different:
            raise InputError(
                f"{self._picture}: {different}; say where the models are that made it, by models=, base= and workdir="
            )


class Merge:
    """Experts merged into one ordinary model, which is computed when it is first saved or read."""

    def __init__(self, ensemble: Ensemble, method: Mapping[str, Any], dtype: str | None):
        self._ensemble, self.method, self.dtype = ensemble, dict(method), dtype
        self._made: MergedModel | None = None

    @property
    def checkpoint(self) -> Any:
        """Return the model as a Checkpoint (afa_jax/weights/checkpoint.py): configs, and tensors merged when read."""
        return self._merged().checkpoint

    def save(self, path: Place, *, overwrite: bool = False, quiet: bool = True) -> Path:
        """Write the model and return its path.

        Args:
            path: NAME.safetensors for a single file, else a diffusers folder.
            overwrite: replace an existing model.
            quiet: print nothing.

        Raises:
            InputError: the experts cannot be merged like this, or the output exists or cannot be written.
        """
        out = Path(path)
        check_model(out, overwrite)
        keep_programs()

        from afa_jax.exporting.written import check_out

        check_out(out, overwrite)
        self._merged().write(out, overwrite=overwrite, quiet=quiet)
        return out

    def _merged(self) -> MergedModel:
        from afa_jax.exporting.merge import merge_experts

        if self._made is None:
            self._made = merge_experts(self._ensemble.config, self.method, dtype=self.dtype)
        return self._made


def _one(**values: Any) -> Any:
    """Return the value of an argument that has two spellings, or None; raise InputError if both are given."""
    given = [value for value in values.values() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(values)} are one argument; give one of them")
    return given[0] if given else None


def _entry(source: Source) -> dict[str, Any]:
    """Return a model as a config's entry."""
    if isinstance(source, Mapping | ConfigDict):
        entry = dict(source)
        if not isinstance(entry.get("path"), str | os.PathLike):
            raise InputError(f"a model is {entry!r:.80}; write a path, or dict(path=..., loras=...)")
        return entry | dict(path=os.fspath(entry["path"]))
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a model is {source!r:.80}; write a path, a hub id, or dict(path=...)")
    return dict(path=os.fspath(source))


def _names(paths: Sequence[str]) -> list[str]:
    """Return a name for each model: that of its file or repository, with a number added to duplicates."""
    names: list[str] = []
    for path in paths:
        last = os.path.basename(path.partition("@")[0].rstrip("/\\")).removesuffix(".safetensors")
        name = "".join("_" if c in "/:,=" or not c.isprintable() else c for c in last).strip(" .") or "model"
        alike = [name, *(f"{name}_{number}" for number in range(2, len(paths) + 1))]
        names.append(next(each for each in alike if each not in names))
    return names


def _run(workdir: Place | None) -> Path | None:
    """Return the place of a run; raise InputError if it does not exist and cannot be a hub id."""
    run = None if workdir is None else Path(workdir)
    check_run(run)
    return run


def _kept_config(run: Path) -> dict[str, Any]:
    """Return the config that a run, or a published pair, was trained with."""
    if (run / CONFIG).is_file():
        return read_object(run / CONFIG, "name the folder of a run")
    from afa_jax.weights.formats.hub import fetch_run

    path = fetch_run(run) / PAIR[1]
    if not path.is_file():
        raise InputError(f"{run}: neither {CONFIG} nor {PAIR[1]} there; name a trained run, or a published pair")
    training = read_object(path, "").get("training")
    config = training.get("config") if isinstance(training, Mapping) else None
    if not isinstance(config, dict):
        raise InputError(f"{path}: no config in it; write one, and call from_config(..., workdir={str(run)!r})")
    return config


def _moved(fields: Mapping[str, Any], models: Mapping[str, Source] | None, base: Source | None) -> dict[str, Any]:
    """Return a config's fields with the given places of the experts and the base model."""
    experts = [dict(entry) for entry in fields.get("experts", ())]
    known = [str(entry.get("name")) for entry in experts]
    for name, source in (models or {}).items():
        if name not in known:
            raise InputError(f"models: no expert {name!r:.80}; there are {', '.join(known)}")
        own = experts[known.index(name)]
        kept = own if not isinstance(source, Mapping) else dict(name=name)
        experts[known.index(name)] = kept | _entry(source)
    moved = dict(fields) | dict(experts=experts)
    if base is not None:
        old = moved.get("base")
        moved["base"] = (dict(old) if isinstance(old, Mapping) and not isinstance(base, Mapping) else {}) | _entry(base)
    return moved


def _check_found(config: ConfigDict, what: str) -> None:
    """Raise InputError if a model is not where ``what`` says; the error says what to do."""
    base = config.base if isinstance(config.base, str) else config.base.path
    for field, path in [("base", base), *((f"models={{{own['name']!r}: ...}}", own["path"]) for own in config.experts)]:
        try:
            check_named(str(path))
        except InputError as error:
            raise InputError(f"{what}: {error}; say where it is, {field}") from None


def _check_place(out: Path, place: Path) -> None:
    """Raise InputError if a folder has files with the names that are written there, but holds no comparison."""
    COMPARISON.check(place / "report.json")
    if not os.path.lexists(place / "report.json") and not (out / "pictures").is_dir():
        for name in ("report.html", "grid.png"):
            check_file(place / name)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r:.40}; choose {', '.join(DTYPES)}")


def _check_license(name: str) -> None:
    """Raise InputError unless a text is the name of a licence as the hub spells it."""
    try:
        license_name(name)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"license: {error}") from None
