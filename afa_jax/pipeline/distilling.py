"""One ordinary checkpoint that predicts as the ensemble does, distilled in a workdir."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa_jax.cli.arguments import check_method, check_run_start
from afa_jax.config.files import make_config, override_of
from afa_jax.config.schema import require
from afa_jax.errors import InputError
from afa_jax.pipeline.base import Opened, Place


class Distilling(Opened):
    """What distils: ``distil``."""

    def distil(
        self,
        workdir: Place,
        *,
        teacher: str | None = None,
        student: str | None = None,
        steps: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        resume: bool = False,
        resume_step: int | None = None,
        resume_if_any: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> Path:
        """Distil a method into one U-Net and text encoder; return the folder of the finished model.

            ens.distil("runs/one", teacher="router,workdir=runs/router")
            ens("fox and pizza", method="distilled:runs/one")

        Args:
            workdir: the run's folder: metrics, checkpoints, and in the end ``model`` and ``model.safetensors``.
            teacher: a method as ``--method`` names it, or "data" for the same steps without a teacher; by default the
                run that this ensemble was opened with, else the config's ``distil.teacher``.
            student: the method to start from, which is one U-Net; by default the config's ``distil.student``.
            steps: the number of training steps.
            overrides: values of the config by dotted name of the field.
            resume, resume_step, resume_if_any, overwrite, quiet: as of ``train``.

        Raises:
            InputError: the config, its models, its data or the workdir cannot be used.
            Stopped: SIGTERM or SIGINT stopped the run, which was saved.
        """
        if self.processes is not None:
            raise InputError("distil: it runs in one process, on all of its devices; start a single one")
        config = self.config
        if "distil" not in config:
            config = make_config(config.to_dict() | dict(distil={}))
        if teacher is None and self.workdir is not None:
            teacher = f"{self._default_method()},workdir={self.workdir}"
        changes = {"distil.teacher": teacher, "distil.student": student, "train.steps": steps}
        changes = {field: value for field, value in changes.items() if value is not None} | dict(overrides or {})
        own = [override_of(field, value) for field, value in changes.items()]
        if own:
            config = make_config(config, own)
        for field in ("teacher", "student"):
            if (text := config.distil[field]) not in ("data", "experts") or field == "student":
                try:
                    check_method(text, config)
                except InputError as error:
                    why = str(error).removeprefix(f"--method {text}: ")
                    raise InputError(f"distil.{field}={text}: {why}") from None
        require(config, "data")
        folder = Path(workdir)
        resume = resume or resume_step is not None
        check_run_start(
            folder, resume=resume, resume_if_any=resume_if_any, overwrite=overwrite,
            cache=config.distil.trajectories.path,
        )  # fmt: skip
        self._heavy()

        from afa_jax.distillation.run import distil
        from afa_jax.training.workdir import found_run

        if resume_if_any:
            resume, overwrite = found_run(folder)
        distil(
            config, folder, resume=resume, resume_step=resume_step, overwrite=overwrite, quiet=quiet,
            arguments=[*self.arguments, *(f"--config.{change}" for change in own)],
        )  # fmt: skip
        return folder / "model"
