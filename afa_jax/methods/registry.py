"""The kinds of methods: functions that check a kind's options and return a Denoiser.

A new method is a new Denoiser and one more function here.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from afa_jax.diffusion.guidance import Denoiser, PathDenoiser
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record, record_of
from afa_jax.experts.frozen import Experts, with_fusion
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.files import load_block_weights, load_fusion, recorded_fusion
from afa_jax.fusion.pair_record import aggregators_hash, read_record
from afa_jax.fusion.registry import kind_of
from afa_jax.fusion.rivals.blending import MagicFusion, NoiseAverage
from afa_jax.fusion.rivals.block_weights import MergedUNet
from afa_jax.fusion.rivals.maxfusion import MaxFusion
from afa_jax.fusion.rivals.superdiff import SuperDiff
from afa_jax.fusion.rivals.time_experts import (
    TimeExperts,
    alternating,
    base_refiner_edges,
    binary_tree_edges,
    uniform_edges,
)
from afa_jax.fusion.routing import Permuted, Sharpened, TopK
from afa_jax.fusion.single import ConstantMaps, SingleExpert
from afa_jax.fusion.sparse import SparseEnsemble, SparseOptions, check_runs_first
from afa_jax.fusion.steered import GuidedUNet, StyledUNet
from afa_jax.methods.distilled import MODEL, STEERING, load_steered, read_distilled, steering_of, style_weights
from afa_jax.methods.distilled import RECORD as DISTILLED_RECORD
from afa_jax.methods.models import Models, NotTrained
from afa_jax.records import plain, public_arguments, public_path
from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.json_files import read_json
from afa_jax.weights.merging.merge import MERGE_RULES, merge, needs_base
from afa_jax.weights.merging.options import fractions, number, numbers, whole
from afa_jax.weights.merging.rules import BASE
from afa_jax.weights.opened import noise_schedule
from afa_jax.weights.tensors import file_sha256

Loaded = tuple[Denoiser | PathDenoiser, Experts]


class Built(NamedTuple):
    """The result of a kind's function.

    Attributes:
        load: loads the Denoiser, and the experts whose text encoders feed it.
        experts: the names and hashes of the experts or, for a merge, of its inputs.
        evaluations: maps a timestep and a guidance scale to the number of U-Net evaluations per picture.
        on_path: whether the denoiser is a PathDenoiser.
        record: facts that the options lack, such as hashes of files; or options that replace those with paths.
        recipe: the command that makes its trained part.
        sampling: sampling options of its own where the entry has none.
    """

    load: Callable[[], Loaded]
    experts: Sequence[Mapping[str, str]]
    evaluations: Callable[[int, float | int], int]
    on_path: bool = False
    record: Mapping[str, Any] = {}
    recipe: str | None = None
    sampling: Mapping[str, Any] = {}


def _of(count: int) -> Callable[[int, float | int], int]:
    """Return the ``evaluations`` of a Denoiser that runs ``count`` U-Nets: twice as many with guidance."""
    return lambda t, guidance: count * (1 if guidance == 1 else 2)


def _fused(models: Models, denoiser: Denoiser | PathDenoiser, **built: Any) -> Built:
    """Build a method that runs all of the config's experts together."""
    experts = models.experts
    return Built(lambda: (denoiser, experts), experts.record, _of(len(experts.names)), **built)


def _blended(denoiser: MagicFusion | SuperDiff, experts: Experts, record: Sequence[Mapping[str, str]]) -> Built:
    return Built(lambda: (denoiser, experts), record, denoiser.evaluations, on_path=True)


def _alone(models: Models, checkpoint: Checkpoint, name: str, **built: Any) -> Built:
    """Build a method that runs one U-Net, as an ensemble of one."""

    def load() -> Loaded:
        experts = models.load({name: checkpoint})
        return SingleExpert(experts=experts.unet, index=0), experts

    return Built(load, record_of({name: checkpoint}), _of(1), **built)


# Controls.


def _expert(models: Models, *, expert: str) -> Built:
    models.experts.index(expert)
    return _alone(models, models.checkpoints[expert], expert)


def _inside(models: Models, *, expert: str) -> Built:
    weights = jax.nn.one_hot(models.experts.index(expert), len(models.experts.names))
    return _fused(models, FusedUNets(experts=models.experts.unet, aggregators=ConstantMaps(weights=weights)))


def _uniform(models: Models) -> Built:
    count = len(models.experts.names)
    return _fused(
        models, FusedUNets(experts=models.experts.unet, aggregators=ConstantMaps(weights=jnp.full((count,), 1 / count)))
    )


