"""Scenes of one or two emoji on white, with captions: a data source that is a pure function of (seed, index).

A scene is a canvas of two places, each 32 x 32 pixels. Its caption names the subjects from left to right and the
style: "octopus and pizza, noto style", or "octopus, noto style" when the other place is empty.

Held out of training, to be measured apart:
  pairs         some (subject, style) pairs, 5 % of them: an octopus was learnt and noto was learnt, but no noto octopus
  combinations  an animal on the left with a thing on the right
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from afa_jax.data.emoji.vocabulary import HERE, read_vocabulary

PLACE = 32  # pixels; a canvas is PLACE high and 2 * PLACE wide
SIZES = range(26, PLACE + 1)  # the edge lengths of a subject
HELD_OUT_COMBINATION = ("animals", "things")
HELD_OUT_SHARE = 0.05
UNSEEN = 10_000_019  # a seed of scenes that no config trains on

Split = Literal["train", "held_out"]
HeldOut = Literal["pairs", "combinations"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of the data set, uint8 [subject, style, 64, 64, 3], with the labels of the axes.

    `topics` are those of the subjects, so names[i] is of topics[i].
    """

    images: np.ndarray
    names: tuple[str, ...]
    topics: tuple[str, ...]
    styles: tuple[str, ...]


@functools.cache
def load_pictures() -> Pictures:
    """Read the pictures that the project carries; once in a process, the array cannot be written to.

    Raises:
        ValueError: if the pictures are not those of vocabulary.json, with what is missing.
    """
    import tensorflow_datasets as tfds  # takes a second, and captions do not need it

    vocabulary = read_vocabulary()
    # The same folder as builder.DATA_DIR; importing that would also import and register the builder.
    builder = tfds.builder_from_directory(HERE / "emoji_pictures" / "1.0.0")
    # TFDS decodes by OpenCV where that is installed; Pillow is always here.
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    found = {(record["subject"].decode(), record["style"].decode()): _decode(record["image"]) for record in records}
    wanted = [(subject.name, style.name) for subject in vocabulary.subjects for style in vocabulary.styles]
    if missing := [pair for pair in wanted if pair not in found]:
        raise ValueError(
            f"emoji_pictures/1.0.0 lacks {len(missing)} pictures of vocabulary.json, such as {missing[0]}; "
            "run python -m afa_jax.data.emoji.rebuild"
        )
    images = np.stack([found[pair] for pair in wanted])
    images = images.reshape(len(vocabulary.subjects), len(vocabulary.styles), *images.shape[1:])
    images.setflags(write=False)
    return Pictures(
        images=images,
        names=tuple(subject.name for subject in vocabulary.subjects),
        topics=tuple(subject.topic for subject in vocabulary.subjects),
        styles=tuple(style.name for style in vocabulary.styles),
    )


@functools.cache
def _pictures_hash() -> str:
    files = [*sorted((HERE / "emoji_pictures" / "1.0.0").glob("*.array_record*")), HERE / "vocabulary.json"]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


@functools.cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Return the (subject, style) pairs kept out of training.

    The same number of each topic in each style is kept out: the subjects with the lowest hashes, so the choice is
    arbitrary and the same on every machine.
    """
    vocabulary = read_vocabulary()
    pairs: set[tuple[str, str]] = set()
    for topic, style in itertools.product(vocabulary.topics, vocabulary.styles):
        names = [subject.name for subject in vocabulary.subjects if subject.topic == topic]
        names.sort(key=lambda name: hashlib.sha256(f"{name}/{style.name}".encode()).digest())
        pairs.update((name, style.name) for name in names[: round(HELD_OUT_SHARE * len(names))])
    return frozenset(pairs)


class Box(NamedTuple):
    """A subject's box within its place, in pixels: its edge length and its upper left corner."""

    size: int = PLACE
    x: int = 0
    y: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """The contents of a picture: subjects by name ("" is an empty place), their style and their boxes."""

    left: str
    right: str
    style: str
    boxes: tuple[Box, Box] = (Box(), Box())

    @property
    def caption(self) -> str:
        """Return the prompt that asks for this scene."""
        return f"{' and '.join(filter(None, (self.left, self.right)))}, {self.style} style"

    @property
    def topics(self) -> tuple[str, str]:
        """Return the topics of the left and the right place, "" for an empty one."""
        topics = _topic_of()
        return topics.get(self.left, ""), topics.get(self.right, "")


