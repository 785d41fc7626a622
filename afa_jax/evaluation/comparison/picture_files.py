"""Paths of a comparison's pictures, readable and unique, and their index.

A picture is ``pictures/<method>-<hash>/<prompt>-<hash>_seed<seed>.png``. ``method.json`` in each folder says how its
pictures were made. ``pictures/index.json`` lists the methods, prompts and seeds that are compared. The words of a name
have letters and digits only, which every file system allows. The hash covers everything that decides the picture, and
makes the name unique.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa_jax.errors import InputError
from afa_jax.files import alone_in, replace_text, writing
from afa_jax.json_files import read_object

PICTURES, INDEX, METHOD = "pictures", "index.json", "method.json"
_LONGEST = 60  # letters of a name before its hash
_AGAIN = "remove it, and make it again with afa_jax.evaluate"


def slug(text: str) -> str:
    """Return text as part of a file name: at most 60 ASCII letters and digits with "_" between them; may be empty."""
    plain = unicodedata.normalize("NFKD", text[: 4 * _LONGEST]).encode("ascii", "ignore").decode()
    return re.sub(r"[^0-9A-Za-z.+=]+", "_", plain).strip("_.")[:_LONGEST].rstrip("_.")


def find_picture(folder: Path, prompt: str, seed: int) -> Path:
    """Return a picture's path, whether it exists or not; pictures of earlier project versions have shorter names."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    former = folder / f"{digest}_{seed}.png"
    return former if former.is_file() else folder / f"{_joined(slug(prompt), digest)}_seed{seed}.png"


def find_folder(root: Path, name: str, digest: str) -> Path:
    """Return the folder of the pictures with this ``digest``: the existing one, or a new one with this name."""
    there = sorted(path for path in root.glob(f"*-{digest[:12]}") if path.is_dir())
    return there[0] if there else root / _joined(slug(name), digest[:12])


def _joined(words: str, digest: str) -> str:
    return f"{words or 'x'}-{digest}"


def write_index(
    root: Path, *, methods: Sequence[str], prompts: Sequence[str], examples: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write an index of the pictures below ``root``, the same for every process that makes some of them.

    Args:
        methods: names in the order of the comparison; other names from an earlier process stay after them.
        prompts: all prompts.
        examples: the prompts that are shown.
        seeds: all seeds; the first one is shown.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with alone_in(root):
            try:
                before = read_index(root)["methods"]
            except InputError:  # none yet, or broken
                before = []
            names = list(dict.fromkeys([*methods, *before]))
            text = json.dumps(
                dict(version=1, methods=names, examples=[*examples], prompts=[*prompts], seeds=[*seeds]), indent=1
            )
            replace_text(root / INDEX, text + "\n")


def read_index(root: Path) -> dict[str, list[Any]]:
    """Return the index that write_index wrote.

    Raises:
        InputError: there is no index, or the file is something else.
    """
    found = read_object(root / INDEX, "name a folder that afa_jax.evaluate made, its --out")
    kinds = dict(methods=str, examples=str, prompts=str, seeds=int)
    for field, kind in kinds.items():
        values = found.get(field)
        missing = not values and field != "examples"  # a comparison may list no pictures
        if not isinstance(values, list) or missing or not all(isinstance(value, kind) for value in values):
            raise InputError(f"{root / INDEX}: {field} is missing or no list of {kind.__name__}; {_AGAIN}")
    return {field: found[field] for field in kinds}


def write_method(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the record of a folder's pictures, and the method's names in this and earlier comparisons."""
    path = folder / METHOD
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            try:
                names = _names(path)
            except InputError:  # none yet, or broken
                names = []
            replace_text(path, json.dumps(dict(names=[*names, *({name} - {*names})]) | dict(record), indent=2) + "\n")


def folders_by_name(root: Path) -> dict[str, Path]:
    """Return the folders of pictures below ``root`` by the names of their methods.

    If several folders have one name, because a method was changed, return the one used last.

    Raises:
        InputError: a method.json cannot be read.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.glob(f"*/{METHOD}"), key=lambda path: (path.stat().st_mtime_ns, path)):
        found |= dict.fromkeys(_names(path), path.parent)
    return found


def _names(path: Path) -> list[str]:
    names = read_object(path, _AGAIN).get("names", [])  # earlier versions of the project wrote none
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: names is no list of names; {_AGAIN}")
    return names
