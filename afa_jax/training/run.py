"""Train the aggregators of an ensemble, or one of their rivals, from a config into a workdir."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.data.bad_examples import BadExamples
from afa_jax.data.loader import loading
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record
from afa_jax.experts.frozen import Experts, load_experts, with_encoders_here
from afa_jax.fusion.afa import REMATS
from afa_jax.fusion.files import save_fusion
from afa_jax.fusion.pair_record import RECORD
from afa_jax.fusion.registry import fusion_class, fusion_config, init_fusion, kind_of
from afa_jax.mesh.collectives import DATA, EXPERT, FSDP
from afa_jax.mesh.parallel import mesh_of, place, place_rows, row_share
from afa_jax.mesh.processes import (
    compiled_together,
    gather_arrays,
    is_multiprocess,
    is_process_0,
    log_once,
    on_process_0,
    raise_on_all,
)
from afa_jax.methods.options import SampleOptions
from afa_jax.records import public_arguments, record_text, recorded
from afa_jax.training.cache.cache import check_cache
from afa_jax.training.checkpoints import Checkpoints
from afa_jax.training.data import check_identity, make_training_data, split_data
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.optimizer import check_objective, check_optimizer, make_optimizer
from afa_jax.training.step import batch_specs, init_state, make_train_step, published
from afa_jax.training.stopping import nothing_to_save
from afa_jax.training.validation import Pairs, Validation
from afa_jax.training.workdir import check_positive, check_workdir, keep_config, open_workdir, write_config
from afa_jax.training.writers import check_writers
from afa_jax.trees import flatten, parameter_count, shapes_of, unflatten


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    arguments: Sequence[str] = (),
) -> None:
    """Train from a config into a workdir; the published pair records ``arguments``.

    Raises:
        InputError: the config, its models, its data or the workdir cannot be used.
        Stopped: SIGTERM or SIGINT stopped the run, which was saved.
    """
    settings = config.train

    # Everything that can be wrong with the input is found before the workdir is touched.
    check_options(config)
    fusing = configured_fusion(config)
    check_workdir(workdir, resume=resume, overwrite=overwrite, cache=config.cache.path)
    recorded(config)  # raises if the config cannot be written as JSON
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    with nothing_to_save():
        mesh = configured_mesh(config, fusing)
        split = raise_on_all(lambda: split_data(config))
        experts = raise_on_all(
            lambda: load_experts(
                config, dtype=config.dtype, param_dtype=config.dtype, mesh=mesh, averaged=fusion_class(fusing).merges
            )
        )
        fusion = init_fusion(fusing, experts.unet, len(experts.names), settings.seed)
        sampling = validation_sampling(config, experts)
        data = raise_on_all(lambda: make_training_data(config, split, experts, progress=is_process_0() and not quiet))
        pairs = None
        if config.validation.every:
            pairs = raise_on_all(
                lambda: data.validation_pairs(with_encoders_here(experts, config), config.validation.batch)
            )
    open_workdir(workdir, resume=resume, overwrite=overwrite, cache=config.cache.path)
    keep_config(workdir, config)

    train_step = compiled_together(
        make_train_step(
            fusion,
            data.frozen,
            optimizer,
            experts.schedule,
            caption_dropout=settings.caption_dropout,
            no_caption=data.no_caption,
            min_snr_gamma=settings.min_snr_gamma,
            accumulate=settings.accumulate,
            ema=settings.ema,
            remat=settings.remat,
            vae=shapes_of(experts.vae),
            mesh=mesh,
        )
    )
    facts = dict(experts=experts.record)
    record: dict[str, Any] = facts | dict(
        base=config.base,
        vae=experts.vae_hash,
        schedule=dataclasses.asdict(experts.schedule),
        training=dict(
            steps=settings.steps, batch=settings.batch, arguments=public_arguments(arguments), config=recorded(config)
        ),
    )
    record_text(record, RECORD)  # the final output is tried at the start
    identity = data.identity | dict(vae=experts.vae_hash, schedule=dataclasses.asdict(experts.schedule))

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_record(facts, experts.record, f"the checkpoint in {workdir}")
        check_identity(facts.get("data", {}), identity, f"the checkpoint in {workdir}")
        write_config(workdir, config)

    log_once(
        f"{len(experts.names)} experts ({', '.join(experts.names)}), "
        f"{parameter_count(fusion):,} trainable parameters ({kind_of(fusing)}) at {len(fusion.at)} sites, "
        f"{data.loader.length:,} pictures"
    )
    arrays, like, key = flatten(data.frozen), shapes_of(fusion), jax.random.key(settings.seed)
    bad = BadExamples(workdir / "bad_examples.jsonl", data.length, settings.batch, epoch=data.loader.length)
    state = init_state(fusion, optimizer, average=bool(settings.ema))
    if mesh is not None:
        state, key = place((state, key), mesh, PartitionSpec())

    def step(state: Any, batch: Any, _: Any) -> Any:  # keys come from the positions in the run
        return train_step(state, batch if mesh is None else place_rows(batch, mesh, batch_specs(batch)), arrays, key)

    state = run_loop(
        step,
        state,
        lambda first: data.batches(first, bad),
        steps=settings.steps,
        seed=settings.seed,
        workdir=workdir,
        resume=resume,
        resume_step=resume_step,
        facts=facts | dict(data=identity),
        on_resume=on_resume,
        describe=data.names,
        every=validation(config, experts, fusion, pairs, sampling, workdir),
        writers=settings.writers,
        shares=1 if mesh is None else row_share(mesh)[1],
        log_every=settings.log_every,
        save_every=settings.save_every,
        keep=settings.keep,
        quiet=quiet,
    )

    def publish(folder: Path, state: Any) -> None:
        params = gather_arrays(published(state))
        on_process_0(lambda: save_fusion(folder, unflatten(like, params), record))

    publish(workdir, state)
    with Checkpoints(workdir, settings.keep) as checkpoints:
        best = checkpoints.best()
        if best is not None:
            state = checkpoints.restore(state, best)[1]
            record["training"]["steps"] = best
            publish(workdir / "best", state)
    log_once(workdir)


def check_options(config: ConfigDict) -> None:
    """Raise InputError for numbers and choices that would fail later in the run."""
    check_positive(config.train, "steps", "batch", "accumulate", "log_every", "save_every", "keep")
    train = config.train
    if train.batch % train.accumulate:
        raise InputError(f"train.accumulate={train.accumulate} does not divide train.batch={train.batch}")
    if train.remat not in REMATS:
        raise InputError(f"train.remat={train.remat!r}; choose {', '.join(REMATS)}")
    check_objective(train, "train.")
    check_optimizer(train.optimizer, "train.optimizer")
    check_writers(train.writers)
    loading(config.data)
    if config.cache.path:
        check_cache(config.cache.path, **{name: config.cache[name] for name in ("crops", "shard", "batch")})
    if config.validation.every:
        check_positive(config.validation, "every", "pairs", "buckets", "batch", "num_images")


def configured_mesh(config: ConfigDict, fusion: Any, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Return the mesh that a config asks for (``mesh_of``), or None; check it against the batch and the fusion's kind.

    Raises:
        InputError: the mesh does not fit the batch, the fusion's kind, the devices or the experts.
    """
    mesh = mesh_of(config, devices)
    if mesh is None:
        if is_multiprocess():
            raise InputError("mesh: several processes need one; write mesh=dict(expert=1, data=-1, fsdp=1)")
        return None
    if not fusion_class(fusion).spreads and mesh.shape[EXPERT] * mesh.shape[FSDP] > 1:
        raise InputError(
            f"mesh: fusion.kind={kind_of(fusion)} needs all experts on each device; choose expert=1 and fsdp=1"
        )
    rows, parts = mesh.shape[DATA] * mesh.shape[FSDP], config.train.accumulate
    if config.train.batch % (rows * parts):
        raise InputError(
            f"train.batch={config.train.batch} does not divide by the {rows} devices that share its rows"
            + (f" times train.accumulate={parts}" if parts > 1 else "")
            + f"; choose a multiple of {rows * parts}, or other sizes of mesh"
        )
    return mesh


