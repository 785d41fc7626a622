"""Before training: is there anything to learn? ``python -m afa_jax.screen --config configs/emoji.py``.

Says whether the experts can be fused at all (prediction type, noise schedule, architecture), whether two of them are
one model under two names (weights by block), and whether routing between them is learnable: the cross-noise routing
gain of afa_jax/evaluation/screen.py on held-out pairs. The last line is the verdict; the exit status is 3 for a clear
no, 0 for yes and for undecided.

Held-out pairs are emoji scenes of a seed that nothing trains on; of any other data, the examples that a hash of --seed
chooses. No aggregator has been trained yet and the experts are frozen: any pairs will do that no expert was fine-tuned
on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from afa_jax.commands import Parser, parse, run
from afa_jax.data.emoji.scenes import UNSEEN, SceneSource
from afa_jax.data.loader import loading
from afa_jax.data.sources import BadExample, PictureSource, make_source
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.evaluation.noise import expert_errors
from afa_jax.evaluation.screen import WORTH_TRAINING, RoutingGain, route, routing_gain, worth_training
from afa_jax.experts import Mismatch, find_checkpoints, load_experts, mismatches
from afa_jax.files import replace_text
from afa_jax.report.screen import print_gain, print_mismatches, print_weights, record
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT, Difference, compare_experts

BUCKETS = 10  # ranges of timesteps
FEWEST = 8  # pairs; the bootstrap's intervals are too narrow for fewer
Pairs = Mapping[tuple[str, str], Difference]


def main(arguments: Sequence[str]) -> int:
    """Screen the experts of a config, print tables and the verdict; 3 if training is clearly not worth it."""
    parser = Parser(prog="python -m afa_jax.screen", description=__doc__)
    parser.add_argument("--pairs", type=int, default=64, help="held-out pictures with captions")
    parser.add_argument("--draws", type=int, default=4, help="of noise for each pair and timestep")
    parser.add_argument("--seed", type=int, default=0, help="of pairs, timesteps, noise and intervals")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    options, config = parse(parser, arguments)
    if options.pairs < FEWEST or options.draws < 2 or not 0 <= options.seed < 2**31:
        raise InputError(f"choose --pairs of {FEWEST} or more, --draws of 2 or more, and --seed from 0 to {2**31 - 1}")
    if options.out and options.out.exists():
        raise InputError(f"{options.out} exists; choose another --out or remove it")
    base, checkpoints = find_checkpoints(config)
    if len(checkpoints) < 2:
        raise InputError(f"{next(iter(checkpoints))!r} is the only expert; routing needs two or more")

    misfits = list(mismatches(base, checkpoints))
    comparable = not any(misfit.what in ("architecture", "text encoder") for misfit in misfits)
    hashes = {name: hash_components(checkpoint, EXPERT) for name, checkpoint in checkpoints.items()}
    pairs = dict(compare_experts(checkpoints)) if comparable else {}
    print_mismatches(list(checkpoints), misfits)
    if pairs:
        print_weights(pairs)
    refusal = refuse(misfits, pairs)
    gain = None
    if refusal is None:
        gain = measure(config, options.pairs, options.draws, options.seed)
        print_gain(list(checkpoints), gain, f"on {options.pairs} held-out pairs, {options.draws} draws of noise each")
    answer, verdict = ("no", refusal) if gain is None else judge(gain, options.pairs)
    if options.out:
        results = dict(
            config=config.to_dict(),
            pairs=options.pairs,
            draws=options.draws,
            seed=options.seed,
            experts=[dict(name=name, sha256=sha) for name, sha in hashes.items()],
            mismatches=[misfit._asdict() for misfit in misfits],
            weights=[
                dict(experts=pair, kind=found.kind, total=found.total) | dict(blocks=found.blocks)
                for pair, found in pairs.items()
            ],
            routing=None if gain is None else record(list(checkpoints), gain),
            answer=answer,
            verdict=verdict,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.out, json.dumps(results, indent=2) + "\n")
    print(f"\nverdict: {verdict}")
    return 3 if answer == "no" else 0


def measure(config: ConfigDict, count: int, draws: int, seed: int) -> RoutingGain:
    """The routing gain of a config's experts on its held-out pairs.

    Raises:
        InputError: experts or data cannot be used, or an expert's predictions are not finite.
    """
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    pixels, captions = choose_pairs(unseen(make_source(config.data)), loading(config.data)["crop"], count, seed)
    experts.check_size(pixels.shape[1:3])
    parts = []
    with tqdm(total=count, unit="pair", dynamic_ncols=True, disable=None) as progress:
        batch = min(count, config.sample.batch)
        for errors in expert_errors(experts, pixels, captions, buckets=BUCKETS, draws=draws, seed=seed, batch=batch):
            for name, own in zip(experts.names, errors, strict=True):
                if not np.isfinite(own).all():
                    raise InputError(f"expert {name!r} predicts NaN or infinity; try --config.dtype=float32")
            parts.append(route(errors))
            progress.update(errors.shape[1])
    return routing_gain(parts, seed=seed)


def unseen(source: PictureSource) -> PictureSource:
    """Emoji scenes that nothing trains on; of any other data, the source itself."""
    return dataclasses.replace(source, seed=UNSEEN) if isinstance(source, SceneSource) else source


def choose_pairs(source: PictureSource, crop: Crop | None, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8 ``[count, rows, columns, 3]``, and captions, chosen by a hash of ``seed``.

    An example that cannot be read is named in a warning, and the next one takes its place.

    Raises:
        InputError: the data has fewer readable examples.
    """
    pictures, captions = [], []
    for index in by_hash(len(source), seed):
        try:
            example = source[index]
        except BadExample as error:
            warnings.warn(f"left out: {error.name}: {error.reason}", stacklevel=2)
            continue
        image = example["image"]
        pictures.append(image if crop is None else crop(image, np.random.default_rng((seed, index))))
        captions.append(example["caption"])
        if len(pictures) == count:
            return np.stack(pictures), captions
    raise InputError(f"--pairs {count}: the data has only {len(pictures)} examples that can be read")


def by_hash(length: int, seed: int) -> Iterator[int]:
    """All indices below ``length`` in the order of a hash: no choice of ours, and the same on every machine."""
    seen: set[int] = set()
    for number in itertools.count():
        if len(seen) == length:
            return
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        index = int.from_bytes(digest, "big") % length
        if index not in seen:
            seen.add(index)
            yield index


def refuse(misfits: Sequence[Mismatch], pairs: Pairs) -> str | None:
    """The verdict on experts that need no measurement, if they do not: they do not fit, or one is there twice."""
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
    """The answer and the verdict that a measured gain gives."""
    answer, line = worth_training(gain.total), f"{100 * WORTH_TRAINING:.0f} %"
    verdict = {
        "yes": f"routing is worth training ({gain.total})",
        "no": f"not worth training: {gain.total}, below {line}",
        "undecided": f"undecided: {gain.total}, on both sides of {line}; give more --pairs than {pairs}",
    }
    return answer, verdict[answer]


if __name__ == "__main__":
    raise SystemExit(run(main))
