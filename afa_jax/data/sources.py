"""Picture sources: captioned pictures by number, whatever the files are."""

from __future__ import annotations

import importlib
import inspect
import io
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from afa_jax.data.files import FileSystem
from afa_jax.errors import InputError

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
KINDS = {
    "emoji": ("afa_jax.data.emoji.scenes", "SceneSource"),
    "folder": ("afa_jax.data.folder", "CaptionedFolder"),
    "tfds": ("afa_jax.data.tfds_source", "TFDSSource"),
    "tar": ("afa_jax.data.tar", "TarSource"),
    "parquet": ("afa_jax.data.parquet", "ParquetSource"),
}
LOADING = ("size", "flip", "bad", "workers")  # fields of config.data that are the loader's, see loader.loading
NARROW = 20  # long side / short side of a picture, at most


@runtime_checkable
class PictureSource(Protocol):
    """Random access to captioned pictures, pure in (its options, index), and picklable: workers get a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 ``[h, w, 3]`` (RGB, of any size) and ``caption``, at least.

        Raises:
            BadExample: the picture cannot be decoded, or there is no caption.
        """
        ...

    def name(self, index: int) -> str:
        """What messages call example ``index``: a file, a member of a tar, a row."""
        ...

    @property
    def fingerprint(self) -> str:
        """A sha256 that changes when the data set does; no picture is decoded for it."""
        ...


class BadExample(InputError):
    """An example without a readable picture or without a caption."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both in args: that is what pickles
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}; mend it, or leave such examples out with data.bad=skip"


def make_source(config: ConfigDict) -> PictureSource:
    """The source that ``config.kind`` names: emoji, folder, tfds, tar or parquet.

    The other fields are the source's arguments, except for those in LOADING. With ``bad`` "skip" a folder leaves bad
    examples to the loader: it is not verified, unless ``skip_unreadable`` asks for that.

    Raises:
        InputError: an unknown kind, or an argument the source refuses.
    """
    if config.kind not in KINDS:
        raise InputError(f"data.kind={config.kind!r}: choose {', '.join(KINDS)}")
    module, name = KINDS[config.kind]
    source = getattr(importlib.import_module(module), name)  # imported when asked for: some take a second
    arguments = {field: value for field, value in config.items() if field not in ("kind", *LOADING)}
    if config.kind == "folder" and config.get("bad") == "skip" and not config.get("skip_unreadable"):
        arguments["verify"] = False
    try:
        inspect.signature(source).bind(**arguments)
    except TypeError as error:
        raise InputError(f"data (kind {config.kind}): {error}") from error
    try:
        return source(**arguments)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"data: {error}") from error


def example(name: str, data: bytes, caption: Any) -> dict[str, Any]:
    """What a source gives for a picture file's bytes and a caption.

    Raises:
        BadExample: no caption, or not a picture.
    """
    return dict(image=decode(data, name), caption=check_caption(name, caption))


def check_caption(name: str, caption: Any) -> str:
    """The caption without white space around it; one that is no text, or nothing left of it, is a BadExample."""
    if caption is not None and not isinstance(caption, str):
        raise BadExample(name, f"the caption is no text ({caption!r:.40})")
    if caption is None or not caption.strip():
        raise BadExample(name, "no caption")
    return caption.strip()


def read_file(fs: FileSystem, path: str, name: str) -> bytes:
    """A file's bytes.

    Raises:
        BadExample: there is none, or it may not be read. A disk or a network that fails is no fault of the example's:
            that is an OSError.
    """
    try:
        return fs.cat_file(path)
    except PermissionError as error:
        raise BadExample(name, "not readable (PermissionError)") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadExample(name, f"no such file ({type(error).__name__})") from error


def decode(data: bytes, name: str, *, small: bool = False) -> np.ndarray:
    """A picture file's bytes as uint8 ``[h, w, 3]``: turned as its EXIF says, what is transparent on white.

    Args:
        small: only to see whether it can be read: a JPEG is decoded at a fraction of its size, which is faster.

    Raises:
        BadExample: not a whole picture of a format that Pillow knows; one of integers or floats of 32 bits, which have
            no white; one so narrow (above 20:1) that covering a crop would take gigabytes.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            if max(file.size) > NARROW * min(file.size):
                raise BadExample(name, f"{file.width} x {file.height} pixels, narrower than {NARROW}:1")
            if file.mode in ("I", "F"):
                raise BadExample(name, f"pixels of 32 bits (Pillow's mode {file.mode}); save it as 8 bits a channel")
            if small:
                file.draft("RGB", (64, 64))
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow would not scale but clip
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                canvas = Image.new("RGBA", picture.size, "white")
                canvas.alpha_composite(picture.convert("RGBA"))
                picture = canvas
            return np.asarray(picture.convert("RGB"))
    except (MemoryError, BadExample):
        raise
    except UnidentifiedImageError as error:
        raise BadExample(name, "not a readable picture (no format that Pillow knows)") from error
    except Exception as error:  # whatever Pillow's decoders stumble over in damaged bytes
        raise BadExample(name, f"not a readable picture ({error})") from error