def configured_fusion(config: ConfigDict) -> Any:
    """Return the fusion that a config trains: its ``fusion``, or else AFA's aggregators with the options in ``sabw``.

    Raises:
        InputError: the kind or an option is unknown, or the kind cannot use a part of the config.
    """
    options = dict(config.get("fusion") or dict(kind="afa"))
    kind = options.pop("kind", None)
    if kind == "afa":
        if options:
            raise InputError(f"fusion.{next(iter(options))}: AFA's options are in sabw; write sabw=dict(...)")
        return fusion_config(kind, dict(config.sabw))
    fusion = fusion_config(str(kind), options)
    if config.train.remat != "none" and not fusion_class(fusion).rematerialises:
        raise InputError(f"train.remat={config.train.remat}: it has no effect with fusion.kind={kind}; choose none")
    if config.cache.path and fusion_class(fusion).merges:
        raise InputError(
            "cache.path: the cache holds the experts' text states, and fusion.kind=mbw trains the text encoder's "
            "weights too; leave it empty"
        )
    return fusion


def validation_sampling(config: ConfigDict, experts: Experts) -> SampleOptions | None:
    """Return the options with which validation samples its prompts; None if it samples none.

    Raises:
        InputError: a prompt or a size cannot be sampled.
    """
    if not config.validation.every or not config.validation.prompts:
        return None
    experts.tokenizer(list(config.validation.prompts))
    sample = config.sample
    sampling = SampleOptions(
        size=tuple(sample.size), steps=sample.steps, guidance=float(sample.guidance), batch=sample.batch
    )
    sampling.check(experts)
    return sampling


def validation(
    config: ConfigDict,
    experts: Experts,
    fusion: Any,
    pairs: Pairs | None,
    sampling: SampleOptions | None,
    workdir: Path,
) -> list[Every]:
    """Return validation as the loop's callback, in a list; an empty list if the config asks for none."""
    options = config.validation
    if pairs is None:
        return []
    measure = Validation(
        workdir,
        experts,
        fusion,
        pairs,
        every=options.every,
        buckets=options.buckets,
        batch=options.batch,
        seed=options.seed,
        prompts=tuple(options.prompts),
        num_images=options.num_images,
        options=sampling,
    )
    return [Every(options.every, lambda state, step: measure(published(state), step))]
