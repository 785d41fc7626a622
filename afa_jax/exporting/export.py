"""Exports of an ensemble: its trained pair, a static approximation, or one expert with its LoRAs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.held_out import choose_pairs, unseen
from afa_jax.data.loader import loading
from afa_jax.data.sources import PictureSource, make_source
from afa_jax.data.split import hold_out
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record, find_checkpoints, mismatches
from afa_jax.experts.frozen import Experts, load_experts
from afa_jax.experts.sources import bake
from afa_jax.exporting.outputs import Wanted
from afa_jax.exporting.pair import Publication, check_pair, export_pair
from afa_jax.exporting.snapshot import Predictions, block_weights, predictions
from afa_jax.exporting.written import check_out, identity, write
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.files import load_aggregators
from afa_jax.fusion.pair_record import aggregators_hash, read_record
from afa_jax.fusion.single import SingleExpert
from afa_jax.logs import LOGGER
from afa_jax.report.checkpoints import log_table
from afa_jax.trees import stack
from afa_jax.weights.checkpoint import Checkpoint
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.formats.hub import fetch_run
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.merging.combine import BASES, average, check_parts, with_base
from afa_jax.weights.opened import check_networks

NOTE = (
    "A static approximation of an ensemble: each block of weights is the average of the experts' with fixed weights, "
    "where the ensemble chooses anew for every pixel, timestep and prompt."
)


def export(config: ConfigDict, options: Wanted) -> None:
    """Write the wanted exports.

    Raises:
        InputError: the experts do not fit the run or one another, or an output cannot be written.
    """
    publication = Publication(
        licence=options.license,
        report=options.report,
        pictures=options.picture,
        with_config=options.with_config,
    )
    if options.pair:
        check_pair(options.pair, publication, options.overwrite)
    for out in (options.snapshot, options.bake and options.bake[1]):
        if out:
            check_out(out, options.overwrite)
    base, checkpoints = find_checkpoints(config)
    for mismatch in mismatches(base, checkpoints):
        raise InputError(mismatch.message)
    if options.bake and options.bake[0] not in checkpoints:
        raise InputError(f"no expert {options.bake[0]!r}; there are {', '.join(checkpoints)}")

    if options.pair:
        assert options.workdir is not None
        run, out = fetch_run(options.workdir), Path(os.path.realpath(options.pair))
        export_pair(run, out, config, base, checkpoints, publication, overwrite=options.overwrite)
    if options.bake:
        name, out = options.bake
        expert = with_base(checkpoints[name], base)
        check_networks(expert)
        check_parts(expert)
        LOGGER.info(f"{', '.join(part for part in BASES if part in base.components)}: the base's")
        entry = next(dict(entry) for entry in config.experts if entry["name"] == name)
        recipe = dict(
            made="expert", name=name, entry=entry, input=identity(entry["path"], checkpoints[name], EXPERT_COMPONENTS)
        )
        write(out, bake(expert, (), options.dtype), recipe, overwrite=options.overwrite)
    if options.snapshot:
        assert options.workdir is not None
        export_snapshot(fetch_run(options.workdir), base, checkpoints, config, options)


def export_snapshot(
    run: Path, base: Checkpoint, checkpoints: Mapping[str, Checkpoint], config: ConfigDict, options: Wanted
) -> None:
    """Measure the router, average the experts, measure the average's loss of quality, and write it."""
    source, held_out = router_pairs(config)
    pixels, captions = choose_pairs(source, loading(config.data)["crop"], options.pairs, options.seed)
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype, averaged=True)
    check_record(read_record(run), experts.record, str(run))
    ensemble = FusedUNets(experts=experts.unet, aggregators=load_aggregators(run, experts.unet, len(experts.names)))
    experts.check_size(pixels.shape[1:3])
    half, how = options.pairs // 2, dict(draws=options.draws, batch=min(options.pairs // 2, config.sample.batch))
    routed = predictions(ensemble, experts, pixels[:half], captions[:half], **how).weights
    assert routed is not None
    stages = [stage.name for stage in experts.unet.stages]
    fused = [stages[index] for index in ensemble.aggregators.at]
    sites = dict(zip(fused, routed.mean((0, 1), dtype=np.float64), strict=True))

    rest = (pixels[half:], captions[half:])
    measured = {"ensemble": predictions(ensemble, experts, *rest, **how)}
    for index, name in enumerate(experts.names):
        measured[f"expert {name}"] = predictions(SingleExpert(experts=experts.unet, index=index), experts, *rest, **how)
    # Only the parts that all experts share stay in memory.
    stacks = ("unet", "text_encoder")
    shared = {f.name: getattr(experts, f.name) for f in dataclasses.fields(experts) if f.name not in stacks}
    record = experts.record
    del experts, ensemble

    count = len(checkpoints)
    blocks = {
        "uniform average": dict.fromkeys([*stages, "time_embedding", "text_encoder"], [1 / count] * count),
        "snapshot": block_weights(sites, stages),
    }
    for name, weights in blocks.items():
        merged = bake(average(list(checkpoints.values()), weights), (), options.dtype)
        measured[name] = predict_alone(merged, shared, *rest, dtype=config.dtype, **how)
    figures = report(measured, held_out)
    snapshot = average(list(checkpoints.values()), blocks["snapshot"])
    recipe = dict(
        made="snapshot",
        note=NOTE,
        aggregators_sha256=aggregators_hash(run),
        experts=record,
        weights={site: [round(float(weight), 6) for weight in weights] for site, weights in sites.items()},
        measured=dict(held_out=held_out, pairs=len(rest[1]), draws=options.draws, seed=options.seed, **figures),
    )
    assert options.snapshot is not None
    write(options.snapshot, bake(with_base(snapshot, base), (), options.dtype), recipe, overwrite=options.overwrite)


