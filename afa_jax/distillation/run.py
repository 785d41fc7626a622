"""Distil a method into one U-Net and text encoder, from a config into a workdir."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.data.loader import loading
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation.data import Batches, encode_held_out, encode_pictures, split_data
from afa_jax.distillation.few_steps import FewSteps
from afa_jax.distillation.output import publish
from afa_jax.distillation.step import Frozen, Setting, make_distil_step
from afa_jax.distillation.student import Student, find_student, is_unet_of, load_student, load_student_as_it_was
from afa_jax.distillation.teacher import DATA as NO_TEACHER
from afa_jax.distillation.teacher import STYLES, Teacher, experts_as_teachers, find_teacher, load_teacher
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
from afa_jax.fusion.single import SingleExpert
from afa_jax.fusion.steered import GuidedUNet
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
    method, start, experts = find_teacher(config, models), find_student(config, models), models.experts
    student = load_student(config, start, experts.names)
    teachers = list_teachers(config, method, start, experts)
    frozen = Frozen(*(load_frozen(config, method, start, experts, teachers)))
    check_fit(config, frozen.teacher, student, experts)
    schedule, few = experts.schedule, few_steps(config, experts.schedule)
    if few is not None:
        schedule = few.schedule
    experts.check_size(split.crop.size)
    sampling = validation_sampling(config, experts)
    open_workdir(workdir, resume=resume, overwrite=overwrite, cache=own.trajectories.path)
    keep_config(workdir, config)

    tokenizer = experts.tokenizer
    no_caption = tokenizer([""])[0]
    pictures = encode_pictures(split, own.scenes, experts.vae, tokenizer, mesh)
    held_out = encode_held_out(split, config.validation.pairs, experts.vae, tokenizer, config.validation.batch)
    like = shapes_of(student)
    setting = Setting(
        student=like,
        frozen=shapes_of(frozen),
        optimizer=optimizer,
        schedule=schedule,
        no_caption=jnp.asarray(no_caption),
        caption_dropout=settings.caption_dropout,
        guidance=guidance_range(config),
        styles=tuple(teacher.expert for teacher in teachers) if own.teacher == STYLES else (),
        few=few,
        features=own.features if teachers else 0.0,
        min_snr_gamma=settings.min_snr_gamma,
        ema=settings.ema,
        accumulate=settings.accumulate,
        remat=settings.remat == "stage",
    )
    paths, points, keys = list[Trajectories](), list[Points](), list[str]()
    size = pictures["latents"].shape[1:]
    for number, one in enumerate(teachers or [None]):
        if one is None or not one.teacher.needs_path:
            points.append(
                noised_points(
                    setting,
                    frozen,
                    held_out,
                    number,
                    buckets=config.validation.buckets,
                    seed=config.validation.seed,
                    batch=config.validation.batch,
                )
            )
        if one is None or not (on_path or own.trajectories.painted):
            continue
        for ids, seed in ((pictures["ids"][: own.trajectories.count], 0), (held_out.ids, 1)):
            described = path_settings(config, one, experts, schedule, size, len(ids), own.trajectories.seed + seed)
            made = make_trajectories(
                Path(own.trajectories.path), described, one.teacher, schedule, ids, no_caption,
                batch=own.trajectories.batch, quiet=quiet,
            )  # fmt: skip
            if seed:
                points.append(path_points(setting, made, number, config.validation.buckets))
            else:
                paths.append(made)
                keys.append(described.key(ids))
    distance = Distance(
        like,
        join_points(points),
        [one.name for one in teachers],
        buckets=config.validation.buckets,
        timesteps=schedule.num_train_timesteps,
        batch=config.validation.batch,
    )
    train_step = make_distil_step(setting)
    batches = Batches(
        pictures=pictures,
        trajectories=paths,
        size=settings.batch,
        on_path=on_path if paths else 0,
        painted_from=painted_from(config),
        seed=settings.seed,
        stride=1 if few is None else few.stride,
        teachers=max(1, len(teachers)),
    )
    of = dict(
        teacher=own.teacher if method is None else dict(name=method.name, **method.record),
        student=dict(name=start.name, **start.record),
    )
    identity = plain(split.identity | of | described_run(config, experts) | dict(trajectories=keys), "the run")

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_identity(facts.get("data", {}), identity, f"the checkpoint in {workdir}")
        write_config(workdir, config)

    log_once(
        f"{start.name} learns from {', '.join(one.name for one in teachers) or 'the data'}: "
        f"{parameter_count(student):,} parameters, {len(pictures['ids']):,} pictures"
        + (f", {sum(map(len, paths)):,} trajectories" if paths else "")
    )
    same, rows = PartitionSpec(), PartitionSpec(DATA)
    arrays = place(flatten(frozen), mesh, same)
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
        schedule=None if few is None else schedule,
        guidance=None if setting.guidance is None else float(config.sample.guidance),
        record=of | dict(
            few=None if few is None else dict(steps=few.steps, teacher_steps=few.teacher_steps),
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
    if (guidance := own.get("guidance")) is not None:
        low, high = guidance
        if not low <= config.sample.guidance <= high:
            raise InputError(
                f"distil.guidance={tuple(guidance)}: sample.guidance={config.sample.guidance:g}, which is baked into "
                "the written model, is not in it; choose another"
            )
        if own.teacher == NO_TEACHER:
            raise InputError("distil.guidance: the data have no guidance to fold in; leave it out with teacher=data")
    elif own.few.steps:
        raise InputError("distil.few: few steps have their guidance folded in; choose distil.guidance=(low, high)")
    if own.few.steps and own.teacher in (NO_TEACHER, STYLES):
        raise InputError(f"distil.few: distil.teacher={own.teacher} makes no steps; choose a method")
    paths = own.trajectories.share or own.trajectories.painted
    if own.teacher != NO_TEACHER and paths and not own.trajectories.path:
        raise InputError("distil.trajectories.path is missing: the folder of the teacher's trajectories")


def path_rows(config: ConfigDict, mesh: Mesh) -> int:
    """Return the number of rows of a batch that are points of trajectories; the others are noised pictures.

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
    if teacher.is_guided and own.get("guidance") is None:
        raise InputError(
            f"distil.teacher={own.teacher}: its predictions are guided; choose distil.guidance=(low, high)"
        )
    if isinstance(teacher.denoiser, GuidedUNet):
        (low, high), (first, last) = own.guidance, teacher.denoiser.guidance_range
        if low < first or high > last:
            raise InputError(
                f"distil.guidance={tuple(own.guidance)}: distil.teacher={own.teacher} has learnt {first:g} to {last:g}"
            )
    if teacher.needs_path and own.trajectories.share < 1:
        raise InputError(
            f"distil.teacher={own.teacher}: it predicts on its own path only; choose distil.trajectories.share=1"
        )
    if not own.features:
        return
    if own.teacher != STYLES and not (teacher.has_maps and hasattr(teacher.denoiser, "experts")):
        raise InputError(f"distil.features={own.features:g}: distil.teacher={own.teacher} has no maps; choose 0")
    if is_unet_of(student.unet, teacher.denoiser.experts):
        return
    theirs, its = ([stage.channels for stage in unet.stages] for unet in (teacher.denoiser.experts, student.unet))
    raise InputError(
        f"distil.features={own.features:g}: the stages of distil.student={own.student} are {its} wide, the experts' "
        f"{theirs}; choose 0, or a student of their architecture"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """One of the teachers.

    Attributes:
        name: in records; of several, its style.
        teacher: itself.
        record: everything that determines what it predicts.
        expert: index of the expert that it is, where each expert is a teacher; -1 for the student's earlier self.
    """

    name: str
    teacher: Teacher
    record: Mapping[str, Any]
    expert: int = 0


def list_teachers(config: ConfigDict, method: Method | None, start: Method, experts: Experts) -> list[Named]:
    """Return the teachers: one method; or each expert, after the styles that the student had before; none for data."""
    if method is not None:
        return [Named(name=method.name, teacher=load_teacher(method), record=method.record)]
    if config.distil.teacher == NO_TEACHER:
        return []
    before: Any = start.denoiser
    known = () if isinstance(before, SingleExpert) else before.steering.config.styles
    old = [
        Named(
            name=name,
            teacher=Teacher(
                denoiser=dataclasses.replace(before, style=jax.nn.one_hot(number, len(known))),
                text_encoder=start.experts.text_encoder,
            ),
            record=dict(style=name, **start.record),
            expert=-1,
        )
        for number, name in enumerate(known)
    ]
    every = experts_as_teachers(experts)
    new = [
        Named(
            name=own["name"],
            teacher=every.of(jnp.asarray(number)),
            record=dict(kind="expert", experts=[own]),
            expert=number,
        )
        for number, own in enumerate(experts.record)
        if own["name"] not in known
    ]
    if not new:
        raise InputError(f"distil.student={config.distil.student}: it has all experts' styles; add an expert")
    return [*old, *new]


def load_frozen(
    config: ConfigDict, method: Method | None, start: Method, experts: Experts, teachers: Sequence[Named]
) -> tuple[Teacher | None, Student | None]:
    """Return the networks that a step asks, as Frozen has them."""
    if method is not None:
        return teachers[0].teacher, None
    if not teachers:
        return None, None
    before = load_student_as_it_was(config, start) if any(one.expert < 0 for one in teachers) else None
    return experts_as_teachers(experts), before


def guidance_range(config: ConfigDict) -> tuple[float, float] | None:
    """Return the range of guidance scales that is folded in, None for none."""
    guidance = config.distil.get("guidance")
    return None if guidance is None else (float(guidance[0]), float(guidance[1]))


def few_steps(config: ConfigDict, schedule: NoiseSchedule) -> FewSteps | None:
    """Return the steps of student and teacher; None for a student of any number of steps.

    Raises:
        InputError: they do not divide one another.
    """
    own = config.distil.few
    if not own.steps:
        return None
    trailing = dataclasses.replace(schedule, timestep_spacing="trailing")
    return FewSteps(schedule=trailing, steps=own.steps, teacher_steps=own.teacher_steps or 2 * own.steps)


def path_settings(
    config: ConfigDict,
    teacher: Named,
    experts: Experts,
    schedule: NoiseSchedule,
    size: tuple[int, int, int],
    count: int,
    seed: int,
) -> Settings:
    """Return the settings of a config's trajectories."""
    own, few = config.distil.trajectories, few_steps(config, experts.schedule)
    guidance = float(own.get("guidance") or config.sample.guidance)
    return Settings(
        teacher=teacher.record,
        vae=experts.vae_hash,
        schedule=schedule.to_json(),
        count=count,
        steps=own.steps or config.sample.steps if few is None else few.teacher_steps,
        guidance=guidance_range(config) or (guidance, guidance),
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
        guidance=guidance_range(config),
        few=own.few.to_dict(),
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