def compose(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [32, 64, 3].

    Raises:
        KeyError: if the scene's style or one of its subjects is not in the vocabulary.
    """
    resized, rows, columns = _resized()
    canvas = np.full((PLACE, 2 * PLACE, 3), 255, np.uint8)
    for place, (name, box) in enumerate(zip((scene.left, scene.right), scene.boxes, strict=True)):
        if name:
            x = place * PLACE + box.x
            canvas[box.y : box.y + box.size, x : x + box.size] = resized[box.size][rows[name], columns[scene.style]]
    return canvas


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneSource:
    """Scenes by index: a random-access source for grain, pure in (seed, index), equal options give equal scenes.

    Args:
        seed: the seed of all scenes.
        length: the number of scenes. Drawing is free, so this is only the length of an epoch.
        topics: take all subjects from these topics; None takes all topics.
        mixed: whether the two subjects of a scene may be of two topics.
        styles: draw in these styles only; None takes all styles.
        single: share of scenes with one subject, in either place.
        places: 1 cuts scenes of one subject (`single` must be 1) down to its place, 32 x 32 pixels: words are learnt
            faster if the picture shows nothing else.
        split: "train" has no held-out scenes; "held_out" has only those of `held_out`.
        held_out: the scenes of the split "held_out": "pairs", scenes with one held-out (subject, style) pair, in a
            combination of topics that is trained; or "combinations", scenes of that combination, with pairs that are
            trained.

    Raises:
        ValueError: for an unknown topic, style, split or held_out, or if the options leave no scene to draw.
    """

    seed: int
    length: int = 2**20
    topics: tuple[str, ...] | None = None
    mixed: bool = True
    styles: tuple[str, ...] | None = None
    single: float = 0.3
    places: int = 2
    split: Split = "train"
    held_out: HeldOut = "pairs"

    def __post_init__(self) -> None:
        vocabulary = read_vocabulary()
        _check("topic", self.topics, vocabulary.topics)
        _check("style", self.styles, tuple(style.name for style in vocabulary.styles))
        _check("split", (self.split,), ("train", "held_out"))
        _check("held_out", (self.held_out,), ("pairs", "combinations"))
        if self.length < 1 or not 0 <= self.single <= 1:
            raise ValueError(f"{self}: wanted length >= 1 and 0 <= single <= 1")
        if self.places not in (1, 2) or (self.places == 1 and self.single != 1):
            raise ValueError(f"{self}: wanted places 2, or 1 with single=1")
        if not self._plan.combinations:
            raise ValueError(f"{self}: no scene fits; {HELD_OUT_COMBINATION} needs both topics and mixed=True")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return image, uint8 [32, 32 * places, 3], and the strings caption, left, right, style and two topics.

        An empty place has the subject "" and the topic "".
        """
        scene = self.scene(index)
        image = compose(scene)
        if self.places == 1:
            image = image[:, :PLACE] if scene.left else image[:, PLACE:]
        return {
            "image": image,
            "caption": scene.caption,
            "left": scene.left,
            "right": scene.right,
            "style": scene.style,
            "topics": scene.topics,
        }

    def name(self, index: int) -> str:
        """Return a scene's name for messages: its number and its caption."""
        return f"scene {index} ({self.scene(index).caption})"

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the options and of the pictures that scenes are drawn with."""
        return hashlib.sha256(f"{self!r} {_pictures_hash()}".encode()).hexdigest()

    def scene(self, index: int) -> Scene:
        """Return the scene at `index`, without drawing it.

        Raises:
            IndexError: if there is no such index.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        # A hash is the generator: as random as one, quicker to set up, and the same with every version of numpy. All
        # numbers, from [0, 1), are drawn at once, whether needed or not, so that each keeps its meaning.
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=52).digest()
        style_u, single_u, empty_u, topic_u, odd_u, left_u, right_u, *box_u = (
            number / 2**32 for number in struct.unpack("<13I", digest)
        )
        plan = self._plan

        style = _pick(plan.styles, style_u)
        topics = _pick(plan.combinations, topic_u)
        empty = None
        if plan.topics and single_u < self.single:
            empty = int(2 * empty_u)
            topics = (_pick(plan.topics, topic_u),) * 2
        # The place that holds the held-out pair, if this split has one.
        odd = None
        if self.split == "held_out" and self.held_out == "pairs":
            odd = int(2 * odd_u) if empty is None else 1 - empty

        names: list[str] = []
        for place, (topic, u) in enumerate(zip(topics, (left_u, right_u), strict=True)):
            subjects = (plan.held_out if place == odd else plan.trained)[topic, style]
            names.append("" if place == empty else _pick([name for name in subjects if name not in names], u))
        boxes: list[Box] = []
        for size_u, x_u, y_u in (box_u[:3], box_u[3:]):
            size = SIZES[int(size_u * len(SIZES))]
            boxes.append(Box(size, int(x_u * (PLACE - size + 1)), int(y_u * (PLACE - size + 1))))
        return Scene(left=names[0], right=names[1], style=style, boxes=(boxes[0], boxes[1]))

    @functools.cached_property
    def _plan(self) -> "_Plan":
        vocabulary = read_vocabulary()
        topics = self.topics or vocabulary.topics
        styles = self.styles or tuple(style.name for style in vocabulary.styles)
        pairs = held_out_pairs()
        subjects = {
            (topic, style): [subject.name for subject in vocabulary.subjects if subject.topic == topic]
            for topic, style in itertools.product(topics, styles)
        }
        only_combination = self.split == "held_out" and self.held_out == "combinations"
        return _Plan(
            styles=styles,
            topics=() if only_combination else topics,  # a single subject is no combination
            combinations=tuple(
                both
                for both in itertools.product(topics, topics)
                if (self.mixed or both[0] == both[1]) and (both == HELD_OUT_COMBINATION) == only_combination
            ),
            trained={key: tuple(n for n in names if (n, key[1]) not in pairs) for key, names in subjects.items()},
            held_out={key: tuple(n for n in names if (n, key[1]) in pairs) for key, names in subjects.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The choices of a source: topics of one subject, (left, right) topics of two, subjects by (topic, style)."""

    styles: tuple[str, ...]
    topics: tuple[str, ...]
    combinations: tuple[tuple[str, str], ...]
    trained: Mapping[tuple[str, str], tuple[str, ...]]
    held_out: Mapping[tuple[str, str], tuple[str, ...]]


class Prompt(NamedTuple):
    """One prompt of an evaluation list, and the subjects and style that a picture must show."""

    caption: str
    left: str
    right: str
    style: str


def evaluation_prompts(
    kind: str, count: int, seed: int = 0, *, split: Split = "train", held_out: HeldOut = "pairs"
) -> list[Prompt]:
    """Return `count` prompts with two subjects each, no two alike, in all styles equally often.

    Args:
        kind: a topic, for two subjects of it; or "mixed", for subjects of two topics.
        count: the number of prompts.
        seed: the seed of the list.
        split: "train", or "held_out" for prompts as in SceneSource's split of that name.
        held_out: the kind of held-out scenes.

    Raises:
        ValueError: if kind is unknown, or if there are fewer prompts of that kind.
    """
    vocabulary = read_vocabulary()
    _check("kind", (kind,), (*vocabulary.topics, "mixed"))
    mixed = kind == "mixed"
    plan = SceneSource(seed=seed, topics=None if mixed else (kind,), mixed=mixed, split=split, held_out=held_out)._plan
    sides = [(plan.trained, plan.trained)]
    if split == "held_out" and held_out == "pairs":
        sides = [(plan.held_out, plan.trained), (plan.trained, plan.held_out)]
    quota = -(-count // len(plan.styles))
    by_style: list[list[Prompt]] = []
    for style in plan.styles:
        pairs = [
            (left, right)
            for (lefts, rights), topics in itertools.product(sides, plan.combinations)
            for left, right in itertools.product(lefts[topics[0], style], rights[topics[1], style])
            if left != right and mixed == (topics[0] != topics[1])
        ]
        if len(pairs) < quota:
            raise ValueError(f"{count} prompts of {kind!r}: {style} has only {len(pairs)} in the split {split!r}")
        pairs.sort(key=lambda pair: hashlib.sha256(f"{seed}/{pair}/{style}".encode()).digest())
        scenes = (Scene(left=left, right=right, style=style) for left, right in pairs[:quota])
        by_style.append([Prompt(scene.caption, scene.left, scene.right, style) for scene in scenes])
    return [prompt for turn in zip(*by_style, strict=True) for prompt in turn][:count]


# Many threads of a loader ask for the first scene at once; one of them makes the table.
_lock = threading.Lock()


def _resized() -> tuple[dict[int, np.ndarray], dict[str, int], dict[str, int]]:
    """Return size -> pictures, uint8 [subject, style, size, size, 3], and the rows and columns of the names."""
    with _lock:
        return _resize()


@functools.cache
def _resize() -> tuple[dict[int, np.ndarray], dict[str, int], dict[str, int]]:
    pictures = load_pictures()
    resized = {
        size: np.stack([[_shrink(image, size) for image in of_subject] for of_subject in pictures.images])
        for size in SIZES
    }
    rows = {name: row for row, name in enumerate(pictures.names)}
    columns = {style: column for column, style in enumerate(pictures.styles)}
    return resized, rows, columns


def _decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded), formats=("WEBP",)).convert("RGB"))


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


@functools.cache
def _topic_of() -> dict[str, str]:
    return {subject.name: subject.topic for subject in read_vocabulary().subjects}


def _pick(choices: Sequence[Any], u: float) -> Any:
    return choices[int(u * len(choices))]


def _check(what: str, given: tuple[str, ...] | None, known: tuple[str, ...]) -> None:
    if given is not None and (not given or not set(given) <= set(known)):
        raise ValueError(f"{what} {', '.join(map(repr, given)) or '()'}: choose from {', '.join(known)}")