def predict_alone(
    checkpoint: Checkpoint,
    shared: Mapping[str, Any],
    pixels: np.ndarray,
    captions: Sequence[str],
    *,
    dtype: Any,
    **how: Any,
) -> Predictions:
    """Return the predictions of one model with its own text encoder, as an ensemble of one."""
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)
    unet, text_encoder = load_unet(checkpoint, **kwargs), load_text_encoder(checkpoint, **kwargs)
    alone = Experts(**shared, unet=stack([unet]), text_encoder=stack([text_encoder]))
    return predictions(SingleExpert(experts=alone.unet, index=0), alone, pixels, captions, **how)


def router_pairs(config: ConfigDict) -> tuple[PictureSource, bool]:
    """Return the examples to measure on, and whether they are new to the router, not trained on.

    With validation they are its examples: ``validation.data``, or those held out of the training data. Without it they
    are emoji scenes of an unseen seed; for any other data, the training data itself.
    """
    validation = config.get("validation", ConfigDict())
    if validation.get("data"):
        return make_source(validation.data), True
    source = make_source(config.data)
    if validation.get("every"):
        return hold_out(source, validation.pairs, validation.seed)[1], True
    return unseen(source), unseen(source) is not source


def report(measured: Mapping[str, Predictions], held_out: bool) -> dict[str, Any]:
    """Log and return noise MSE and distance to the ensemble, by method; of the experts, the best one by its MSE."""
    singles = [name for name in measured if name.startswith("expert ")]
    best = min(singles, key=lambda name: measured[name].mse)
    ensemble = measured["ensemble"]
    mse = {name: measured[name].mse for name in ("ensemble", "snapshot", "uniform average", best)}
    distance = {name: measured[name].distance(ensemble) for name in mse if name != "ensemble"}
    pairs = "held-out pairs" if held_out else "pairs of the training data (nothing was held out)"
    LOGGER.info(f"on {pairs}: the noise MSE, and the distance to the ensemble")
    LOGGER.info("(MSE between the two predictions of the noise, relative to the power of the ensemble's)")
    rows = [[name, f"{mse[name]:.5f}", f"{distance[name]:.5f}" if name in distance else ""] for name in mse]
    log_table([["", "noise MSE", "distance"], *rows], (24, 12, 12))
    return dict(noise_mse=mse, distance_to_ensemble=distance, best_expert=best.removeprefix("expert "))