def _base(models: Models) -> Built:
    return _alone(models, models.whole_base, BASE)


def _checkpoint(models: Models, *, path: str, **fields: Any) -> Built:
    opened = models.open(dict(name="checkpoint", path=path, **fields))["checkpoint"]
    return _alone(models, opened, "checkpoint", record=dict(options={}))  # its hash is what counts


# In parameter space.


def _merge(kind: str) -> Callable[..., Built]:
    def build(models: Models, **options: Any) -> Built:
        based = needs_base(kind, options)
        merged = merge(kind, models.exact, models.base if based else None, options)
        return _alone(models, merged, kind)

    return build


def _searched(models: Models, *, path: str, text_encoder: str = "merge") -> Built:
    path = str(path)
    if not os.path.exists(path):
        raise NotTrained(f"{path}: no such file; python -m afa_jax.search writes it")
    found = plain(read_json(Path(path)), path)
    settings = found.get("settings", {})
    if not isinstance(found.get("weights"), dict) or not isinstance(settings, dict):
        raise InputError(f"{path}: no weights in it; name a best.json of afa_jax.search")
    if "settings" in found:
        check_record(settings, models.experts.record, path)
    options = dict(weights=found["weights"], text_encoder=text_encoder)
    merged = merge("mbw", models.exact, None, options)
    record = dict(options=dict(text_encoder=text_encoder), searched=options)
    return _alone(models, merged, "autombw", record=record, recipe=_search_of(found))


def _search_of(found: Mapping[str, Any]) -> str:
    """Return the search command of a best.json, with a comment on the settings that the file records."""
    settings = found.get("settings", {})
    own = {
        name: settings[name] for name in ("metric", "space", "sampler", "steps", "guidance", "seed") if name in settings
    }
    said = [f"{name} {value}" for name, value in own.items()]
    if isinstance(captions := settings.get("captions"), list):
        said.append(f"{len(captions)} prompts")
    if "trials" in found:
        said.append(f"{found['trials']} trials, the best of which has {found.get('score')}")
    return f"python -m afa_jax.search  # {', '.join(said)}" if said else "python -m afa_jax.search"


def _learned_mbw(models: Models, *, workdir: str | None = None) -> Built:
    """Build the mbw merge with learnt block weights; the weights are its maps."""
    trained = _trained_run(models, "mbw", workdir)
    weights = load_block_weights(trained.folder, models.checkpoints)
    built = _alone(models, merge("mbw", models.exact, None, dict(weights=weights)), "learned_mbw")

    def load() -> Loaded:
        _, experts = built.load()
        rows = [[*own.values()] for own in weights.values()]
        return MergedUNet(experts=experts.unet, weights=jnp.asarray(rows, jnp.float32)), experts

    return built._replace(load=load, record=trained.record, recipe=trained.recipe)


def _distilled(models: Models, *, workdir: str | None = None, style: Any = None) -> Built:
    """Build the model that afa_jax.distil wrote into a workdir; ``style`` has the weights of its styles by name."""
    folder = models.run(workdir, DISTILLED_RECORD, "afa_jax.distil")
    stored = read_distilled(folder)
    opened = models.open(dict(name="distilled", path=str(folder / MODEL)))["distilled"]
    named = public_path(workdir or models.workdir or folder)
    arguments = public_arguments((stored.get("training") or {}).get("arguments") or ["--config", "CONFIG"])
    recipe = shlex.join(["python", "-m", "afa_jax.distil", *arguments, "--workdir", named])
    steering = steering_of(stored, folder)
    record: dict[str, Any] = dict(distilled={name: stored.get(name) for name in ("teacher", "student")})
    if steering is not None:
        record["steering_sha256"] = file_sha256(folder / STEERING)
    built = _alone(models, opened, "distilled", record=record, recipe=recipe)
    weights = style_weights(style, () if steering is None else steering.styles)

    def load() -> Loaded:
        denoiser, experts = built.load()
        experts = dataclasses.replace(experts, schedule=noise_schedule(opened))
        if steering is None:
            return denoiser, experts
        unet, loaded = load_steered(folder, steering, experts.unet)
        kind = StyledUNet if steering.guidance is None else GuidedUNet
        style = None if weights is None else jnp.asarray(weights, jnp.float32)
        return kind(experts=unet, steering=loaded, style=style), dataclasses.replace(experts, unet=unet)

    folded = steering is not None and steering.guidance is not None
    few = stored.get("few") or {}
    return built._replace(
        load=load,
        on_path=folded,
        evaluations=(lambda t, guidance: 1) if folded else built.evaluations,
        sampling=dict(steps=int(few["steps"])) if few else {},
    )


