"""Distil a method into one U-Net and text encoder, from a config into a workdir."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.data.loader import loading
from afa_jax.distillation.data import Batches, encode_held_out, encode_pictures, split_data
from afa_jax.distillation.output import publish
from afa_jax.distillation.step import Setting, make_distil_step
from afa_jax.distillation.student import Student, find_student, load_student
from afa_jax.distillation.teacher import DATA as NO_TEACHER
from afa_jax.distillation.teacher import Teacher, find_teacher, load_teacher
from afa_jax.distillation.trajectories import Settings, Trajectories, make_trajectories
from afa_jax.distillation.validation import (
    Distance,
    Points,
    Validation,
    join_points,
    noised_points,
    path_points,
)
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts
from afa_jax.mesh.collectives import DATA
from afa_jax.mesh.parallel import make_mesh, place
from afa_jax.mesh.processes import is_multiprocess, log_once
from afa_jax.methods.method import Method, Models
from afa_jax.methods.options import SampleOptions
from afa_jax.records import plain, public_arguments, recorded
from afa_jax.training.data import check_identity
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.model_step import init_state
from afa_jax.training.optimizer import check_objective, check_optimizer, make_optimizer
from afa_jax.training.step import published
from afa_jax.training.workdir import check_model, check_positive, check_workdir, keep_config, open_workdir, write_config
from afa_jax.training.writers import check_writers
from afa_jax.trees import flatten, parameter_count, shapes_of, unflatten
from afa_jax.weights.tokenizer.tokenizer import Tokenizer


def distil(
    config: ConfigDict,
    workdir: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    arguments: Sequence[str] = (),
) -> None:
    """Distil from a config's ``distil.teacher`` into ``workdir``; what is written records ``arguments``.

    ``workdir/model`` is a diffusers folder and ``workdir/model.safetensors`` the same model as a single file; with what
    they were distilled from, and how far they are from it, in their metadata and in ``distilled.json``.

    Raises:
        InputError: the config, its models, its data or the workdir cannot be used.
        Stopped: SIGTERM or SIGINT stopped the run, which was saved.
    """
    settings, own = config.train, config.distil
    check_options(config)
    check_workdir(workdir, resume=resume, overwrite=overwrite, cache=own.trajectories.path)
    check_model(workdir, resume=resume)
    recorded(config)  # which can be kept
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    mesh = make_mesh(dict(data=-1))
    on_path = path_rows(config, mesh)
    split = split_data(config)
    models = Models(config, steps=own.trajectories.steps or config.sample.steps)
    method, start = find_teacher(config, models), find_student(config, models)
    teacher = None if method is None else load_teacher(method)
    student, experts = load_student(start), models.experts
    check_fit(config, teacher, student, experts)
    experts.check_size(split.crop.size)
    sampling = validation_sampling(config, experts)
    open_workdir(workdir, resume=resume, overwrite=overwrite, cache=own.trajectories.path)
    keep_config(workdir, config)

    schedule, tokenizer = experts.schedule, experts.tokenizer
    no_caption = tokenizer([""])[0]
    pictures = encode_pictures(split, own.scenes, experts.vae, tokenizer, mesh)
    held_out = encode_held_out(split, config.validation.pairs, experts.vae, tokenizer, config.validation.batch)
    paths, held_out_paths, key = None, None, ""
    if teacher is not None and method is not None and (on_path or own.trajectories.painted):
        size = pictures["latents"].shape[1:]

        def trajectories(count: int, ids: np.ndarray, seed: int) -> tuple[Trajectories, str]:
            described = path_settings(config, method, experts, size, count, seed)
            made = make_trajectories(
                Path(own.trajectories.path), described, teacher, schedule, ids, no_caption,
                batch=own.trajectories.batch, quiet=quiet,
            )  # fmt: skip
            return made, described.key(ids)

        count = min(own.trajectories.count, len(pictures["ids"]))
        paths, key = trajectories(count, pictures["ids"][:count], own.trajectories.seed)
        held_out_paths, _ = trajectories(len(held_out.ids), held_out.ids, own.trajectories.seed + 1)
    points: list[Points] = []
    if teacher is None or not teacher.needs_path:
        points.append(
            noised_points(
                teacher,
                schedule,
                held_out,
                buckets=config.validation.buckets,
                seed=config.validation.seed,
                batch=config.validation.batch,
            )
        )
    if held_out_paths is not None:
        points.append(path_points(held_out_paths, config.validation.buckets))
    like = shapes_of(student)
    distance = Distance(
        like,
        join_points(points),
        buckets=config.validation.buckets,
        timesteps=schedule.num_train_timesteps,
        batch=config.validation.batch,
    )
    setting = Setting(
        student=like,
        teacher=None if teacher is None else shapes_of(teacher),
        optimizer=optimizer,
        schedule=schedule,
        no_caption=jnp.asarray(no_caption),
        caption_dropout=settings.caption_dropout,
        features=own.features if teacher is not None else 0.0,
        min_snr_gamma=settings.min_snr_gamma,
        ema=settings.ema,
        accumulate=settings.accumulate,
        remat=settings.remat == "stage",
    )
    train_step = make_distil_step(setting)
    batches = Batches(
        pictures=pictures,
        trajectories=paths,
        size=settings.batch,
        on_path=on_path if paths is not None else 0,
        painted_from=painted_from(config),
        seed=settings.seed,
    )
    of = dict(
        teacher=NO_TEACHER if method is None else dict(name=method.name, **method.record),
        student=dict(name=start.name, **start.record),
    )
    identity = plain(split.identity | of | described_run(config, experts) | dict(trajectories=key), "the run")

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_identity(facts.get("data", {}), identity, f"the checkpoint in {workdir}")
        write_config(workdir, config)

    log_once(
        f"{of['student']['name']} learns from {method.name if method else 'the data'}: "  # type: ignore[index]
        f"{parameter_count(student):,} parameters, {len(pictures['ids']):,} pictures"
        + (f", {len(paths):,} trajectories" if paths is not None else "")
    )
    same, rows = PartitionSpec(), PartitionSpec(DATA)
    arrays = place({} if teacher is None else flatten(teacher), mesh, same)
    params = jax.tree.map(jnp.copy, flatten(student))
    state = run_loop(
        lambda state, batch, key: train_step(state, batch, arrays, key),
        place(init_state(params, optimizer, settings.ema), mesh, same),
        lambda first: (place(batches.at(step), mesh, rows) for step in itertools.count(first)),
        steps=settings.steps,
        seed=settings.seed,
        workdir=workdir,
        resume=resume,
        resume_step=resume_step,
        facts=dict(data=identity),
        on_resume=on_resume,
        describe=lambda batch: [],
        every=validation(config, workdir, like, distance, experts, sampling),
        writers=settings.writers,
        log_every=settings.log_every,
        save_every=settings.save_every,
        keep=settings.keep,
        quiet=quiet,
    )
    trained = published(state)
    publish(
        workdir,
        unflatten(like, jax.device_get(trained)),
        models.base,
        record=of | dict(
            distance=distance(trained),
            experts=experts.record,
            vae=experts.vae_hash,
            schedule=schedule.to_json(),
            training=dict(arguments=public_arguments(arguments), config=recorded(config)),
        ),
        dtype=own.dtype,
    )  # fmt: skip
    log_once(workdir)


def check_options(config: ConfigDict) -> None:
    """Raise InputError for numbers and choices that would fail later in the run."""
    if is_multiprocess():
        raise InputError("distil: it runs in one process, on all of its devices; start a single one")
    train, own = config.train, config.distil
    check_positive(train, "steps", "batch", "accumulate", "log_every", "save_every", "keep")
    if train.remat == "fused":
        raise InputError("train.remat=fused: a student has no fused features; choose none or stage")
    check_objective(train, "train.")
    check_optimizer(train.optimizer, "train.optimizer")
    check_writers(train.writers)
    loading(config.data)
    check_positive(config.validation, "pairs", "buckets", "batch", "num_images")
    check_positive(own.trajectories, "batch")
    paths = own.trajectories.share or own.trajectories.painted
    if own.teacher != NO_TEACHER and paths and not own.trajectories.path:
        raise InputError("distil.trajectories.path is missing: the folder of the teacher's trajectories")


def path_rows(config: ConfigDict, mesh: Mesh) -> int:
    """Return how many rows of a batch are points of trajectories; the others are noised pictures.

    Raises:
        InputError: one of the numbers does not divide among the devices and parts.
    """
    batch, share = config.train.batch, config.distil.trajectories.share
    on_path = 0 if config.distil.teacher == NO_TEACHER else round(batch * share)
    unit = mesh.size * config.train.accumulate
    for rows in (batch - on_path, on_path):
        if rows % unit:
            raise InputError(
                f"train.batch={batch}: {batch - on_path} rows of noised pictures and {on_path} of trajectories "
                f"(distil.trajectories.share={share:g}); choose multiples of {unit}, the devices times train.accumulate"
            )
    return on_path


def painted_from(config: ConfigDict) -> int:
    """Return the first step whose noised pictures are those that the teacher painted."""
    return config.train.steps - round(config.train.steps * config.distil.trajectories.painted)


def check_fit(config: ConfigDict, teacher: Teacher | None, student: Student, experts: Experts) -> None:
    """Raise InputError unless the student can learn what the teacher predicts."""
    own, text = config.distil, student.text_encoder.config
    fitting = Tokenizer(experts.tokenizer.folder, text)  # raises for a vocabulary that is too small
    if fitting.length != experts.tokenizer.length:
        raise InputError(
            f"distil.student={own.student}: its text encoder takes {fitting.length} tokens, the experts' "
            f"{experts.tokenizer.length}; choose a student of the same kind"
        )
    if teacher is None:
        return
    if teacher.needs_path and (own.trajectories.share < 1):
        raise InputError(
            f"distil.teacher={own.teacher}: it predicts on its own path only; choose distil.trajectories.share=1"
        )
    if not own.features:
        return
    if not teacher.has_maps or not hasattr(teacher.denoiser, "experts"):
        raise InputError(f"distil.features={own.features:g}: distil.teacher={own.teacher} has no maps; choose 0")
    theirs, its = ([stage.channels for stage in unet.stages] for unet in (teacher.denoiser.experts, student.unet))
    if theirs != its:
        raise InputError(
            f"distil.features={own.features:g}: the stages of distil.student={own.student} are {its} wide, the "
            f"experts' {theirs}; choose 0, or a student of their architecture"
        )


def validation_sampling(config: ConfigDict, experts: Experts) -> SampleOptions | None:
    """Return the options with which validation samples its prompts; None if it samples none.

    Raises:
        InputError: a prompt or a size cannot be sampled.
    """
    if not config.validation.every or not config.validation.prompts:
        return None
    experts.tokenizer(list(config.validation.prompts))
    sample = config.sample
    options = SampleOptions(
        size=tuple(sample.size), steps=sample.steps, guidance=float(sample.guidance), batch=sample.batch
    )
    options.check(experts)
    return options


def path_settings(
    config: ConfigDict, teacher: Method, experts: Experts, size: tuple[int, int, int], count: int, seed: int
) -> Settings:
    """Return the settings of a config's trajectories."""
    own = config.distil.trajectories
    guidance = float(own.get("guidance") or config.sample.guidance)
    return Settings(
        teacher=teacher.record,
        vae=experts.vae_hash,
        schedule=experts.schedule.to_json(),
        count=count,
        steps=own.steps or config.sample.steps,
        guidance=(guidance, guidance),
        seed=seed,
        size=size,
    )


