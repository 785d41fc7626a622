"""Methods of making pictures, as ``--method`` or a config's list names them, ready to sample.

A method is ``dict(kind=..., **options)``, on the command line ``KIND[:EXPERT][,OPTION=VALUE]...`` (specs.py). Its kinds
and their options are the functions of registry.py. Every kind also has the options ``name``, and ``eta``, ``steps`` and
``guidance``, which override the sampling options of a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.config.method_options import FAMILIES, check_entry
from afa_jax.diffusion.guidance import Denoiser, PathDenoiser
from afa_jax.experts.frozen import Experts
from afa_jax.methods.models import Models, NotTrained
from afa_jax.methods.options import SampleOptions, guided_timesteps
from afa_jax.methods.registry import METHOD_KINDS, Loaded
from afa_jax.names import DISTILLED, SAMPLING
from afa_jax.records import public, recorded

__all__ = [
    "FAMILIES",
    "METHOD_KINDS",
    "SAMPLING",
    "Method",
    "Models",
    "NotTrained",
    "check_entry",
    "make_method",
    "method_name",
]

_REVISION = (
    1  # raise it when a kind changes its pictures without changing its record: kept pictures are then made again
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method that makes pictures.

    Attributes:
        name: its name in tables and files.
        kind, options: the kind and options of its entry.
        family: "control", "parameter space", "output space", "feature space", "time axis", "AFA" or "ablation".
        what: one line that says what it does.
        load: loads the weights; the first use of ``denoiser`` or ``experts`` calls it.
        shared: loaded experts with the method's VAE, tokenizer and schedule, but not necessarily its U-Nets.
        on_path: whether the denoiser is a PathDenoiser.
        cost: maps a timestep and a guidance scale to the number of U-Net evaluations per picture.
        sampling: its own values of SAMPLING's options, which replace the shared ones.
        record: everything that determines its pictures except the sampling options, as JSON values.
        recipe: the command that makes its trained part, if it has one.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    family: str
    what: str
    load: Callable[[], Loaded]
    shared: Experts
    on_path: bool
    cost: Callable[[int, float | int], int]
    sampling: Mapping[str, float | int]
    record: Mapping[str, Any]
    recipe: str | None = None

    @functools.cached_property
    def _loaded(self) -> Loaded:
        return self.load()

    @property
    def denoiser(self) -> Denoiser | PathDenoiser:
        """Return the denoiser that the sampler calls."""
        return self._loaded[0]

    @property
    def experts(self) -> Experts:
        """Return the experts with its text encoders, VAE, tokenizer and schedule; for a merge, a stack of one."""
        return self._loaded[1]

    @property
    def sites(self) -> list[str]:
        """Return the sites that its maps belong to, in order; empty if it has no maps."""
        return list(getattr(self.denoiser, "sites", ()))

    def sampled_with(self, shared: SampleOptions) -> SampleOptions:
        """Return the shared sampling options with the method's own values in place of theirs."""
        own: dict[str, Any] = dict(self.sampling)
        return dataclasses.replace(shared, **own)

    def evaluations(self, options: SampleOptions) -> int:
        """Return the number of U-Net evaluations for one picture, conditional and unconditional ones together."""
        timesteps = self.shared.schedule.timesteps(options.steps)
        first, last = guided_timesteps(timesteps, options.guidance_interval)
        return sum(self.cost(int(t), options.guidance if last <= t <= first else 1) for t in timesteps)


def make_method(entry: Mapping[str, Any] | ConfigDict, models: Models) -> Method:
    """Return a method; its own weights are loaded when they are first used.

    Raises:
        NotTrained: its trained part is missing.
        InputError: as check_entry and the kind's own function.
    """
    options = check_entry(entry)
    kind = options.pop("kind")
    name = str(options.pop("name", None) or method_name(dict(kind=kind) | options))
    sampling = {field: options.pop(field) for field in SAMPLING if field in options}
    family, what = options.pop("family", METHOD_KINDS[kind].family), options.pop("what", METHOD_KINDS[kind].what)
    takes_steps = "steps" in inspect.signature(METHOD_KINDS[kind].build).parameters
    steps = dict(steps=sampling.get("steps", models.steps)) if takes_steps else {}
    built = METHOD_KINDS[kind].build(models, **options, **steps)
    own = {option: value for option, value in options.items() if option != "workdir"}  # its hash is what counts
    record = dict(revision=_REVISION, kind=kind, options=own, experts=built.experts) | dict(built.record)
    return Method(
        name=name,
        kind=kind,
        options=options,
        family=family,
        what=what,
        load=built.load,
        shared=models.experts,
        on_path=built.on_path,
        cost=built.evaluations,
        sampling=dict(built.sampling) | sampling,
        record=recorded(record, f"method {name}"),
        recipe=built.recipe,
    )


def method_name(entry: Mapping[str, Any]) -> str:
    """Return the default name of a method without one: ``ties density=0.3``, ``expert:food``, ``distilled:RUN``."""
    options = {field: public(value) for field, value in entry.items() if field not in ("kind", "workdir")}
    expert = options.pop("expert", None)
    parts = [f"{field}={value}" for field, value in options.items() if not isinstance(value, Mapping)]
    parts += [f"{name}={weight:g}" for name, weight in (options.get("style") or {}).items()]
    if entry["kind"] == DISTILLED and entry.get("workdir"):  # there may be several in a table
        expert = Path(str(entry["workdir"])).name
    return " ".join([f"{entry['kind']}:{expert}" if expert else str(entry["kind"]), *parts])
