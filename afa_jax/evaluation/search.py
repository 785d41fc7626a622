"""Parts of a search for merge weights: a space of few parameters, the merge in memory, and a score.

autoMBW searches, as a black box, for the weights of each block of a merge (the LDM blocks of
afa_jax/weights/merging/blocks.py) that make a score of generated pictures best. The U-Nets stay stacked in memory and
their weighted sum is an argument of one compiled sampler, so a trial compiles nothing and writes no file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from afa_jax.data.emoji.scenes import UNSEEN, Prompt, evaluation_prompts
from afa_jax.errors import InputError
from afa_jax.evaluation.bootstrap import Resamples
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.evaluation.comparison.scores import REAL, load_scorers
from afa_jax.evaluation.distances import kernel_distance
from afa_jax.evaluation.emoji.features import HEAD
from afa_jax.evaluation.emoji.judge import accuracy, hits, load_judge, real_scenes
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.rivals.block_weights import merge_stacks
from afa_jax.fusion.single import SingleExpert
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate
from afa_jax.weights.merging.blocks import BASE, block_names

Kind = Literal["blocks", "experts", "curve"]
SPACE_KINDS: tuple[Kind, ...] = ("blocks", "experts", "curve")
JUDGED = ("subject", "both", "subject_top5", "topic", "subject_in_topic", "style")
LIMIT = 3.0
"""The bound of a logit's absolute value; of three experts one can have a weight of 0.5 to 99.5 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """A search space of N experts' weights per block: a softmax of parameters in -LIMIT..LIMIT; 0 is the average.

    Attributes:
        kind: "blocks" (N parameters per block), "experts" (N in total, the same weights in every block) or "curve" (N
            for each of ``points`` control points along the depth, with logits linear between them, and N for BASE).
        experts: the experts' names.
        stages: names of the U-Net's stages.
        points: the number of a curve's control points.
    """

    kind: Kind
    experts: tuple[str, ...]
    stages: tuple[str, ...]
    points: int = 4

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise InputError("a search for merge weights needs two experts or more; name them in the config")
        if not 2 <= self.points <= len(self.stages):
            raise InputError(f"--points {self.points}; choose 2 to {len(self.stages)}, the number of blocks")

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the names of the blocks: one for each stage, in order, and BASE."""
        return tuple(dict.fromkeys(block_names(self.stages).values()))

    @property
    def knots(self) -> tuple[str, ...]:
        """Return the names of the parts that have N parameters each: blocks, control points, or "all"."""
        points = tuple(f"point{i}" for i in range(self.points))
        return dict(blocks=self.blocks, experts=("all",), curve=(*points, BASE))[self.kind]

    @property
    def average(self) -> dict[str, float]:
        """Return the parameters of the uniform average; its keys are the names of all parameters."""
        return {f"{knot}/{name}": 0.0 for knot in self.knots for name in self.experts}

    def weights(self, parameters: Mapping[str, float]) -> Float[np.ndarray, "blocks n"]:
        """Return each expert's weight in each of ``blocks``; rows sum to 1."""
        logits = np.array([[parameters[f"{knot}/{name}"] for name in self.experts] for knot in self.knots])
        if self.kind == "experts":
            logits = np.repeat(logits, len(self.blocks), axis=0)
        elif self.kind == "curve":
            depth = np.linspace(0, self.points - 1, len(self.stages))
            curves = [np.interp(depth, np.arange(self.points), logits[:-1, n]) for n in range(len(self.experts))]
            logits = np.concatenate([np.stack(curves, 1), logits[-1:]])
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)

    def by_block(self, weights: Float[np.ndarray, "blocks n"]) -> dict[str, dict[str, float]]:
        """Return the weights as the merge ``mbw`` takes them, by block and expert."""
        rows = zip(self.blocks, weights.tolist(), strict=True)
        return {block: dict(zip(self.experts, row, strict=True)) for block, row in rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of pictures that are made for a list of prompts.

    Attributes:
        metric: the metric's name.
        better: "higher" or "lower".
        captions: the prompts.
        references: the prompts' real pictures, by name and bytes, if the metric compares to them.
        of: maps uint8 pictures ``[rows, columns, 3]``, one for each caption in order, to the metric's value.
    """

    metric: str
    better: str
    captions: tuple[str, ...]
    references: tuple[str, ...] = ()
    of: Callable[[Sequence[np.ndarray]], float]


def emoji_score(metric: str, count: int) -> Score:
    """Return the Score of a judge's accuracy, one of JUDGED, or of the kernel distance to real scenes, ``kid``.

    The prompts are ``evaluation_prompts("mixed", count, UNSEEN)``: only trained pairs and combinations, and another
    list than an evaluation's, which has a small seed.

    Raises:
        InputError: the metric is unknown, or there are too few prompts for it.
    """
    least = 3 if metric == "kid" else 1
    if metric not in (*JUDGED, "kid"):
        raise InputError(f"--metric {metric}: of emoji scenes there are {', '.join(JUDGED)} and kid")
    if count < least:
        raise InputError(f"--prompts {count}; choose {least} or more")
    prompts = evaluation_prompts("mixed", count, UNSEEN)
    of = functools.partial(_distance if metric == "kid" else _accuracy, metric, prompts)
    better = "lower" if metric == "kid" else "higher"
    return Score(metric=metric, better=better, captions=tuple(prompt.caption for prompt in prompts), of=of)


def _accuracy(metric: str, prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> float:
    judgement = load_judge()(np.stack(pictures))
    if metric == "both":  # of the picture's places, none of which is empty here
        return float((hits(judgement, prompts)["subject"] == 1).all(1).mean())
    return accuracy(judgement, prompts)[metric]


def _distance(metric: str, prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> float:
    made, real = (load_judge()(images).features.reshape(-1, HEAD) for images in (np.stack(pictures), _real(*prompts)))
    return kernel_distance(made, real).value


@functools.cache
def _real(*prompts: Prompt) -> np.ndarray:
    return real_scenes(prompts, seed=1)


def full_scale_score(metric: str, items: Sequence[Item], weights: Mapping[str, str], *, size: tuple[int, int]) -> Score:
    """Return the Score of any metric of afa_jax/evaluation/metrics/table.py.

    A metric of single pictures, such as ``pickscore``, is averaged; one of a set, such as ``fid``, is taken as it is.

    Args:
        items: the prompts, with their real pictures for a metric that compares to them.
        weights: local files instead of the published weights, as ``load_metrics`` takes them.
        size: (rows, columns) of the pictures, to which real ones are cut.

    Raises:
        InputError: the metric is unknown, or its library, its weights or the real pictures are missing.
    """
    scorers, absent = load_scorers([metric], items, weights, size=size)
    if absent:
        hint = "; --prompt_file takes a .csv with the columns prompt and reference" if metric in REAL else ""
        raise InputError(f"--metric {metric}: {absent[metric]}{hint}")
    [scorer] = scorers
    once = Resamples(prompts=len(items), count=1)

    def of(pictures: Sequence[np.ndarray]) -> float:
        scores = scorer.score(np.stack(pictures), items)
        return scorer.figures({name: values[:, None] for name, values in scores.items()}, once)[metric].value

    better = next(info.better for info in scorer.infos if info.name == metric)
    real = [item.reference for item in items if item.reference is not None] if metric in REAL else []
    return Score(
        metric=metric,
        better=better,
        captions=tuple(item.prompt for item in items),
        references=tuple(f"{path.name}, {path.stat().st_size} bytes" for path in real),
        of=of,
    )


def score_weights(
    weights: Float[np.ndarray, "blocks n"], experts: Experts, score: Score, *, seed: int, options: SampleOptions
) -> float:
    """Return the score of the merge with these weights, from a picture for each caption with the seed's noise."""
    unet, text_encoder = merge_stacks(experts.unet, experts.text_encoder, jnp.asarray(weights, jnp.float32))
    merged = dataclasses.replace(experts, unet=unet, text_encoder=text_encoder)
    requests = [Request(prompt=caption, number=i) for i, caption in enumerate(score.captions)]
    made = generate(requests, SingleExpert(experts=unet, index=0), merged, seed=seed, options=options)
    return score.of([picture.pixels for picture in made])
