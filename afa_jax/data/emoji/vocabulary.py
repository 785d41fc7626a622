"""The vocabulary of emoji scenes: subjects by topic, and drawing styles (vocabulary.json)."""

import dataclasses
import functools
import json
from pathlib import Path

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to draw. `name` is what captions say; `codepoint` is hexadecimal, without the variation selector."""

    name: str
    codepoint: str
    topic: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """One way to draw, and the npm package that holds its pictures.

    `names` is the package whose chars.json names this package's icons, where it has none of its own.
    """

    name: str
    package: str
    version: str
    licence: str
    attribution: str
    names: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """All subjects, topic by topic, and all styles, both in the order of the file."""

    subjects: tuple[Subject, ...]
    styles: tuple[Style, ...]

    @property
    def topics(self) -> tuple[str, ...]:
        """Return each topic once, in the order of the file."""
        return tuple(dict.fromkeys(subject.topic for subject in self.subjects))


@functools.cache
def read_vocabulary(path: Path = HERE / "vocabulary.json") -> Vocabulary:
    """Read a vocabulary file: {"topics": {topic: [{"name", "codepoint"}]}, "styles": {name: {"package", ...}}}.

    Raises:
        ValueError: if two subjects share a name; captions could not tell them apart.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    subjects = tuple(
        Subject(topic=topic, **subject) for topic, subjects in content["topics"].items() for subject in subjects
    )
    names = [subject.name for subject in subjects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: subjects {twice} are listed more than once; give each its own name")
    styles = tuple(Style(name=name, **style) for name, style in content["styles"].items())
    return Vocabulary(subjects=subjects, styles=styles)
