"""The published form of a trained pair: its two files, a model card, pictures, and optionally a config."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.pictures import read_png, read_recipe, save_png
from afa_jax.errors import InputError
from afa_jax.experts.checks import check_record, record_of
from afa_jax.exporting.model_card import Losses, figures_of, model_card, part_of
from afa_jax.exporting.pair_config import pair_config
from afa_jax.files import (
    check_new,
    partial_output,
    remove_leftovers,
    replace_bytes,
    replace_folder,
    replace_text,
    writing,
)
from afa_jax.fusion.files import check_aggregators, recorded_fusion
from afa_jax.fusion.pair_record import RECORD, WEIGHTS, aggregators_hash, read_record
from afa_jax.fusion.registry import kind_of
from afa_jax.logs import LOGGER
from afa_jax.records import public_arguments, record_text
from afa_jax.training.validation import read_validation
from afa_jax.weights.checkpoint import Checkpoint, hash_components

CARD, CONFIG, SAMPLES = "README.md", "config.py", "samples.png"
_OURS = re.compile(rf"{re.escape(WEIGHTS)}|{re.escape(RECORD)}|{CARD}|{CONFIG}|{SAMPLES}|picture_\d\d\.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """The options of what is published beside the pair's two files.

    Attributes:
        licence: the fusion's licence, as the hub spells it; None is written as unknown.
        report: a comparison's report.json that this run was part of.
        pictures: PNGs of ``afa_jax.sample``; without any, the run's own samples.
        with_config: whether to write config.py.
    """

    licence: str | None = None
    report: Path | None = None
    pictures: Sequence[Path] = ()
    with_config: bool = False


def check_pair(out: Path, publication: Publication, overwrite: bool) -> None:
    """Raise InputError for a folder that cannot be written, or for missing inputs of its files."""
    check_new(out, overwrite)
    if out.exists() and not out.is_dir():
        raise InputError(f"--pair {out} is a file; choose another name")
    if out.exists() and any(not _OURS.fullmatch(path.name) for path in out.iterdir()):
        raise InputError(f"--pair {out}: there is something else in it; choose another folder")
    if len(publication.pictures) > 100:
        raise InputError(f"--picture: {len(publication.pictures)} of them; choose 100 or fewer")
    for picture in publication.pictures:
        _prompt_of(picture)


def export_pair(
    run: Path,
    out: Path,
    config: ConfigDict,
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    publication: Publication,
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder of a pair, whole or not at all.

    Args:
        run: a folder with the pair, such as a workdir or its ``best``.
        config: the run's config, with local paths; none of them is written into the folder.
        base, checkpoints: the models that the config names.

    Raises:
        InputError: the run has no pair, its files do not belong together or to these experts, or a figure or picture
            is missing.
    """
    record, experts = read_record(run), record_of(checkpoints)
    check_record(record, experts, str(run))
    check_aggregators(run)
    sha256, kind = aggregators_hash(run), kind_of(recorded_fusion(run))
    training = record.get("training") or {}
    if "arguments" in training:
        record["training"] = training | dict(arguments=public_arguments(training["arguments"] or []))
    prompts = _prompts(training)
    samples = _samples(run, training.get("steps"))
    shown = {SAMPLES: f"Rows: {'; '.join(prompts)}" if prompts else "Samples of the run"} if samples else {}
    if publication.pictures:
        shown = {f"picture_{i:02d}.png": _prompt_of(path) for i, path in enumerate(publication.pictures)}
    entries = {entry["name"]: entry for entry in config.experts}
    text, wanted = pair_config(config, record) if publication.with_config else ("", None)
    card = model_card(
        record,
        kind,
        part_of("base", config.base, hash_components(base, ("vae",))),
        [part_of(own["name"], entries[own["name"]], own["sha256"]) for own in experts],
        folder=out.name,
        licence=publication.licence,
        losses=_losses(run, training.get("steps")),
        figures=figures_of(publication.report, sha256) if publication.report else None,
        samples=shown,
        prompt=next((text for text in (*shown.values(), *prompts) if text and not text.startswith("Rows:")), ""),
        config=wanted,
    )
    files = {RECORD: record_text(record, RECORD), CARD: card}
    if publication.with_config:
        files[CONFIG] = text
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with partial_output(out) as partial:
            partial.mkdir()
            replace_bytes(partial / WEIGHTS, (run / WEIGHTS).read_bytes())
            for name, text in files.items():
                replace_text(partial / name, text)
            for name, path in zip(shown, publication.pictures or filter(None, [samples]), strict=True):
                save_png(partial / name, read_png(path), _recipe_of(path))
            replace_folder(out, partial, overwrite)
    LOGGER.info(f"wrote {out}: {WEIGHTS} (sha256 {sha256}), {', '.join([*files, *shown])}")
    if publication.licence is None:
        LOGGER.info(f"{CARD}: fill in the licence before you publish it, or give --license")


def _whole_run(run: Path) -> Path:
    """Return the workdir of a pair: the best one's is a folder above it."""
    return run.parent if run.name == "best" and (run.parent / "metrics.jsonl").is_file() else run


def _prompts(training: Mapping[str, Any]) -> list[str]:
    """Return the prompts that validation sampled, a row of the grid each."""
    config = training.get("config") or {}
    validation = config.get("validation")
    prompts = validation.get("prompts") if isinstance(validation, Mapping) else None
    return [prompt for prompt in prompts if isinstance(prompt, str)] if isinstance(prompts, list) else []


def _samples(run: Path, step: int | None) -> Path | None:
    """Return the grid that a run sampled at this step, or last."""
    there = sorted((_whole_run(run) / "samples").glob("step_*.png"))
    own = [path for path in there if path.stem == f"step_{step or 0:08d}"]
    return next(iter([*own, *reversed(there)]), None)


def _losses(run: Path, step: int | None) -> Losses | None:
    """Return the validation loss at this step and the lowest one, of a run that validated."""
    losses = {line["step"]: float(np.mean([*line["loss"].values()])) for line in read_validation(_whole_run(run))}
    if not losses:
        return None
    best = min(losses, key=lambda step: losses[step])
    return Losses(losses.get(step or -1), losses[best], best)


def _recipe_of(path: Path) -> dict[str, Any]:
    """Return the recipe in a picture of ours; raise InputError for another file."""
    try:
        return read_recipe(path)
    except InputError as error:
        raise InputError(f"--picture {path}: no picture that can be read; name one that afa_jax.sample made") from error


def _prompt_of(path: Path) -> str:
    """Return a picture's description: its prompt, or its name."""
    prompt = _recipe_of(path).get("prompt")
    return prompt if isinstance(prompt, str) and prompt.strip() else os.path.splitext(path.name)[0]
