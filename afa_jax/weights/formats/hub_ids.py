"""Ids of models on the Hugging Face hub: ``owner/name``, ``owner/name/file.safetensors``, ``...@revision``."""

from __future__ import annotations

import os
import re

from afa_jax.errors import InputError
from afa_jax.weights.formats.foreign_files import PICKLES
from afa_jax.weights.formats.wrong_places import meant

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]*[^@/]))?(?:@(?P<revision>[^@]+))?")
_FILES = (*PICKLES, ".safetensors", ".msgpack")


def check_named(path: str, revision: str | None = None) -> None:
    """Raise InputError for a model that is not here and that the hub cannot have."""
    if not os.path.exists(path):
        parse_id(path, revision)


def parse_id(path: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """Return the repository, file and revision on the hub that a path names, for a path that is not here.

    Raises:
        InputError: it can be no hub id, or names a pickle or two revisions.
    """
    match = _ID.fullmatch(path)
    if not match or ".." in path or match["repo"].endswith(_FILES):
        raise InputError(f"{path}: no such file or folder{meant(path)}, and not a hub id like owner/name")
    if match["file"] and not match["file"].endswith(_FILES):
        raise InputError(
            f"{path}: no such file or folder{meant(path)}, and not a file on the hub like owner/name/file.safetensors"
        )
    if match["file"] and match["file"].endswith(PICKLES):
        raise InputError(f"{path}: no such file, and pickles are not downloaded; take a .safetensors file")
    if revision and match["revision"] not in (None, revision):
        raise InputError(f"{path}: two revisions, {match['revision']!r} and {revision!r}; name one")
    return match["repo"], match["file"], match["revision"] or revision
