"""Train the aggregators of an ensemble: ``python -m afa_jax.train --config configs/emoji.py --workdir DIR``.

Only the aggregators train; experts, text encoders and VAE stay as they are. Instead of AFA's aggregators it can be a
rival: ``config.fusion`` with the kind gate, router or mbw (afa_jax/fusion/kinds.py). The workdir gets metrics.jsonl,
validation.jsonl and samples/, checkpoints to resume from, and at the end aggregators.safetensors and ensemble.json,
which ``afa_jax.sample`` reads; with validation, the pair of the step with the lowest loss is in best/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from afa_jax import distributed
from afa_jax.commands import Parser, parse, run
from afa_jax.data.bad_examples import BadExamples
from afa_jax.distributed import compiled_together, fetch, first, on_first, say, several, together
from afa_jax.errors import InputError
from afa_jax.experts import Experts, check_record, load_experts, with_encoders_here
from afa_jax.fusion.ensemble import REMATS
from afa_jax.fusion.kinds import REMATERIALISED, SPREAD, Fusion, FusionConfig, fusion_config, init_fusion, kind_of
from afa_jax.fusion.sabw import parameter_count
from afa_jax.generate import SampleOptions
from afa_jax.parallel import DATA, EXPERT, FSDP, mesh_of, place, place_rows, row_share
from afa_jax.training.checkpoints import Checkpoints
from afa_jax.training.data import check_identity, make_training_data
from afa_jax.training.loop import Every, run_loop
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.state import batch_specs, init_state, make_train_step, published
from afa_jax.training.stopping import nothing_to_save
from afa_jax.training.validation import Pairs, Validation
from afa_jax.training.workdir import (
    add_workdir_arguments,
    check_positive,
    check_workdir,
    keep_config,
    open_workdir,
    resume_if_any,
    write_config,
)
from afa_jax.training.writers import check_writers
from afa_jax.weights.aggregators import save_fusion
from afa_jax.weights.keys import flatten, shapes_of, unflatten


def main(arguments: Sequence[str]) -> None:
    """Train from a config into a workdir."""
    parser = Parser(prog="python -m afa_jax.train", description=__doc__)
    add_workdir_arguments(parser)
    distributed.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options, config = parse(parser, arguments)
    train, workdir = config.train, options.workdir
    distributed.start(options)
    resume_if_any(options)

    # Everything that can be wrong with the input is found before the workdir is touched.
    check_options(config)
    fusing = configured_fusion(config)
    check_workdir(workdir, resume=options.resume, overwrite=options.overwrite)
    with nothing_to_save():
        mesh = configured_mesh(config, fusing)
        experts = together(lambda: load_experts(config, dtype=config.dtype, param_dtype=config.dtype, mesh=mesh))
        fusion = init_fusion(fusing, experts.unet, len(experts.names), train.seed)
        sampling = validation_sampling(config, experts)
        data = together(lambda: make_training_data(config, experts, progress=first() and not options.quiet))
        pairs = None
        if config.validation.every:
            pairs = together(lambda: data.validation_pairs(with_encoders_here(experts, config), config.validation))
    optimizer = make_optimizer(train.optimizer, train.steps)
    open_workdir(workdir, resume=options.resume, overwrite=options.overwrite)
    keep_config(workdir, config)

    train_step = compiled_together(
        make_train_step(
            fusion,
            data.frozen,
            optimizer,
            experts.schedule,
            caption_dropout=train.caption_dropout,
            no_caption=data.no_caption,
            min_snr_gamma=train.min_snr_gamma,
            accumulate=train.accumulate,
            ema=train.ema,
            remat=train.remat,
            vae=shapes_of(experts.vae),
            mesh=mesh,
        )
    )
    record: dict[str, Any] = dict(experts=experts.record)
    identity = data.identity | dict(vae=experts.vae_hash, schedule=dataclasses.asdict(experts.schedule))

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_record(facts, experts.record, f"the checkpoint in {workdir}")
        check_identity(facts.get("data", {}), identity, f"the checkpoint in {workdir}")
        write_config(workdir, config)

    say(
        f"{len(experts.names)} experts ({', '.join(experts.names)}), "
        f"{parameter_count(fusion):,} trainable parameters ({kind_of(fusing)}) at {len(fusion.at)} sites, "
        f"{data.loader.length:,} pictures"
    )
    arrays, like, key = flatten(data.frozen), shapes_of(fusion), jax.random.key(train.seed)
    bad = BadExamples(workdir / "bad_examples.jsonl", data.length, train.batch, epoch=data.loader.length)
    state = init_state(fusion, optimizer, average=bool(train.ema))
    if mesh is not None:
        state, key = place((state, key), mesh, PartitionSpec())

    def step(state: Any, batch: Any, _: Any) -> Any:  # a step's keys come from its positions
        return train_step(state, batch if mesh is None else place_rows(batch, mesh, batch_specs(batch)), arrays, key)

    state = run_loop(
        step,
        state,
        lambda first: data.batches(first, bad),
        steps=train.steps,
        seed=train.seed,
        workdir=workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        facts=record | dict(data=identity),
        on_resume=on_resume,
        describe=data.names,
        every=validation(config, experts, fusion, pairs, sampling, workdir),
        writers=train.writers,
        shares=1 if mesh is None else row_share(mesh)[1],
        log_every=train.log_every,
        save_every=train.save_every,
        keep=train.keep,
        quiet=options.quiet,
    )
    record |= dict(
        base=config.base,
        schedule=dataclasses.asdict(experts.schedule),
        training=dict(
            steps=train.steps, batch=train.batch, arguments=options.config_arguments, config=config.to_dict()
        ),
    )

    def publish(folder: Path, state: Any) -> None:
        params = fetch(published(state))
        on_first(lambda: save_fusion(folder, unflatten(like, params), record))

    publish(workdir, state)
    with Checkpoints(workdir, train.keep) as checkpoints:
        best = checkpoints.best()
        if best is not None:
            state = checkpoints.restore(state, best)[1]
            record["training"]["steps"] = best
            publish(workdir / "best", state)
    say(workdir)


def check_options(config: ConfigDict) -> None:
    """Raise InputError for numbers and choices that a run would stumble over later."""
    check_positive(config.train, "steps", "batch", "accumulate", "log_every", "save_every", "keep")
    train = config.train
    if train.batch % train.accumulate:
        raise InputError(f"train.accumulate={train.accumulate} does not divide train.batch={train.batch}")
    if train.remat not in REMATS:
        raise InputError(f"train.remat={train.remat!r}; choose {', '.join(REMATS)}")
    if not 0 <= train.ema < 1:
        raise InputError(f"train.ema={train.ema}; choose 0 (none) or a decay below 1")
    if not 0 <= train.caption_dropout <= 1:
        raise InputError(f"train.caption_dropout={train.caption_dropout}; choose a probability")
    for name, value in dict(min_snr_gamma=train.min_snr_gamma, clip=train.optimizer.clip).items():
        if value < 0:
            raise InputError(f"train.{name}={value}; choose 0 (none) or more")
    if train.seed < 0:
        raise InputError(f"train.seed={train.seed}; choose 0 or more")
    check_writers(train.writers)
    if config.validation.every:
        check_positive(config.validation, "every", "pairs", "buckets", "batch", "num_images")


def configured_mesh(config: ConfigDict, fusion: FusionConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that a config asks for (``mesh_of``), if it fits the batch and the kind of the fusion.

    Raises:
        InputError: it does not, or not the devices or the experts.
    """
    mesh = mesh_of(config, devices)
    if mesh is None:
        if several():
            raise InputError("mesh: several processes need one; write mesh=dict(expert=1, data=-1, fsdp=1)")
        return None
    if kind_of(fusion) not in SPREAD and mesh.shape[EXPERT] * mesh.shape[FSDP] > 1:
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


