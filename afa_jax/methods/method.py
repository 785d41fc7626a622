"""Every way of making pictures that ``--method`` or a config's list of methods can name, ready to sample.

A method is ``dict(kind=..., **options)``, on the command line ``KIND[:EXPERT][,OPTION=VALUE]...`` (specs.py).
The kinds and their options are the functions of registry.py; all of them also have ``name``, and ``eta``, ``steps`` and
``guidance`` in place of what all methods of a comparison share.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from afa_jax.config.method_options import FAMILIES, check_entry
from afa_jax.diffusion.guidance import Denoiser, PathDenoiser
from afa_jax.experts.frozen import Experts
from afa_jax.methods.models import Models, NotTrained
from afa_jax.methods.options import SampleOptions
from afa_jax.methods.registry import KINDS, Loaded
from afa_jax.names import SAMPLING
from afa_jax.records import public, recorded

__all__ = [
    "FAMILIES",
    "KINDS",
    "SAMPLING",
    "Method",
    "Models",
    "NotTrained",
    "check_entry",
    "make_method",
    "method_name",
]

_REVISION = 1  # raise it when a kind makes other pictures of the same record: kept pictures are then made again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way of making pictures.

    Attributes:
        name: in tables and files.
        kind, options: as it was asked for.
        family: "control", "parameter space", "output space", "feature space", "time axis", "AFA" or "ablation".
        what: one line on what it does.
        load: loads the weights; ``denoiser`` and ``experts`` do so when they are first asked for.
        shared: experts whose VAE, tokenizer and schedule are the method's; loaded already, and not its own U-Nets.
        on_path: whether the denoiser is a PathDenoiser.
        cost: U-Net evaluations a picture at a timestep with a guidance scale.
        sampling: those of SAMPLING that it does not share.
        record: all that decides its pictures, but for the sampling; JSON values.
        recipe: how its trained part is made, if it has one.
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
        """What the sampler drives."""
        return self._loaded[0]

    @property
    def experts(self) -> Experts:
        """Whose text encoders feed it; VAE, tokenizer and schedule. Of a merge a stack of one."""
        return self._loaded[1]

    @property
    def sites(self) -> list[str]:
        """What each of its maps belongs to; none where it has no maps."""
        return list(getattr(self.denoiser, "sites", ()))

    def sampled_with(self, shared: SampleOptions) -> SampleOptions:
        """How it samples: as all do, but for what it has of its own."""
        own: dict[str, Any] = dict(self.sampling)
        return dataclasses.replace(shared, **own)

    def evaluations(self, options: SampleOptions) -> int:
        """U-Net evaluations for one picture, conditional and unconditional ones counted."""
        return sum(self.cost(int(t), options.guidance) for t in self.shared.schedule.timesteps(options.steps))


def make_method(entry: Mapping[str, Any] | ConfigDict, models: Models) -> Method:
    """A method, whose own weights are loaded when they are needed.

    Raises:
        NotTrained: its trained part is not there.
        InputError: as check_entry, or what the kind's function raises.
    """
    options = check_entry(entry)
    kind = options.pop("kind")
    name = str(options.pop("name", None) or method_name(dict(kind=kind) | options))
    sampling = {field: options.pop(field) for field in SAMPLING if field in options}
    family, what = options.pop("family", KINDS[kind].family), options.pop("what", KINDS[kind].what)
    takes_steps = "steps" in inspect.signature(KINDS[kind].build).parameters
    steps = dict(steps=sampling.get("steps", models.steps)) if takes_steps else {}
    built = KINDS[kind].build(models, **options, **steps)
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
        sampling=sampling,
        record=recorded(record, f"method {name}"),
        recipe=built.recipe,
    )


def method_name(entry: Mapping[str, Any]) -> str:
    """What a method is called that has no name of its own: ``ties density=0.3``, ``expert:food``."""
    options = {field: public(value) for field, value in entry.items() if field not in ("kind", "workdir")}
    expert = options.pop("expert", None)
    parts = [f"{field}={value}" for field, value in options.items() if not isinstance(value, Mapping)]
    return " ".join([f"{entry['kind']}:{expert}" if expert else str(entry["kind"]), *parts])
