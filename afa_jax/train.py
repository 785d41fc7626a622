"""Train the aggregators of an ensemble: ``python -m afa_jax.train --config configs/emoji.py --workdir DIR``.

Only the aggregators train; experts, text encoders and VAE stay as they are. The workdir gets metrics.jsonl, checkpoints
to resume from, and at the end aggregators.safetensors and ensemble.json, which ``afa_jax.sample`` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from afa_jax.commands import Parser, parse, run
from afa_jax.data.bad_examples import BadExamples
from afa_jax.data.loader import Batch, loading, make_loader
from afa_jax.data.sources import make_source
from afa_jax.experts import check_record, frozen, load_experts
from afa_jax.fusion.sabw import SABWConfig, parameter_count
from afa_jax.training.loop import run_loop
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.state import init_aggregators, init_state, make_train_step
from afa_jax.training.workdir import check_positive, open_workdir, write_config
from afa_jax.weights.aggregators import save_aggregators
from afa_jax.weights.keys import flatten, shapes_of, unflatten


def main(arguments: Sequence[str]) -> None:
    """Train from a config into a workdir."""
    parser = Parser(prog="python -m afa_jax.train", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="continue the run in the workdir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the workdir")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options, config = parse(parser, arguments)

    # Everything that can be wrong with the input is found before the workdir is touched.
    check_positive(config.train, "steps", "batch", "log_every", "save_every")
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    source = make_source(config.data)
    loader = make_loader(
        source, experts.tokenizer, batch=config.train.batch, seed=config.train.seed, **loading(config.data)
    )
    experts.check_size(loader.at(0)["image"].shape[1:3])
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    aggregators = init_aggregators(SABWConfig(**config.sabw), experts.unet, len(experts.names), config.train.seed)
    open_workdir(options.workdir, resume=options.resume, overwrite=options.overwrite)
    if not options.resume:
        write_config(options.workdir, config)

    bad = BadExamples(options.workdir / "bad_examples.jsonl", len(source), config.train.batch)

    def batch_at(step: int) -> Batch:
        batch = loader.at(step)
        if summary := bad.take(step, batch):
            print(summary)
        return batch

    parts = frozen(experts)
    train_step = make_train_step(
        aggregators,
        parts,
        optimizer,
        experts.schedule,
        caption_dropout=config.train.caption_dropout,
        no_caption=jnp.asarray(experts.tokenizer([""])[0]),
        min_snr_gamma=config.train.min_snr_gamma,
    )
    record: dict[str, Any] = dict(experts=experts.record)

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_record(facts, experts, f"the checkpoint in {options.workdir}")
        write_config(options.workdir, config)

    print(
        f"{len(experts.names)} experts ({', '.join(experts.names)}), "
        f"{parameter_count(aggregators):,} trainable parameters at {len(aggregators.at)} sites, "
        f"{len(source):,} pictures"
    )
    arrays, like = flatten(parts), shapes_of(aggregators)
    state = run_loop(
        lambda state, batch, key: train_step(state, batch, arrays, key),
        init_state(aggregators, optimizer),
        batch_at,
        steps=config.train.steps,
        seed=config.train.seed,
        workdir=options.workdir,
        resume=options.resume,
        facts=record,
        on_resume=on_resume,
        log_every=config.train.log_every,
        save_every=config.train.save_every,
        quiet=options.quiet,
    )
    record |= dict(
        base=config.base,
        schedule=dataclasses.asdict(experts.schedule),
        training=dict(steps=config.train.steps, batch=config.train.batch, config=config.to_dict()),
    )
    save_aggregators(options.workdir, unflatten(like, state["params"]), record)
    print(options.workdir)


if __name__ == "__main__":
    raise SystemExit(run(main))
