"""Prompts of a comparison, in groups, each with what its pictures must show or with a reference picture."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.data.emoji.scenes import Prompt, evaluation_prompts
from afa_jax.data.tables import csv_rows, decode_text, jsonl_rows
from afa_jax.errors import InputError, why
from afa_jax.weights.tokenizer.prompts import check_prompt

EMOJI_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "two topics": dict(kind="mixed"),
    "unseen pairs": dict(kind="mixed", split="held_out", held_out="pairs"),
    "unseen combinations": dict(kind="mixed", split="held_out", held_out="combinations"),
    **{topic: dict(kind=topic) for topic in ("animals", "food", "things")},
}
"""Groups of emoji prompts: two topics, as AFA is trained on; a subject in a style that was held out; two topics in an
order that was held out; and one topic, which a single expert knows."""

_COLUMNS = dict(prompt=("prompt", "prompts", "caption", "text"), group=("group", "category"), reference=("reference",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt.

    Attributes:
        group: the group of prompts that it belongs to; each group has its own figures.
        asked: the subjects and styles that a picture of an emoji prompt must show.
        reference: a real picture of the prompt.
    """

    prompt: str
    group: str = "all"
    asked: Prompt | None = None
    reference: Path | None = None

    def number(self, seed: int) -> int:
        """Return the number of its picture (see ``Request``), which depends only on the prompt and the seed."""
        digest = hashlib.sha256(f"{seed}/{self.prompt}".encode()).digest()
        return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def load_items(config: ConfigDict) -> list[Item]:
    """Load the prompts that ``evaluation.prompts`` names; of equal prompts the first, with its group and picture.

    ``kind="emoji"``: ``groups``, a dict of counts by EMOJI_GROUPS' names, and ``seed``.
    ``kind="file"``: ``path``, a text file with a prompt a line, or .csv, .tsv or .jsonl with the column prompt (or
    caption) and optionally group (or category, as in DrawBench) and reference (a picture, relative to the file).
    ``kind="coco"``: ``annotations``, COCO's captions_*.json, and ``pictures``, the folder of its pictures; the first
    caption of each picture. For "file" and "coco", ``count`` (0: all) and ``seed`` choose a subset.

    Raises:
        InputError: a field or file is missing or cannot be read; the error names it.
    """
    readers = dict(emoji=_emoji, file=_file, coco=_coco)
    kind = config.get("kind")
    if kind not in readers:
        raise InputError(f"evaluation.prompts.kind={kind!r}; choose {', '.join(readers)}")
    try:
        items = readers[kind](config)
    except InputError:
        raise
    except (KeyError, AttributeError) as error:
        raise InputError(f"evaluation.prompts: the field or key {error} is missing") from None
    except (OSError, TypeError, ValueError, RecursionError, csv.Error) as error:
        where = config.get("path") or config.get("annotations")
        raise InputError(f"evaluation.prompts{f': {where}' if where else ''}: {why(error)}") from error
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.prompt, item)
    if len(first) < len(items):
        warnings.warn(f"evaluation.prompts: {len(items) - len(first)} that are there twice are left out", stacklevel=2)
    items = list(first.values())
    if not items:
        raise InputError("evaluation.prompts: there are none")
    count = int(config.get("count", 0))
    if 0 < count < len(items):
        seed = config.get("seed", 0)
        ranks = {item.prompt: hashlib.sha256(f"{seed}/{item.prompt}".encode()).digest() for item in items}
        chosen = sorted(ranks, key=lambda prompt: ranks[prompt])[:count]
        items = [item for item in items if item.prompt in set(chosen)]
    return items


def fewer(items: Sequence[Item], count: int | None) -> list[Item]:
    """Return ``count`` prompts, from each group the first ones in proportion to its size; all for None."""
    if count is None or count >= len(items):
        return list(items)
    sizes, places = Counter(item.group for item in items), Counter[str]()
    shares = []
    for row, item in enumerate(items):  # its relative place within its group, from 0 to 1
        shares.append((places[item.group] / sizes[item.group], row))
        places[item.group] += 1
    return [items[row] for row in sorted(row for _, row in sorted(shares)[:count])]


def _emoji(config: ConfigDict) -> list[Item]:
    items = []
    for group, count in config["groups"].items():
        if group not in EMOJI_GROUPS:
            raise InputError(f"evaluation.prompts.groups: no group {group!r}; there are {', '.join(EMOJI_GROUPS)}")
        if count:
            which = dict(EMOJI_GROUPS[group])
            prompts = evaluation_prompts(which.pop("kind"), count, config.get("seed", 0), **which)
            items += [Item(prompt=prompt.caption, group=group, asked=prompt) for prompt in prompts]
    return items


def _file(config: ConfigDict) -> list[Item]:
    path = Path(config["path"])
    if not path.is_file():
        raise InputError(f"evaluation.prompts.path={path}: no such file")
    where, text = str(path), decode_text(path.read_bytes(), str(path))
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    if path.suffix == ".jsonl":
        rows = jsonl_rows(text, where)
    elif path.suffix in (".csv", ".tsv"):
        delimiters = "\t" if path.suffix == ".tsv" else ",;\t"
        rows = csv_rows(text, where, [_COLUMNS["prompt"]], _COLUMNS["prompt"], delimiters=delimiters)
    else:
        rows = [(number, dict(prompt=line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_item(row, number, path) for number, row in rows]


def _item(row: Mapping[str, Any], number: int, path: Path) -> Item:
    lower = {str(key).lower(): value for key, value in row.items()}
    found = {field: next((lower[n] for n in names if lower.get(n)), None) for field, names in _COLUMNS.items()}
    if not any(name in lower for name in _COLUMNS["prompt"]):
        raise InputError(f"{path}, line {number}: no column prompt; it has {', '.join(map(str, row))}")
    if not str(found["prompt"] or "").strip():
        raise InputError(f"{path}, line {number}: no prompt")
    return Item(
        prompt=check_prompt(str(found["prompt"]).strip(), f"{path}, line {number}"),
        group=str(found["group"] or "all"),
        reference=None if found["reference"] is None else path.parent / str(found["reference"]),
    )


def _coco(config: ConfigDict) -> list[Item]:
    path, folder = Path(config["annotations"]), Path(config["pictures"])
    if not path.is_file():
        raise InputError(f"evaluation.prompts.annotations={path}: no such file; it is COCO's captions_val2017.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    names = {picture["id"]: picture["file_name"] for picture in data["images"]}
    first: dict[int, str] = {}
    for annotation in sorted(data["annotations"], key=lambda annotation: annotation["id"]):
        first.setdefault(annotation["image_id"], annotation["caption"].strip())
    return [Item(prompt=caption, reference=folder / names[number]) for number, caption in sorted(first.items())]
