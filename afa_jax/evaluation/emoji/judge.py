"""The judge of emoji scenes: which subject, in which style, is to be seen in each place.

Two linear heads on ImageNet features (features.py), trained by train_judge.py. No judge is perfect, so its word on
generated pictures is always shown between two numbers: the `ceiling`, its accuracy on real scenes, and the `floor`,
its accuracy on real scenes under captions of others.

The subject head never saw a picture in a style that the experts draw, so it cannot reward a copy of a training
picture more than any other good drawing. One of its styles, Microsoft's flat one, has the same drawings as "fluent",
in other colours and without shading, which is why the ceiling is highest there: compare a style to its own ceiling.
The style head has no such choice: it was trained on the experts' own pictures, turned, mirrored, blurred and made
noisy. It knows these drawings rather than the styles: for subjects left out of its training it names the right style in
only about 60 % (chance is 25 %). So it says whether a place looks like the real drawing in that style.

On real scenes (320 prompts, twice): subject 89 % (noto 92, twemoji 86, fluent 99, blob 79; animals 81, food 93, things
93), among the first five 96 %, style 94 %. Through an autoencoder of 27 dB: subject 79 to 84 %, style 73 to 75 %.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from afa_jax.data.emoji.scenes import PLACE, SIZES, Box, Scene, compose
from afa_jax.data.emoji.vocabulary import read_vocabulary
from afa_jax.evaluation.emoji.features import HEAD, SIZE, EfficientNetLite0, enlarge, load_features
from afa_jax.models.vae import to_images
from afa_jax.types import Pixels
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors

WEIGHTS = Path(__file__).with_name("judge.safetensors")
LAYERS = 2048  # features that the heads read
BATCH = 32  # places at a time, for any number of pictures: one compilation, and 80 MB

Pictures = UInt8[np.ndarray, "b 32 64 3"]


@runtime_checkable
class Asked(Protocol):
    """The subjects and style that a picture must show: a Prompt or a Scene. "" stands for an empty place."""

    @property
    def left(self) -> str: ...
    @property
    def right(self) -> str: ...
    @property
    def style(self) -> str: ...


A = TypeVar("A", bound=Asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """The judge's outputs for each place of b pictures.

    subject_logits [b, 2, subjects] and style_logits [b, 2, styles], in the vocabulary's order; and features
    [b, 2, 1280] of the places, for the distances.
    """

    subject_logits: np.ndarray
    style_logits: np.ndarray
    features: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """The network and its heads: kernels [features, classes] and biases [classes]."""

    net: EfficientNetLite0
    heads: Mapping[str, np.ndarray]

    def __call__(self, pictures: Pictures) -> Judgement:
        """Judge both places of each picture, independently of the other pictures."""
        places = split_places(pictures)
        layers = layers_of(self.net, places)
        subjects, styles = (
            layers @ self.heads[f"{head}.kernel"] + self.heads[f"{head}.bias"] for head in ("subject", "style")
        )
        return Judgement(
            subject_logits=subjects.reshape(len(pictures), 2, -1),
            style_logits=styles.reshape(len(pictures), 2, -1),
            features=layers[:, -HEAD:].reshape(len(pictures), 2, HEAD),
        )


@functools.cache
def load_judge(path: Path = WEIGHTS) -> Judge:
    """Load the trained judge; once per process.

    Raises:
        WeightsError: a file is missing or broken, or was trained for other subjects or styles than vocabulary.json's.
    """
    heads = read_tensors(path)
    vocabulary = read_vocabulary()
    classes = {
        "subject": [subject.name for subject in vocabulary.subjects],
        "style": [style.name for style in vocabulary.styles],
    }
    metadata = read_metadata(path)
    again = "restore it, or train it again: python -m afa_jax.evaluation.emoji.train_judge --out DIR"
    for head, names in classes.items():
        if _names(metadata.get(head, "null")) != names:
            raise WeightsError(f"{path}: its {head}s are not those of vocabulary.json; {again}")
    shapes: dict[str, tuple[int, ...]] = {f"{head}.kernel": (LAYERS, len(names)) for head, names in classes.items()}
    shapes |= {f"{head}.bias": (len(names),) for head, names in classes.items()}
    if {key: array.shape for key, array in heads.items()} != shapes:
        raise WeightsError(f"{path}: holds other tensors than {shapes}; {again}")
    for key, array in heads.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise WeightsError(f"{path}: {key} is not of finite float32 numbers; {again}")
    return Judge(net=load_features(), heads=heads)


def _names(text: str) -> Any:
    """Return the class names that a file records for its head, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def split_places(pictures: Pictures) -> UInt8[np.ndarray, "places 32 32 3"]:
    """Return the left and the right place of each picture, in this order."""
    return np.stack([pictures[:, :, :PLACE], pictures[:, :, PLACE:]], 1).reshape(-1, PLACE, PLACE, 3)


