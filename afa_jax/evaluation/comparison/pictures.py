"""The pictures of one method on disk: made once, found again, never mixed up with those of a changed method."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from afa_jax.data.pictures import opened, save_png
from afa_jax.errors import InputError, printable
from afa_jax.evaluation.comparison.picture_files import find_folder, find_picture, write_method
from afa_jax.evaluation.comparison.prompts import Item
from afa_jax.files import replace_text, sweep
from afa_jax.methods.method import Method
from afa_jax.methods.options import SampleOptions
from afa_jax.progress import progress
from afa_jax.sampling.generation import Request, generate


def record_of(method: Method, options: SampleOptions) -> dict[str, Any]:
    """Return everything that determines a method's pictures: models, noise schedule and sampling options.

    It has the hashes of the method's files, but not their paths nor the method's name. It also leaves out the batch
    size and similar options, which change a picture only by rounding.
    """
    return dict(
        method=_without_paths(method.record),
        vae=method.shared.vae_hash,
        tokenizer=method.shared.tokenizer.sha256,
        dtype=str(jax.tree.leaves(method.shared.unet)[0].dtype),
        schedule=dataclasses.asdict(method.shared.schedule),
        size=list(options.size),
        steps=options.steps,
        guidance=float(options.guidance),
        eta=float(options.eta),
        sampler="ddim",
        **({} if options.guidance_interval == (0.0, 1.0) else dict(guidance_interval=list(options.guidance_interval))),
    )


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(own) for key, own in value.items() if key != "path"}
    return [_without_paths(own) for own in value] if isinstance(value, list) else value


class PictureFolder:
    """A folder of PNGs that is identified by the hash of their record, not by the method's name; see picture_files.py.

    Args:
        root: the parent of all methods' folders.
        record: record_of the method.
        name: the method's name, for people; its kind by default.
    """

    def __init__(self, root: Path, record: Mapping[str, Any], name: str | None = None):
        self.record = dict(record)
        self.name = str(self.record["method"]["kind"]) if name is None else name
        self.digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()
        self.folder = find_folder(root, self.name, self.digest)

    def path(self, item: Item, seed: int) -> Path:
        """Return the path of a picture, whether it exists or not."""
        return find_picture(self.folder, item.prompt, seed)

    def missing(self, items: Sequence[Item], seeds: Sequence[int]) -> list[tuple[Item, int]]:
        """Return the prompts and seeds whose pictures are missing or cannot be read."""
        return [(item, seed) for seed in seeds for item in items if not _readable(self.path(item, seed))]

    def make(self, method: Method, options: SampleOptions, items: Sequence[Item], seeds: Sequence[int]) -> int:
        """Make the missing pictures, each written atomically, and show progress; return the number made.

        Args:
            method, options: those of this folder's record; the method is not kept, because its networks are large.
            items, seeds: the prompts and seeds; each prompt gets a picture with each seed.
        """
        write_method(self.folder, self.name, self.record)
        missing = self.missing(items, seeds)
        if not missing:
            return 0
        sweep(self.folder)
        requests = [Request(prompt=item.prompt, number=item.number(seed)) for item, seed in missing]
        made = generate(requests, method.denoiser, method.experts, seed=0, options=options, announce=True)
        bar = progress(made, total=len(missing), unit="image", desc=printable(method.name, 80))
        for (item, seed), picture in zip(missing, bar, strict=True):
            recipe = dict(prompt=item.prompt, seed=seed, number=item.number(seed)) | self.record
            save_png(self.path(item, seed), picture.pixels, recipe)
        return len(missing)

    def kept(self, name: str, condition: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of ``measure``, kept in ``<name>.json`` by the pictures while ``condition`` is the same.

        The result and the condition are JSON values.
        """
        path, condition = self.folder / f"{name}.json", json.loads(json.dumps(condition))
        try:
            stored = json.loads(path.read_text())
            if stored["condition"] == condition:
                return dict(stored["measured"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        measured = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dict(condition=condition, measured=measured), indent=2) + "\n")
        return measured


def _readable(path: Path) -> bool:
    """Return whether a file is a readable picture: a power cut may leave an empty one."""
    try:
        with opened(path):
            return True
    except InputError:
        return False
