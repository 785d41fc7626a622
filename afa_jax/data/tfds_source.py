"""A prepared TFDS data set in array_record, read at random and without tensorflow."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from afa_jax.data.decode import MAX_PIXELS, check_max_pixels
from afa_jax.data.files import digest
from afa_jax.data.sources import example
from afa_jax.errors import BadExample, InputError, why

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError)
"""Exceptions that TFDS raises on damaged files."""


class TFDSSource:
    """Captioned pictures of a data set that TFDS has prepared, such as ``afa_jax.prepare`` makes.

    Args:
        name: the data set, "coco_captions/2017" or "journeydb:1.0.0"; "" if ``data_dir`` is its folder itself, the
            one with dataset_info.json.
        data_dir: the folder, or gs:// URL, that holds data sets; "" is TFDS's own (TFDS_DATA_DIR).
        split: in TFDS's notation: "train", "train[:10000]".
        image: the feature that holds the picture.
        caption: the feature that holds the caption, "captions/text" for one within another; of several captions the
            first.
        max_pixels: the most pixels of a picture; larger pictures are bad examples and are not decoded.

    Raises:
        InputError: no such data set, split or feature, or one that was not prepared as array_record;
            files that are missing or truncated.
    """

    def __init__(
        self,
        name: str = "",
        data_dir: str = "",
        split: str = "train",
        image: str = "image",
        caption: str = "caption",
        max_pixels: int = MAX_PIXELS,
    ):
        import tensorflow_datasets as tfds  # takes a second
        from google.protobuf import json_format
        from tensorflow_datasets.core import read_only_builder
        from tensorflow_datasets.core.dataset_info import DatasetInfoFileError

        if not (name or data_dir):
            raise InputError("data: give the data set's name, its data_dir, or both")
        self.split, self.image, self.caption = split, image, caption
        self.max_pixels = check_max_pixels(max_pixels)
        place = "/".join(filter(None, (data_dir, name)))
        _check_features(place if data_dir else f"{tfds.core.constants.DATA_DIR}/{name}")
        try:
            # Both read only the files; tfds.builder would first look for the code that made the data set, which may
            # import tensorflow.
            if name:
                self._builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
            else:
                self._builder = read_only_builder.builder_from_directory(data_dir)
        except (tfds.core.DatasetNotFoundError, DatasetInfoFileError) as error:
            raise InputError(
                f"{place}: no prepared data set; make it with python -m afa_jax.prepare, or with TFDS"
            ) from error
        except (*_DAMAGE, json_format.ParseError) as error:
            raise InputError(f"{place}: its .json files are damaged ({why(error)}); prepare it again") from error
        features = self._builder.info.features
        for feature in (image, caption.split("/")[0] if caption not in features else caption):
            if feature not in features:
                raise InputError(f"{place}: no feature {feature!r}, there are: {', '.join(features)}")
        try:
            # TFDS decodes by OpenCV where that is installed; Pillow is always here.
            self._records = self._builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            self._length = len(self._records)
        except NotImplementedError as error:
            raise InputError(f"{place}: prepared as {self._builder.info.file_format}, not array_record") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            splits = ", ".join(self._builder.info.splits)
            raise InputError(f"{place}: no split {split!r}; there are: {splits}") from error
        for index in {0, self._length - 1} if self._length else ():  # one of the first file and one of the last
            self._read(index)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"TFDSSource({str(self._builder.data_dir)!r}, {self.split!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, uint8 ``[h, w, 3]``, and ``caption``."""
        record = self._read(index)
        caption = record
        for key in [self.caption] if self.caption in record else self.caption.split("/"):
            caption = caption[key]
        several = np.ravel(np.asarray(caption, object))
        first = several[0] if several.size else b""
        try:
            text = first.decode() if isinstance(first, bytes) else str(first)
        except UnicodeDecodeError as error:
            raise BadExample(self._name(index, record), "the caption is not UTF-8") from error
        return example(self._name(index, record), record[self.image], text, self.max_pixels)

    def name(self, index: int) -> str:
        """Return the record's name, with its file's name where the data set has a feature ``file_name``."""
        return self._name(index, self._read(index))

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except (*_DAMAGE, RuntimeError) as error:
            reason = why(error)
            raise InputError(
                f"{self._builder.data_dir}: record {index} of {self.split} is not readable ({reason}); prepare it again"
            ) from error

    def _name(self, index: int, record: dict[str, Any]) -> str:
        file = record.get("file_name", b"")
        return f"{self._builder.name}/{self.split}[{index}]" + (
            f" ({file.decode(errors='backslashreplace')})" if file else ""
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of TFDS's own records of the data set, the sizes of its files, the split and the features."""
        from etils import epath

        files = sorted(epath.Path(self._builder.data_dir).iterdir(), key=lambda file: file.name)
        limit = [] if self.max_pixels == MAX_PIXELS else [self.max_pixels]
        return digest(
            [
                [self.split, self.image, self.caption, *limit],
                *([file.name, file.stat().length] for file in files),
                *(file.read_text() for file in files if file.suffix == ".json"),
            ]
        )


def _check_features(place: str) -> None:
    """Check that a data set's features are TFDS's own; for others TFDS imports the module that features.json names.

    Raises:
        InputError: one is not, or a features.json below the data set's folder is damaged.
    """
    from etils import epath

    for path in _feature_files(epath.Path(re.sub(r":[^:/]*$", "", place))):
        try:
            kinds = [*_kinds(json.loads(path.read_bytes()))]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: damaged ({why(error)}); prepare the data set again") from error
        for kind in kinds:
            if not kind.startswith("tensorflow_datasets.core.features."):
                raise InputError(f"{path}: a feature of the class {kind!r:.200}; only TFDS's own are read")


def _feature_files(folder: Any) -> Iterator[Any]:
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name == "features.json":
                yield path
            elif "array_record" not in path.name and path.suffix != ".json":
                yield from _feature_files(path)


def _kinds(value: Any) -> Iterator[str]:
    """Yield the class names found anywhere in a JSON value."""
    for key, own in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key in ("pythonClassName", "python_class_name", "type") and isinstance(own, str):
            yield own
        yield from _kinds(own)