def configured_fusion(config: ConfigDict) -> FusionConfig:
    """What a config trains: its ``fusion``; without one, AFA's aggregators, whose options are in ``sabw``.

    Raises:
        InputError: an unknown kind or option, or a part of the config that the kind has no use for.
    """
    options = dict(config.get("fusion") or dict(kind="afa"))
    kind = options.pop("kind", None)
    if kind == "afa":
        if options:
            raise InputError(f"fusion.{next(iter(options))}: AFA's options are in sabw; write sabw=dict(...)")
        return fusion_config(kind, dict(config.sabw))
    fusion = fusion_config(str(kind), options)
    if config.train.remat != "none" and kind not in REMATERIALISED:
        raise InputError(f"train.remat={config.train.remat}: it has no effect with fusion.kind={kind}; choose none")
    if config.cache.path and kind == "mbw":
        raise InputError(
            "cache.path: the cache holds the experts' text states, and fusion.kind=mbw trains the text encoder's "
            "weights too; leave it empty"
        )
    return fusion


def validation_sampling(config: ConfigDict, experts: Experts) -> SampleOptions | None:
    """How validation samples its prompts; None without any.

    Raises:
        InputError: a prompt or a size that cannot be sampled.
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
    fusion: Fusion,
    pairs: Pairs | None,
    sampling: SampleOptions | None,
    workdir: Path,
) -> list[Every]:
    """Validation as the loop's callback; none if the config asks for none."""
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


if __name__ == "__main__":
    raise SystemExit(run(main))
