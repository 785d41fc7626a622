"""Whether experts can be fused, and whether routing between them can be learnt, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from afa_jax.data.held_out import choose_pairs, unseen
from afa_jax.data.loader import loading
from afa_jax.data.sources import make_source
from afa_jax.errors import InputError
from afa_jax.evaluation.screen import WORTH_TRAINING, RoutingGain, route, routing_gain, worth_training
from afa_jax.evaluation.screen_report import log_gain, log_mismatches, log_weights, record
from afa_jax.experts.checks import Mismatch, find_checkpoints, mismatches
from afa_jax.experts.frozen import load_experts
from afa_jax.files import check_file, replace_text
from afa_jax.names import FEWEST_PAIRS
from afa_jax.progress import progress
from afa_jax.records import public_sentence, recorded
from afa_jax.training.noise_error import expert_errors
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS, Difference, compare_experts

BUCKETS = 10  # ranges of timesteps
Pairs = Mapping[tuple[str, str], Difference]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screening:
    """The results of a screen.

    Attributes:
        experts: the experts' names and hashes.
        mismatches: the reasons why experts cannot be fused; empty if they can.
        weights: the difference between each two experts' weights; empty if their architectures differ.
        gain: the routing gain; None if the answer is clear without it.
        answer: whether training is worth it: "yes", "no" or "undecided".
        verdict: the answer as a sentence.
        pairs, draws, seed: the settings of the measurement.
    """

    experts: list[dict[str, str]]
    mismatches: list[Mismatch]
    weights: Pairs
    gain: RoutingGain | None
    answer: str
    verdict: str
    pairs: int
    draws: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON data."""
        return dict(
            pairs=self.pairs,
            draws=self.draws,
            seed=self.seed,
            experts=self.experts,
            mismatches=[misfit._asdict() | dict(message=public_sentence(misfit.message)) for misfit in self.mismatches],
            weights=[
                dict(experts=pair, kind=found.kind, total=found.total) | dict(blocks=found.blocks)
                for pair, found in self.weights.items()
            ],
            routing=None if self.gain is None else record([expert["name"] for expert in self.experts], self.gain),
            answer=self.answer,
            verdict=public_sentence(str(self.verdict)),
        )


def screen(config: ConfigDict, *, pairs: int = 64, draws: int = 4, seed: int = 0, out: Path | None = None) -> Screening:
    """Screen the experts of a config.

    Args:
        pairs: the number of held-out pictures with captions.
        draws: the number of noise draws for each pair and timestep.
        seed: the seed of pairs, timesteps, noise and intervals.
        out: a new JSON file for all figures.

    Raises:
        InputError: experts or data cannot be used, or ``out`` exists.
    """
    if out is not None:
        check_file(out)
        recorded(config)  # raises if the config cannot be written as JSON
    if pairs < FEWEST_PAIRS or draws < 2:
        raise InputError(f"pairs={pairs}, draws={draws}; choose {FEWEST_PAIRS} or more pairs, and 2 or more draws")
    # Checks that need no model come before those that load all of them.
    examples = choose_pairs(unseen(make_source(config.data)), loading(config.data)["crop"], pairs, seed)
    base, checkpoints = find_checkpoints(config)
    if len(checkpoints) < 2:
        raise InputError(f"{next(iter(checkpoints))!r} is the only expert; routing needs two or more")

    misfits = list(mismatches(base, checkpoints))
    comparable = not any(misfit.what in ("architecture", "text encoder") for misfit in misfits)
    hashes = {name: hash_components(checkpoint, EXPERT_COMPONENTS) for name, checkpoint in checkpoints.items()}
    compared = dict(compare_experts(checkpoints)) if comparable else {}
    log_mismatches(list(checkpoints), misfits)
    if compared:
        log_weights(compared)
    refusal = refuse(misfits, compared)
    gain = None
    if refusal is None:
        gain = measure(config, examples, draws, seed)
        log_gain(list(checkpoints), gain, f"on {pairs} held-out pairs, {draws} draws of noise each")
    answer, verdict = ("no", refusal) if gain is None else judge(gain, pairs)
    found = Screening(
        experts=[dict(name=name, sha256=sha) for name, sha in hashes.items()],
        mismatches=misfits,
        weights=compared,
        gain=gain,
        answer=answer,
        verdict=str(verdict),
        pairs=pairs,
        draws=draws,
        seed=seed,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, json.dumps(dict(config=recorded(config)) | found.to_json(), indent=2) + "\n")
    return found


def measure(config: ConfigDict, examples: tuple[np.ndarray, list[str]], draws: int, seed: int) -> RoutingGain:
    """Measure the routing gain of a config's experts on held-out pictures and their captions.

    Raises:
        InputError: experts cannot be used, or an expert's predictions are not finite.
    """
    (pixels, captions), count = examples, len(examples[1])
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    experts.check_size(pixels.shape[1:3])
    parts = []
    with progress(total=count, unit="pair") as bar:
        batch = min(count, config.sample.batch)
        for errors in expert_errors(experts, pixels, captions, buckets=BUCKETS, draws=draws, seed=seed, batch=batch):
            for name, own in zip(experts.names, errors, strict=True):
                if not np.isfinite(own).all():
                    raise InputError(f"expert {name!r} predicts NaN or infinity; try --config.dtype=float32")
            parts.append(route(errors))
            bar.update(errors.shape[1])
    return routing_gain(parts, seed=seed)


def refuse(misfits: Sequence[Mismatch], pairs: Pairs) -> str | None:
    """Return the verdict if no measurement is needed, because experts do not fit or two are alike; else None."""
    if misfits:
        return f"not worth training: {misfits[0].message}"
    for (one, other), found in pairs.items():
        if found.kind == "identical":
            return f"not worth training: experts {one!r} and {other!r} have the same weights; leave one out"
        if found.kind != "different":
            apart = f"weights differ by {found.total:.1e} in all"
            return f"not worth training: experts {one!r} and {other!r} are {found.kind} ({apart}); leave one out"
    return None


def judge(gain: RoutingGain, pairs: int) -> tuple[str, str]:
    """Return the answer and the verdict for a measured gain."""
    answer, line = worth_training(gain.total), f"{100 * WORTH_TRAINING:.0f} %"
    verdict = {
        "yes": f"routing is worth training ({gain.total})",
        "no": f"not worth training: {gain.total}, below {line}",
        "undecided": f"undecided: {gain.total}, on both sides of {line}; give more --pairs than {pairs}",
    }
    return answer, verdict[answer]