def described_run(config: ConfigDict, experts: Experts) -> dict[str, Any]:
    """Return the fields of a config that a resumed run must share, besides data, teacher and student."""
    train, own = config.train, config.distil
    return dict(
        experts=experts.record,
        vae=experts.vae_hash,
        tokenizer=experts.tokenizer.sha256,
        schedule=experts.schedule.to_json(),
        loading=[config.data.get("size"), config.data.get("flip"), config.data.get("bad")],
        validation=[config.validation.pairs, config.validation.buckets, config.validation.seed],
        scenes=own.scenes,
        features=own.features,
        share=own.trajectories.share,
        painted=painted_from(config),
        **{name: train[name] for name in ("seed", "batch", "caption_dropout", "min_snr_gamma", "ema")},
    )


def validation(
    config: ConfigDict,
    workdir: Path,
    like: Student,
    distance: Distance,
    experts: Experts,
    sampling: SampleOptions | None,
) -> list[Every]:
    """Return validation as the loop's callback, in a list; an empty list if the config asks for none."""
    options = config.validation
    if not options.every:
        return []
    measure = Validation(
        workdir,
        like,
        distance,
        experts,
        every=options.every,
        seed=options.seed,
        prompts=tuple(options.prompts),
        num_images=options.num_images,
        options=sampling,
    )
    return [Every(options.every, lambda state, step: measure(published(state), step))]
