"""A fusion of the experts, trained in a workdir."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from afa_jax.cli.arguments import check_run_start
from afa_jax.config.files import make_config, override_of
from afa_jax.config.schema import require
from afa_jax.pipeline.base import Opened, Place


class Training(Opened):
    """What trains: ``train``."""

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
    ) -> Self:
        """Train a fusion of the experts in a workdir, which becomes this ensemble's run; return the ensemble.

            ens.train("runs/afa", data="pictures/", steps=2000)("fox and pizza").images[0]

        Args:
            workdir: the run's folder: metrics, checkpoints, and in the end the trained pair.
            data: pictures with captions, as a config's ``data`` or as the folder that holds them; the config's by
                default.
            method: "afa" (default), "ladder", "router", "gate" or "mbw", with the fusion's own options.
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