def layers_of(net: EfficientNetLite0, places: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b 2048"]:
    """Return the heads' input features, computed BATCH at a time; the last 1,280 are those for the distances."""
    rows = []
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        padding = np.zeros((BATCH - len(batch), *batch.shape[1:]), np.uint8)
        rows.append(np.asarray(_layers(net, jnp.asarray(np.concatenate([batch, padding]))))[: len(batch)])
    return np.concatenate(rows)


@jax.jit
def _layers(net: EfficientNetLite0, places: Pixels) -> jax.Array:
    return net.layers(enlarge(to_images(places), SIZE))


def accuracy(judgement: Judgement, prompts: Sequence[Asked]) -> dict[str, float]:
    """Return the judge's accuracies, averaged over the places that must show a subject.

    Returns:
        places, the number of these places, and the shares of them where the judge
          subject          says the subject asked for
          subject_top5     has it among its first five
          topic            says one of the right topic
          subject_in_topic says the right one if it may choose within the topic only
          style            says the style asked for
        and all of these again over the places of each topic that occurs, as "animals/subject".

    Raises:
        ValueError: if the prompts are not as many as the pictures judged, or if all their places are empty.
        KeyError: for a subject or style that is not in the vocabulary.
    """
    seen = hits(judgement, prompts)
    asked = np.isfinite(seen["subject"])
    if not asked.any():
        raise ValueError("no prompt asks for a subject")
    vocabulary = read_vocabulary()
    topic_of = {subject.name: subject.topic for subject in vocabulary.subjects}
    topics = np.array([[topic_of.get(name, "") for name in (prompt.left, prompt.right)] for prompt in prompts])
    result: dict[str, float] = {}
    for prefix, chosen in (("", asked), *((f"{topic}/", topics == topic) for topic in vocabulary.topics)):
        if chosen.any():
            result[f"{prefix}places"] = float(chosen.sum())
            result |= {f"{prefix}{name}": float(values[chosen].mean()) for name, values in seen.items()}
    return result


def hits(judgement: Judgement, prompts: Sequence[Asked]) -> dict[str, Float[np.ndarray, "pictures 2"]]:
    """Return the values that ``accuracy`` averages: 1 or 0 for each place, NaN for an empty one.

    Raises:
        ValueError: if the prompts are not as many as the pictures judged.
        KeyError: for a subject or style that is not in the vocabulary.
    """
    if len(prompts) != len(judgement.subject_logits):
        raise ValueError(f"{len(prompts)} prompts for {len(judgement.subject_logits)} pictures")
    vocabulary = read_vocabulary()
    subjects = {subject.name: i for i, subject in enumerate(vocabulary.subjects)}
    styles = {style.name: i for i, style in enumerate(vocabulary.styles)}
    topics = np.array([subject.topic for subject in vocabulary.subjects])

    names = [(prompt.left, prompt.right) for prompt in prompts]
    subject = np.array([[subjects[name] if name else 0 for name in both] for both in names])
    style = np.array([[styles[prompt.style]] * 2 for prompt in prompts])
    logits = judgement.subject_logits
    topic, best = topics[subject], logits.argmax(-1)
    rank = (logits > np.take_along_axis(logits, subject[..., None], -1)).sum(-1)
    within = np.where(topics == topic[..., None], logits, -np.inf)
    right = {
        "subject": best == subject,
        "subject_top5": rank < 5,
        "topic": topics[best] == topic,
        "subject_in_topic": within.argmax(-1) == subject,
        "style": judgement.style_logits.argmax(-1) == style,
    }
    empty = np.array([[not name for name in both] for both in names])
    return {name: np.where(empty, np.nan, values) for name, values in right.items()}


def ceiling(
    judge: Judge,
    prompts: Sequence[Asked],
    *,
    crops: int = 3,
    seed: int = 0,
    through: Callable[[Pictures], Pictures] | None = None,
) -> dict[str, float]:
    """Return the judge's accuracy on real scenes, drawn ``crops`` times per prompt with other sizes and shifts.

    Args:
        judge: the judge to measure.
        prompts: the prompts to draw and to judge by.
        crops: the number of drawings of each prompt.
        seed: determines the sizes and shifts.
        through: a function to apply to the pictures first, such as encoding and decoding by an autoencoder.
    """
    pictures = real_scenes(prompts, crops, seed)
    return accuracy(judge(pictures if through is None else through(pictures)), [*prompts] * crops)


def floor(judge: Judge, prompts: Sequence[Asked], *, crops: int = 3, seed: int = 0) -> dict[str, float]:
    """Return the judge's accuracy on real scenes that were drawn for other prompts of the same list."""
    return accuracy(judge(real_scenes(prompts, crops, seed)), [*shuffled(prompts, seed)] * crops)


def shuffled(prompts: Sequence[A], seed: int = 0) -> list[A]:
    """Return the prompts in another order, none in its old place (unless it is the only one)."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    result = list(prompts)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        result[here] = prompts[there]
    return result


def real_scenes(prompts: Sequence[Asked], crops: int = 1, seed: int = 0) -> Pictures:
    """Draw real pictures for all prompts in order, ``crops`` times, each time with other sizes and shifts."""
    random = np.random.default_rng(seed)

    def box() -> Box:
        size = int(random.choice(SIZES))
        x, y = random.integers(0, PLACE - size + 1, 2)
        return Box(size, int(x), int(y))

    scenes = [
        Scene(left=prompt.left, right=prompt.right, style=prompt.style, boxes=(box(), box()))
        for _ in range(crops)
        for prompt in prompts
    ]
    return np.stack([compose(scene) for scene in scenes])
