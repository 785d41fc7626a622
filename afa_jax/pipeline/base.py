"""What every method of ``Ensemble`` needs: config, run and models, and the checks of arguments that several share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from afa_jax.cli.arguments import (
    COUNT,
    GUIDANCE,
    STEPS,
    check_method,
    check_size,
    checked,
    expert_names,
    one_size,
    real,
    whole,
)
from afa_jax.config.fields import SEEDS
from afa_jax.errors import InputError
from afa_jax.json_files import read_object
from afa_jax.names import DTYPES, LEARNED, PAIR
from afa_jax.program_cache import keep_programs
from afa_jax.weights.tokenizer.prompts import check_prompt

if TYPE_CHECKING:
    from afa_jax.sampling.pictures import Loaded


Source = str | os.PathLike[str] | Mapping[str, Any]
"""A model: a diffusers folder, a single file, a hub id as ``owner/name@revision``; or a config's entry of one."""
Place = str | os.PathLike[str]

# The methods of trained fusions that are not AFA's.
_BY_KIND = dict(mbw=LEARNED, router="router", ladder="ladder", gate="gate")


class Opened:
    """A config with its run, and its models once they are loaded; its subclasses add what can be done.

    The arguments are those of ``Ensemble``.
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
        """The recipe of the picture that ``from_image`` was given; None otherwise."""
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


def check_dtype(dtype: str | None) -> None:
    """Raise InputError for an unknown dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r:.40}; choose {', '.join(DTYPES)}")