# In output space and in feature space.


def _noise_average(models: Models, *, weights: Any = None) -> Built:
    names = models.experts.names
    even = [1 / len(names)] * len(names)
    values = even if weights is None else fractions(weights, names, "noise_average: weights")
    return _fused(models, NoiseAverage(experts=models.experts.unet, weights=jnp.asarray(values)))


def _magicfusion(
    models: Models,
    *,
    general: str,
    experts: Any = (),
    k: Any = 1.0,
    fuse_above: Any = 600,
    general_first: bool = False,
) -> Built:
    """Build MagicFusion of ``general`` and ``experts`` (by default all): names, or "base" for the base model.

    ``k`` is one number for all experts, or numbers by name; experts without one have 1.
    """
    names = [general, *(name for name in _names("magicfusion: experts", experts) if name != general)]
    if not experts:
        names += [name for name in models.experts.names if name != general]
    fuse_above = whole("magicfusion: fuse_above", fuse_above)
    chosen = models.named(names)
    if sorted(names) == sorted(models.checkpoints):
        chosen = models.checkpoints  # loaded already
    order = [*chosen]
    if isinstance(k, Mapping):
        own = numbers(k, order, "magicfusion: k")
        sharpness: Any = jnp.asarray([own.get(name, 1.0) for name in order])
    else:
        sharpness = number("magicfusion: k", k)
    loaded = models.load(chosen)
    denoiser = MagicFusion(
        experts=loaded.unet,
        schedule=loaded.schedule,
        general=order.index(general),
        k=sharpness,
        fuse_above=fuse_above,
        general_first=bool(general_first),
    )
    by_name = {own["name"]: own for own in loaded.record}
    return _blended(denoiser, loaded, [by_name[name] for name in names])


def _superdiff(models: Models, *, temperature: Any = 1.0) -> Built:
    temperature = number("superdiff: temperature", temperature)
    if temperature < 0:
        raise InputError(f"superdiff: temperature={temperature:g}; choose 0 (all alike) or more")
    experts = models.experts
    denoiser = SuperDiff(experts=experts.unet, schedule=experts.schedule, temperature=temperature)
    return _blended(denoiser, experts, experts.record)


def _maxfusion(models: Models, *, threshold: Any = 0.7, predictions: str = "fuse") -> Built:
    if predictions not in ("fuse", "average"):
        raise InputError(f"maxfusion: predictions={predictions!r}; choose fuse or average")
    last = len(models.experts.unet.stages) - 1
    threshold = number("maxfusion: threshold", threshold)
    fuser = MaxFusion(threshold=threshold, averaged=() if predictions == "fuse" else (last,))
    return _fused(models, FusedUNets(experts=models.experts.unet, aggregators=fuser))


# Along the time axis.


_SCHEMES: Mapping[str, tuple[str, ...]] = dict(
    uniform=("intervals", "order"), tree=("order",), refiner=("at", "order"), edges=("edges", "order"), alternate=()
)
"""The schemes of ``time``, and the options of each."""


