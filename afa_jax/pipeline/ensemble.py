"""``Ensemble``: experts as one object, and the four ways to get one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.cli.arguments import check_run, check_size, one_size
from afa_jax.config.files import check_kind, load_config, make_config, override_of
from afa_jax.errors import InputError
from afa_jax.json_files import read_object
from afa_jax.names import PAIR
from afa_jax.pipeline.base import Place, Source
from afa_jax.pipeline.comparing import Comparing
from afa_jax.pipeline.distilling import Distilling
from afa_jax.pipeline.exporting import Exporting
from afa_jax.pipeline.training import Training
from afa_jax.training.run_folders import CONFIG
from afa_jax.weights.formats.hub_ids import check_named

_CARD = "config.py"  # of a published pair


class Ensemble(Comparing, Training, Distilling, Exporting):
    """Experts with one base model, and optionally a trained run, that make pictures.

    What it can do is in ``sampling.py``, ``comparing.py``, ``training.py``, ``distilling.py`` and ``exporting.py``
    beside this file. Most people call ``from_pretrained``, ``from_config``, ``from_run`` or ``from_image``. Models are
    loaded when they are first needed and then kept; so is the last method's compiled program.

    What the commands print goes to the logger ``afa_jax`` at level INFO; ``quiet=False`` prints it. Bars are tqdm's.

    Args:
        config: a complete config of an ensemble, as ``from_config`` makes it.
        workdir: a trained run, a folder or a hub id.
        arguments: the command-line arguments that give the config; they are recorded with what is trained.
        processes: how this process joins others, as ``afa_jax.mesh.cluster.settings`` returns it; None if it is alone.
    """

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
