"""Compare methods on emoji scenes: ``python -m afa_jax.evaluate --config configs/emoji.py --workdir DIR --out FILE``.

For each topic, for mixed scenes and for what training held out (subjects in styles they were never seen in, and topics
that never stood side by side): the noise MSE on scenes that were not trained on, and for pictures of the same prompts
and seeds the judge's accuracies (with their ceiling and floor) and the KID to real scenes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afa_jax.commands import Parser, parse, run
from afa_jax.data.emoji.scenes import UNSEEN, SceneSource, evaluation_prompts
from afa_jax.data.emoji.vocabulary import read_vocabulary
from afa_jax.data.pictures import to_images, to_pixels
from afa_jax.errors import InputError
from afa_jax.evaluation.distances import kernel_distance
from afa_jax.evaluation.features import HEAD
from afa_jax.evaluation.judge import accuracy, ceiling, floor, load_judge, real_scenes
from afa_jax.evaluation.noise import noise_errors
from afa_jax.experts import load_experts
from afa_jax.files import replace_text
from afa_jax.generate import Request, SampleOptions, generate, make_denoiser
from afa_jax.weights.hub import fetch_run

TOPICS = read_vocabulary().topics
GROUPS: dict[str, dict[str, Any]] = {
    **{topic: dict(kind=topic) for topic in TOPICS},
    "mixed": dict(kind="mixed"),
    "held-out pairs": dict(kind="mixed", split="held_out", held_out="pairs"),
    "held-out combinations": dict(kind="mixed", split="held_out", held_out="combinations"),
}


def main(arguments: Sequence[str]) -> None:
    """Evaluate every method and print a table."""
    parser = Parser(prog="python -m afa_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id (for the method afa)")
    parser.add_argument(
        "--method", action="append", help="default: every expert, uniform, and afa if there is a workdir"
    )
    parser.add_argument("--group", action="append", choices=GROUPS, help="of scenes; default: all")
    parser.add_argument(
        "--prompts", type=int, default=32, help="pictures of each group and method; 0 for noise MSE only"
    )
    parser.add_argument("--scenes", type=int, default=64, help="scenes of each group for the noise MSE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file with all figures")
    options, config = parse(parser, arguments)
    if options.out.exists():
        raise InputError(f"{options.out} exists; choose another --out or remove it")
    if options.scenes % 16 or options.scenes < 16:
        raise InputError(f"--scenes {options.scenes}; choose a multiple of 16")
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    methods = options.method or [f"expert:{name}" for name in experts.names] + ["uniform"]
    if options.workdir and not options.method:
        methods.append("afa")
    sampling = SampleOptions(
        size=tuple(config.sample.size), steps=config.sample.steps, guidance=config.sample.guidance, batch=8
    )
    workdir = fetch_run(options.workdir) if options.workdir and "afa" in methods else None
    denoisers = {method: make_denoiser(method, experts, workdir) for method in methods}
    roundtrip = jax.jit(lambda x: to_pixels(experts.vae.decode(experts.vae.encode(to_images(x)))))

    def reconstruct(pictures: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(roundtrip(pictures[i : i + 32])) for i in range(0, len(pictures), 32)])

    results: dict[str, Any] = dict(config=config.to_dict(), seed=options.seed, experts=experts.record, groups={})
    judge = load_judge() if options.prompts else None
    for group in options.group or GROUPS:
        row: dict[str, Any] = {}
        results["groups"][group] = row
        which = dict(GROUPS[group])
        kind = which.pop("kind")
        mixed = kind == "mixed"
        source = SceneSource(seed=UNSEEN, topics=None if mixed else (kind,), mixed=mixed, single=0.0, **which)
        scenes = [source[i] for i in range(options.scenes)]
        pixels, captions = np.stack([s["image"] for s in scenes]), [s["caption"] for s in scenes]
        for method, denoiser in denoisers.items():
            errors = noise_errors(denoiser, experts, pixels, captions).mean(1)
            row[method] = dict(noise_mse=float(errors.mean()), noise_mse_se=float(errors.std() / len(errors) ** 0.5))
        if judge is not None:
            prompts = evaluation_prompts(kind, options.prompts, options.seed, **which)
            real = judge(real_scenes(prompts, seed=1))  # crops of one prompt are not independent: one each
            row["real scenes (ceiling)"] = dict(ceiling(judge, prompts))
            row["reconstructions"] = dict(ceiling(judge, prompts, through=reconstruct))
            row["other captions (floor)"] = dict(floor(judge, prompts))
            for method, denoiser in denoisers.items():
                started = time.perf_counter()
                requests = [Request(prompt=prompt.caption, number=i) for i, prompt in enumerate(prompts)]
                made = list(generate(requests, denoiser, experts, seed=options.seed, options=sampling))
                seconds = (time.perf_counter() - started) / len(made)
                seen = judge(np.stack([picture.pixels for picture in made]))
                row[method] |= dict(accuracy(seen, prompts)) | dict(seconds_per_image=seconds)
                if options.prompts >= 20:
                    kid = kernel_distance(seen.features.reshape(-1, HEAD), real.features.reshape(-1, HEAD))
                    row[method] |= dict(kid=kid.value, kid_se=kid.error)
        print_table(group, row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, json.dumps(results, indent=2) + "\n")
    print(options.out)


def print_table(group: str, row: dict[str, dict[str, float]]) -> None:
    """Print one group's figures, a method a line."""
    known = ("noise_mse", "subject", "subject_top5", "topic", "subject_in_topic", "style", "kid", "seconds_per_image")
    columns = [column for column in known if any(column in figures for figures in row.values())]
    print(f"\n{group}\n{'':24}" + "".join(f"{column[:15]:>16}" for column in columns))
    for method, figures in row.items():
        cells = [f"{figures[column]:16.4f}" if column in figures else f"{'':16}" for column in columns]
        print(f"{method:24}" + "".join(cells))


if __name__ == "__main__":
    raise SystemExit(run(main))
