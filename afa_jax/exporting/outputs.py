"""Where a model may be written to, looked at before JAX is imported."""

from __future__ import annotations

import re
from pathlib import Path

from afa_jax.errors import InputError
from afa_jax.files import check_new
from afa_jax.weights.formats.foreign_files import PICKLES

_OF_FILES = re.compile(
    r"\.(safetensor|sft|gguf|ggml|onnx|msgpack|h5|npz|npy|tflite|pb|zip|tar|gz|tgz|xz|7z|txt|jsonl?|ya?ml|toml|csv|md|html"
    r"|log|py|sh|pdf|parquet|png|jpe?g|webp|avif|gif|bmp|tiff?)"
)
"""Endings of files, which nobody means for a folder."""


def check_model(path: Path, overwrite: bool | None = None) -> None:
    """As check_new, of a model: one file that ends in .safetensors, else a folder, whose name is no other file's.

    Raises:
        InputError: as check_new; it ends like a file of another kind. A folder may have dots, as ``sd-v1.5``.
    """
    ending = path.suffix.lower()
    if (ending in PICKLES or _OF_FILES.fullmatch(ending)) and not path.is_dir():
        what = "pickles are not written" if ending in PICKLES else "a model is written as safetensors, or as a folder"
        raise InputError(f"{path}: {what}; end it in .safetensors, or leave {path.suffix} out for a folder")
    check_new(path, overwrite)
