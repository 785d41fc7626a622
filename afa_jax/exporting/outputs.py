"""Options and output paths of an export, checked before JAX is imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.files import check_new
from afa_jax.weights.formats.foreign_files import PICKLES

_OF_FILES = re.compile(
    r"\.(safetensor|sft|gguf|ggml|onnx|msgpack|h5|npz|npy|tflite|pb|zip|tar|gz|tgz|xz|7z|txt|jsonl?|ya?ml|toml|csv|md|html"
    r"|log|py|sh|pdf|parquet|png|jpe?g|webp|avif|gif|bmp|tiff?)"
)
"""File name endings that nobody would give to a folder."""


def check_model(path: Path, overwrite: bool | None = None) -> None:
    """Check, as check_new, a model's path: one file that ends in .safetensors, or else a folder.

    Raises:
        InputError: as check_new; or the name ends like a file of another kind. A folder may have dots, as ``sd-v1.5``.
    """
    ending = path.suffix.lower()
    if (ending in PICKLES or _OF_FILES.fullmatch(ending)) and not path.is_dir():
        what = "pickles are not written" if ending in PICKLES else "a model is written as safetensors, or as a folder"
        raise InputError(f"{path}: {what}; end it in .safetensors, or leave {path.suffix} out for a folder")
    check_new(path, overwrite)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """The wanted exports of an ensemble: one or more of ``pair``, ``snapshot`` and ``bake``.

    Attributes:
        pair: the folder to write the trained pair to, with its model card.
        snapshot: one static model, a file or folder.
        bake: the name of an expert, and a file or folder for it with its LoRAs.
        workdir: the folder or hub id of the trained run.
        license: the pair's licence, as the hub spells it.
        report: the report.json of a comparison of this run, for the card's figures.
        picture: PNGs for the card, instead of samples/.
        with_config: whether to write config.py into the pair.
        pairs: held-out pictures for the snapshot: half for its weights, half for its loss.
        draws: the number of timesteps and noises for each of them.
        seed: the seed of the choice of pairs.
        dtype: the dtype of the written weights; None keeps the stored one.
        overwrite: replace an existing output.
    """

    pair: Path | None = None
    snapshot: Path | None = None
    bake: tuple[str, Path] | None = None
    workdir: Path | None = None
    license: str | None = None
    report: Path | None = None
    picture: Sequence[Path] = ()
    with_config: bool = False
    pairs: int = 64
    draws: int = 4
    seed: int = 0
    dtype: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise InputError for options that exclude each other, or outputs that cannot be written."""
        if not (self.pair or self.snapshot or self.bake):
            raise InputError("nothing to export: give --pair, --snapshot or --bake")
        if (self.pair or self.snapshot) and not self.workdir:
            raise InputError(
                "--workdir is missing; --pair and --snapshot need the workdir of a trained run, or its hub id"
            )
        if not self.pair and (self.license or self.report or self.picture or self.with_config):
            raise InputError("--license, --report, --picture and --with_config go with --pair")
        if self.pairs < 2 or self.draws < 1:
            raise InputError("choose --pairs of 2 or more and --draws of 1 or more")
        outs = [Path(out) for out in (self.pair, self.snapshot, self.bake and self.bake[1]) if out]
        if len({out.resolve() for out in outs}) < len(outs):
            raise InputError("two of --pair, --snapshot and --bake have one name; choose another")
        if self.pair and self.pair.suffix.lower() == ".safetensors":
            raise InputError(f"--pair {self.pair}: a pair is a folder; leave .safetensors out")
        for out in outs:
            check_model(out, self.overwrite)
