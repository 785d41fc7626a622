"""Experts merged into one ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record, find_checkpoints, mismatches, record_of
from afa_jax.experts.sources import bake, parse_base
from afa_jax.exporting.written import check_out, identity, write
from afa_jax.fusion.pair_record import aggregators_hash, read_record
from afa_jax.logs import LOGGER
from afa_jax.names import DISTILLED, LEARNED
from afa_jax.weights.checkpoint import Checkpoint, MemoryCheckpoint, rounded
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.formats.hub import fetch_run
from afa_jax.weights.merging.combine import BASES, COMPONENTS, check_parts, compose, with_base
from afa_jax.weights.merging.merge import merge, needs_base
from afa_jax.weights.opened import open_checkpoint


class MergedModel(NamedTuple):
    """A merge that is not written yet.

    Attributes:
        checkpoint: the merged model; its weights are computed when they are read.
        recipe: the record of its making.
        what: a line that describes it.
    """

    checkpoint: Checkpoint
    recipe: dict[str, Any]
    what: str

    def write(self, out: Path, *, overwrite: bool = False) -> None:
        """Write the merge and log what was written; raise InputError if it cannot be written."""
        check_out(out, overwrite)
        LOGGER.info(self.what)
        write(out, self.checkpoint, self.recipe, overwrite=overwrite)


def merge_experts(config: ConfigDict, method: Mapping[str, Any], *, dtype: str | None = None) -> MergedModel:
    """Merge a config's experts.

    Args:
        method: the kind of merge and its options, as ``parse_method`` gives them.
        dtype: the dtype of the weights; None keeps the stored one.

    Raises:
        InputError: the experts cannot be merged in this way.
    """
    options = dict(method)
    kind = options.pop("kind")
    if kind == DISTILLED:
        return baked_model(options, dtype=dtype)
    base, checkpoints = find_checkpoints(config)
    run_of = None
    if kind == LEARNED:
        kind, options, run_of = "mbw", *learned(options, checkpoints)
    if needs_base(kind, options):
        base = parse_base(config.base).open(COMPONENTS)  # the U-Net of a model on the hub is downloaded only here
    for mismatch in mismatches(base, checkpoints):
        raise InputError(mismatch.message)
    # Weights that change their dtype are rounded once, after the merge.
    exact = {name: rounded(own, "float32") if dtype else own for name, own in checkpoints.items()}
    whole = with_base(merge(kind, exact, base, options), base)
    check_parts(whole)
    shared = ", ".join(part for part in BASES if part in base.components)
    recipe: dict[str, Any] = dict(made="merge", kind=kind, options=options)
    recipe |= recorded_sources(config, base, checkpoints, needs_base(kind, options))
    recipe |= {} if run_of is None else dict(aggregators_sha256=aggregators_hash(run_of))
    return MergedModel(bake(whole, (), dtype), recipe, f"{kind} of {', '.join(checkpoints)}; the base's {shared}")


def baked_model(options: Mapping[str, Any], *, dtype: str | None = None) -> MergedModel:
    """Return a distilled model with one guidance scale and style baked in, which needs no further input.

    Args:
        options: ``workdir`` of a run of afa_jax.distil, ``guidance`` and ``style``, the weights of styles by name.

    Raises:
        InputError: there is no such run, it has no further inputs, or it has not learnt these.
    """
    from afa_jax.methods import distilled  # which needs JAX, as no other merge does
    from afa_jax.trees import take
    from afa_jax.weights.load import load_unets

    workdir, guidance = options.get("workdir"), options.get("guidance")
    if workdir is None:
        raise InputError(f"{DISTILLED}: name the run, workdir=RUN")
    folder = fetch_run(str(workdir))
    stored = distilled.read_distilled(folder)
    config = distilled.steering_of(stored, folder)
    if config is None:
        raise InputError(
            f"{DISTILLED}: {folder} has neither guidance nor styles as inputs; take {folder}/model as it is"
        )
    if (config.guidance is None) != (guidance is None):
        has = "is none of its inputs; leave it out" if config.guidance is None else "is missing; write guidance=SCALE"
        raise InputError(f"{DISTILLED}: guidance {has}")
    if config.guidance is not None and not config.guidance[0] <= float(guidance or 0) <= config.guidance[1]:
        low, high = config.guidance
        raise InputError(f"{DISTILLED}: guidance={guidance:g}; choose {low:g} to {high:g}, which it has learnt")
    style = distilled.style_weights(options.get("style"), config.styles)
    opened = open_checkpoint(folder / distilled.MODEL)
    unets, steering = distilled.load_steered(folder, config, load_unets([opened]))
    unet = distilled.baked(take(unets, 0), steering, guidance, style)
    stored_dtype = next(iter(opened.tensors("unet").values())).dtype
    whole = compose(opened, unet=rounded(MemoryCheckpoint.of(unet=unet), dtype or stored_dtype))
    recipe = dict(made=DISTILLED, guidance=guidance, style=options.get("style"), input=identity(str(folder), opened))
    said = [f"guidance {guidance:g}"] if guidance is not None else []
    said += [
        f"{name} {share:.2g}" for name, share in zip(config.styles, style if style is not None else (), strict=True)
    ]
    return MergedModel(bake(whole, (), dtype), recipe, f"{folder} with {', '.join(said)} baked in")


def learned(method: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint]) -> tuple[dict[str, Any], Path]:
    """Turn the options of ``learned_mbw`` into those of the merge mbw; return them and the folder of the run.

    Raises:
        InputError: no run is named, or the run did not train block weights of these experts.
    """
    options = dict(method)
    workdir = options.pop("workdir", None)
    if workdir is None:
        raise InputError(f"{LEARNED}: name the run, workdir=RUN")
    if "weights" in options:
        raise InputError(f"{LEARNED}: the weights are the run's; leave weights out, or choose mbw")
    folder = fetch_run(str(workdir))
    check_record(read_record(folder), record_of(checkpoints), str(folder))
    from afa_jax.fusion.files import load_block_weights  # imported here: no other merge needs JAX

    return options | dict(weights=load_block_weights(folder, checkpoints)), folder


def recorded_sources(
    config: ConfigDict, base: Checkpoint, checkpoints: Mapping[str, Checkpoint], based: bool
) -> dict[str, Any]:
    """Return the sources of a merge for its recipe: the experts' entries and hashes, and the base's parts used."""
    entries = {entry["name"]: dict(entry) for entry in config.experts}
    own = [
        dict(name=name, entry=entries[name], input=identity(entries[name]["path"], checkpoint, EXPERT_COMPONENTS))
        for name, checkpoint in checkpoints.items()
    ]
    return dict(
        experts=own,
        base=identity(parse_base(config.base).path, base, ("vae", *EXPERT_COMPONENTS) if based else ("vae",)),
    )