def _time(
    models: Models,
    *,
    steps: int,
    scheme: str | None = None,
    experts: Any = (),
    edges: Any = (),
    order: Any = (),
    intervals: Any = None,
    at: Any = None,
) -> Built:
    """Build a method that runs one expert in each interval of training timesteps.

    Args:
        models: see Models.
        steps: the number of the sampler's steps.
        scheme: "uniform" (``intervals`` equal ones, by default one per expert), "tree" (eDiff-I's three leaves),
            "refiner" (the second expert takes over below timestep ``at``, 200 by default), "alternate" (the experts
            take turns step by step) or "edges" (the given ``edges``).
        experts: names of the config's experts, or "base", or dicts as in its list, of any architecture; the first one
            gets the interval of least noise. By default all of the config's.
        order: the name of each interval's expert; by default each expert gets equally many neighbouring intervals.
    """
    given = dict(edges=edges, order=order, intervals=intervals, at=at)
    scheme = scheme or ("edges" if edges else "uniform")
    if scheme not in _SCHEMES:
        raise InputError(f"time: scheme={scheme!r}; choose {', '.join(_SCHEMES)}")
    if unread := [
        name for name, value in given.items() if value not in (None, (), []) and name not in _SCHEMES[scheme]
    ]:
        raise InputError(f"time: scheme={scheme} has no use for {unread[0]}; leave it out")
    entries = [
        entry.to_dict() if isinstance(entry, ConfigDict) else entry for entry in _listed("time: experts", experts)
    ] or [*models.checkpoints]
    opened: dict[str, Checkpoint] = {}
    for entry in entries:
        opened |= models.named([entry]) if isinstance(entry, str) else models.open(entry)
    names = [*opened]
    if len(names) < len(entries):
        raise InputError(f"time: two of its experts have one name: {', '.join(map(str, entries))}")
    schedule = models.experts.schedule
    total, count = schedule.num_train_timesteps, len(names)
    who: tuple[int, ...]
    if scheme == "alternate":
        found, who = alternating(schedule.timesteps(steps), count)
    else:
        schemes: dict[str, Callable[[], Sequence[int]]] = dict(
            uniform=lambda: uniform_edges(whole("time: intervals", count if intervals is None else intervals), total),
            tree=lambda: binary_tree_edges(total=total),
            refiner=lambda: base_refiner_edges(whole("time: at", 200 if at is None else at)),
            edges=lambda: [whole("time: edges", edge) for edge in _listed("time: edges", edges)],
        )
        found = tuple(schemes[scheme]())
        parts = len(found) + 1
        who = tuple(i * count // parts for i in range(parts))
        if order:
            wanted = _names("time: order", order)
            if unknown := [name for name in wanted if name not in names]:
                raise InputError(f"time: order: no expert {unknown[0]!r}; there are {', '.join(names)}")
            who = tuple(names.index(name) for name in wanted)
        elif idle := [name for i, name in enumerate(names) if i not in who]:
            raise InputError(f"time: {parts} intervals leave none for the expert {idle[0]!r}; name others, or order=")
    TimeExperts(experts=(), edges=found, order=who)  # checks edges and order

    def load() -> Loaded:
        loaded = models.load(opened)
        return TimeExperts(experts=loaded.unet, edges=found, order=who), loaded

    own = dict(scheme=scheme) if scheme == "alternate" else {}  # hashes, edges and order are the rest of the record
    return Built(load, record_of(opened), _of(1), record=dict(options=own, edges=found, order=who))


# Trained: AFA and its rivals.


class _Run(NamedTuple):
    folder: Path
    record: Mapping[str, Any]
    recipe: str


def _trained_run(models: Models, kind: str, workdir: str | None) -> _Run:
    """Return the folder, record and recipe of a fusion of this kind that was trained with the config's experts."""
    folder = models.run(workdir)
    recorded = kind_of(recorded_fusion(folder))
    if recorded != kind:
        raise InputError(f"method {kind}: {folder} is of kind {recorded}; name a run of fusion.kind={kind}")
    stored = read_record(folder)
    check_record(stored, models.experts.record, str(folder))
    training = stored.get("training") or {}
    named = public_path(workdir or models.workdir or folder)
    # Runs from before 2026-11-23 do not record their arguments.
    arguments = public_arguments(training.get("arguments") or ["--config", "CONFIG"])
    command = shlex.join(["python", "-m", "afa_jax.train", *arguments, "--workdir", named])
    recipe = f"{command}  # the whole config: {named}/config.json"
    record = dict(
        aggregators_sha256=aggregators_hash(folder),
        trained=dict(steps=training.get("steps"), batch=training.get("batch")),
    )
    return _Run(folder, record, recipe)


def _trained(kind: str) -> Callable[..., Built]:
    def build(models: Models, *, workdir: str | None = None) -> Built:
        return _fusion(models, kind, workdir)

    return build


def _routed(kind: str) -> Callable[..., Built]:
    """Return the builder of a fusion of predictions; any of SparseOptions' makes its experts run only where needed."""

    def build(
        models: Models,
        *,
        workdir: str | None = None,
        threshold: Any = None,
        top: Any = None,
        unconditional: Any = None,
        reuse: Any = None,
        chunk: Any = None,
    ) -> Built:
        asked = dict(threshold=threshold, top=top, unconditional=unconditional, reuse=reuse, chunk=chunk)
        if not (sparse := {name: value for name, value in asked.items() if value is not None}):
            return _fusion(models, kind, workdir)
        run, count = _trained_run(models, kind, workdir), len(models.experts.names)
        for name in sparse.keys() - {"threshold", "unconditional"}:
            sparse[name] = whole(f"{kind}: {name}", sparse[name])
        options = SparseOptions(**sparse)
        options.check(count, kind)
        router = load_fusion(run.folder, models.experts.unet, count)
        check_runs_first(router)
        experts = models.experts
        denoiser = SparseEnsemble(experts=experts.unet, router=router, schedule=experts.schedule, options=options)
        return _fused(models, denoiser, record=run.record, recipe=run.recipe, on_path=True)

    return build


def _fusion(models: Models, kind: str, workdir: str | None, change: Callable[[Any], Any] | None = None) -> Built:
    """Build the method of a trained fusion; ``change``, if given, is applied to its aggregators."""
    run = _trained_run(models, kind, workdir)
    fusion = load_fusion(run.folder, models.experts.unet, len(models.experts.names))
    denoiser, _ = with_fusion(fusion, models.experts)
    if change is not None:
        denoiser = dataclasses.replace(denoiser, aggregators=change(denoiser.aggregators))
    return _fused(models, denoiser, record=run.record, recipe=run.recipe)


def _afa(
    models: Models,
    *,
    workdir: str | None = None,
    temperature: Any = None,
    top: Any = None,
    order: Any = None,
) -> Built:
    """Build AFA; ``temperature`` sharpens the maps, ``top`` keeps the largest, ``order`` permutes them over experts."""
    names = models.experts.names
    top = None if top is None else whole("afa: top", top)
    if top is not None and not 1 <= top <= len(names):
        raise InputError(f"afa: top={top}; choose 1 to {len(names)}, the number of experts")
    if order is not None and sorted(_names("afa: order", order)) != sorted(names):
        raise InputError(f"afa: order={list(order)}; name each of {', '.join(names)} once")

    def changed(aggregators: Any) -> Any:
        if temperature is not None:
            aggregators = Sharpened(aggregators=aggregators, temperature=number("afa: temperature", temperature))
        if top is not None:
            aggregators = TopK(aggregators=aggregators, k=top)
        if order is not None:
            aggregators = Permuted(aggregators=aggregators, order=tuple(names.index(name) for name in order))
        return aggregators

    return _fusion(models, "afa", workdir, changed)


def _listed(what: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"{what}={values!r}; write a list, [...]")
    return values


def _names(what: str, values: Any) -> list[str]:
    return [str(value) for value in _listed(what, values)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of method: the family it is listed under, what it does, and the function that builds it."""

    family: str
    what: str
    build: Callable[..., Built]


_MERGED = dict(
    average="the experts' weights, averaged",
    add_difference="a + alpha (b - c)",
    mbw="merge block weighted: an average with weights of its own for each block",
    task_arithmetic="the base plus the scaled sum of the experts' differences to it",
    ties="task arithmetic with trimmed differences and elected signs",
    dare="task arithmetic with differences dropped at random",
    slerp="two experts, along the arc between their weights",
    model_stock="between base and average, as far as the angle between the experts' differences says",
)
METHOD_KINDS: Mapping[str, Kind] = {
    "expert": Kind("control", "one expert alone", _expert),
    "inside": Kind("control", "one expert inside the ensemble: its maps are 1", _inside),
    "uniform": Kind("control", "the ensemble with all maps 1/N", _uniform),
    "base": Kind("control", "the base model alone", _base),
    "checkpoint": Kind("parameter space", "a model from a file", _checkpoint),
    **{kind: Kind("parameter space", _MERGED.get(kind, kind), _merge(kind)) for kind in MERGE_RULES},
    "autombw": Kind("parameter space", "block weights found by a black-box search", _searched),
    "learned_mbw": Kind("parameter space", "block weights learnt with AFA's loss and data", _learned_mbw),
    "distilled": Kind("parameter space", "one U-Net that has learnt to predict as many do", _distilled),
    "noise_average": Kind("output space", "the experts' predictions, averaged", _noise_average),
    "magicfusion": Kind("output space", "each pixel from the expert of the largest saliency", _magicfusion),
    "superdiff": Kind("output space", "predictions weighted by the experts' densities on the path", _superdiff),
    "router": Kind("output space", "predictions weighted by maps of small trained U-Nets", _routed("router")),
    "ladder": Kind("output space", "predictions weighted by a small U-Net beside the experts", _routed("ladder")),
    "maxfusion": Kind("feature space", "at each site the experts that agree, else the strongest", _maxfusion),
    "time": Kind("time axis", "one expert for each interval of timesteps", _time),
    "gate": Kind("time axis", "AFA with maps that depend on the timestep alone, trained", _trained("gate")),
    "afa": Kind("AFA", "Adaptive Feature Aggregation", _afa),
}
