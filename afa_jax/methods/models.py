"""The models that methods use, loaded at first use and then shared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.experts.architectures import different_architectures
from afa_jax.experts.checks import mismatches, record_of
from afa_jax.experts.frozen import Experts, load_experts
from afa_jax.experts.sources import find_checkpoints, parse_base, parse_expert
from afa_jax.fusion.pair_record import RECORD
from afa_jax.weights.checkpoint import Checkpoint, rounded
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.formats.hub import fetch_run
from afa_jax.weights.load import load_text_encoders, load_unet, load_unets
from afa_jax.weights.merging.combine import COMPONENTS
from afa_jax.weights.merging.rules import BASE
from afa_jax.weights.opened import unet_config


class NotTrained(InputError):
    """A method's trained part is missing; a comparison reports this and continues without the method."""


class Models:
    """The models of a config, loaded when a method first uses them and then shared by all methods.

    Args:
        config: a config with base, experts and dtype.
        workdir: the trained run (a folder or a hub id) for methods that name none.
        steps: the sampler's steps for methods whose experts take turns and that set no steps themselves.
        mesh: the devices that the experts are spread over.
    """

    def __init__(self, config: ConfigDict, workdir: Path | None = None, steps: int = 50, mesh: Mesh | None = None):
        self.config, self.workdir, self.steps, self.mesh = config, workdir, steps, mesh

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Return the experts' checkpoints by name."""
        return find_checkpoints(self.config.base, self.config.experts)[1]

    @property
    def exact(self) -> dict[str, Checkpoint]:
        """Return the experts' checkpoints in float32, so that a merge is not rounded to their own dtype."""
        return {name: rounded(checkpoint, "float32") for name, checkpoint in self.checkpoints.items()}

    @functools.cached_property
    def base(self) -> Checkpoint:
        """Return the base model with all its networks; the U-Net of a base on the hub is downloaded only here."""
        return parse_base(self.config.base).open(COMPONENTS)

    @functools.cached_property
    def experts(self) -> Experts:
        """Return all experts, stacked."""
        return load_experts(self.config, mesh=self.mesh, **self.dtypes)

    @property
    def dtypes(self) -> dict[str, Any]:
        """Return the loaders' keyword arguments for the dtypes."""
        return dict(dtype=self.config.dtype, param_dtype=self.config.dtype)

    def named(self, names: Sequence[str]) -> dict[str, Checkpoint]:
        """Return the checkpoints of the named experts; "base" is the base model unless an expert has that name.

        Raises:
            InputError: a name is unknown or occurs twice, or the base model lacks a U-Net or text encoder.
        """
        if len(set(names)) < len(names):
            raise InputError(f"experts {', '.join(names)}: name each once")
        return {name: self.whole_base if self._is_base(name) else self.checkpoints[name] for name in names}

    def _is_base(self, name: str) -> bool:
        if name == BASE and name not in self.checkpoints:
            return True
        self.experts.index(name)
        return False

    @property
    def whole_base(self) -> Checkpoint:
        """Return the base model as one that can be sampled; raise InputError if it lacks a U-Net or text encoder."""
        for component in EXPERT_COMPONENTS:
            if component not in self.base.components:
                raise InputError(f"base: {self.base.path} has no {component}; name a base model that has one")
        return self.base

    def open(self, entry: Mapping[str, Any]) -> dict[str, Checkpoint]:
        """Open the checkpoint of an expert that is not in the config's list; return it by its name.

        Raises:
            NotTrained: there is no such file or folder.
            InputError: it cannot be read, or cannot be sampled with the base's VAE and noise schedule.
        """
        source = parse_expert(entry)
        try:
            base, opened = find_checkpoints(self.config.base, [entry])
        except InputError as error:
            if Path(source.path).exists():
                raise
            raise NotTrained(str(error)) from error
        for mismatch in mismatches(base, opened):
            raise InputError(mismatch.message)
        return opened

    def load(self, chosen: Mapping[str, Checkpoint]) -> Experts:
        """Load experts with the base's VAE, tokenizer and schedule; U-Nets of different architectures become a tuple.

        If all of the config's experts are chosen in its order, return ``self.experts``: nothing is loaded twice.
        """
        names, checkpoints = [*chosen], [*chosen.values()]
        if names == [*self.checkpoints] and all(chosen[name] is self.checkpoints[name] for name in names):
            return self.experts
        apart = any(different_architectures([unet_config(checkpoint) for checkpoint in checkpoints], names))
        unets: Any = (
            tuple(load_unet(checkpoint, **self.dtypes) for checkpoint in checkpoints)
            if apart
            else load_unets(checkpoints, **self.dtypes)
        )
        return dataclasses.replace(
            self.experts,
            names=tuple(names),
            hashes=tuple(expert["sha256"] for expert in record_of(chosen)),
            unet=unets,
            text_encoder=load_text_encoders(checkpoints, **self.dtypes),
        )

    def run(self, workdir: str | None, record: str = RECORD, trainer: str = "afa_jax.train") -> Path:
        """Return the folder of a trained run.

        Args:
            record: the file that the run's end writes.
            trainer: the command that makes such runs.

        Raises:
            NotTrained: no run was named, or the folder holds no trained run.
        """
        chosen = workdir or self.workdir
        if chosen is None:
            raise NotTrained("--workdir is missing: it needs the workdir of a trained run, or its hub id")
        try:
            folder = fetch_run(Path(str(chosen)))
        except InputError as error:
            raise NotTrained(str(error)) from error
        if not (folder / record).is_file():
            raise NotTrained(f"{folder}: no {record} there; train into it first ({trainer} --workdir)")
        return folder
