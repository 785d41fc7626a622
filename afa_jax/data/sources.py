"""Picture sources: random access to captioned pictures, whatever their file format."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import posixpath
import re
from typing import Any, Protocol, runtime_checkable

from fsspec.implementations.local import LocalFileSystem
from ml_collections import ConfigDict

from afa_jax.data.decode import MAX_PIXELS, decode
from afa_jax.data.files import FileSystem
from afa_jax.errors import BadExample, InputError

SOURCE_CLASSES = {
    "emoji": ("afa_jax.data.emoji.scenes", "SceneSource"),
    "folder": ("afa_jax.data.folder", "CaptionedFolder"),
    "tfds": ("afa_jax.data.tfds_source", "TFDSSource"),
    "tar": ("afa_jax.data.tar", "TarSource"),
    "parquet": ("afa_jax.data.parquet", "ParquetSource"),
}
LOADING = ("size", "flip", "bad", "workers")  # the loader's fields of config.data, see loader.loading
LONGEST_CAPTION = 50_000  # the most characters; text encoders read 77 tokens
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs, which have no UTF-8


@runtime_checkable
class PictureSource(Protocol):
    """Random access to captioned pictures, pure in (its options, index), and picklable: workers get a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return at least ``image``, uint8 ``[h, w, 3]`` (RGB, of any size), and ``caption``.

        Raises:
            BadExample: the picture cannot be decoded, or there is no caption.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of example ``index`` for messages: a file, a member of a tar, a row."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return a sha256 that changes when the data set does; no picture is decoded for it."""
        ...


def make_source(config: ConfigDict) -> PictureSource:
    """Make the source that ``config.kind`` names: emoji, folder, tfds, tar or parquet.

    The other fields are the source's arguments, except for those in LOADING. With ``bad`` "skip" a folder leaves bad
    examples to the loader: it is not verified, unless ``skip_unreadable`` asks for that.

    Raises:
        InputError: an unknown kind, or an argument the source refuses.
    """
    if config.kind not in SOURCE_CLASSES:
        raise InputError(f"data.kind={config.kind!r}: choose {', '.join(SOURCE_CLASSES)}")
    module, name = SOURCE_CLASSES[config.kind]
    source = getattr(importlib.import_module(module), name)  # imported on demand: some take a second
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


def example(name: str, data: bytes, caption: Any, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Return a source's example, made of a picture file's bytes and a caption.

    Raises:
        BadExample: no caption, or not a picture.
    """
    return dict(caption=check_caption(name, caption), image=decode(data, name, max_pixels=max_pixels))


def check_caption(name: str, caption: Any) -> str:
    """Return the caption without white space around it.

    Raises:
        BadExample: it is no text, empty, too long for a caption, or has characters that no text can have.
    """
    if caption is not None and not isinstance(caption, str):
        raise BadExample(name, f"the caption is no text ({caption!r:.40})")
    if caption is None or not (caption := caption.strip()):
        raise BadExample(name, "no caption")
    if len(caption) > LONGEST_CAPTION:
        raise BadExample(name, f"a caption of {len(caption):,} characters, more than {LONGEST_CAPTION:,}")
    if found := _NO_TEXT.search(caption):
        raise BadExample(
            name, f"the caption has U+{ord(found[0]):04X}, which no text has, at character {found.start()}"
        )
    return caption


def path_below(folder: str, name: str) -> str:
    """Return the path of a file that a list names below a folder.

    Raises:
        BadExample: the name leads out of the folder. Links in the folder, which its owner made, may do so.
    """
    tidy = posixpath.normpath(name.removeprefix(f"{folder}/"))
    if tidy == ".." or tidy.startswith(("/", "../")):
        raise BadExample(name, "names a file outside of the folder; put it there, or a link to it")
    return posixpath.join(folder, tidy)


def read_file(fs: FileSystem, path: str, name: str, longest: int) -> bytes:
    """Return a file's bytes.

    Raises:
        BadExample: there is no such file, it may not be read, or it has more than ``longest`` bytes.
        OSError: a disk or a network fails, which is no fault of the example's.
    """
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise BadExample(name, "no file but a folder, a pipe or a device")
    try:
        data = fs.cat_file(path, end=longest + 1)
    except PermissionError as error:
        raise BadExample(name, "not readable (PermissionError)") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadExample(name, f"no such file ({type(error).__name__})") from error
    except ValueError as error:  # half of a surrogate pair, or NUL
        raise BadExample(name, f"no file can have that name ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BadExample(name, f"no such file ({error.strerror})") from error
    if len(data) > longest:
        raise BadExample(name, f"a file of more than {longest:,} bytes, which no picture of data.max_pixels has")
    return data
