"""TFDS builders of captioned pictures: JourneyDB, COCO captions, any captioned folder. None needs tensorflow.

``python -m afa_jax.prepare`` runs them. They store the picture files as they are, without decoding them again. They
leave out pictures that are unreadable or have no caption, and name them in ``left_out``.
"""

from __future__ import annotations

import abc
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from afa_jax.data.decode import MAX_PIXELS, check_max_pixels, decode, longest_file
from afa_jax.data.files import FileSystem, filesystem, find
from afa_jax.data.folder import CaptionedFolder
from afa_jax.data.sources import check_caption, path_below, read_file
from afa_jax.errors import BadExample, InputError, printable, why

Splits = Mapping[str, Iterable[tuple[str, Any]]]


class CaptionedPictures(tfds.core.GeneratorBasedBuilder):
    """The builders' base class, with the features ``image``, ``caption``, ``file_name``; it leaves out bad examples.

    Args:
        source: the folder, or fsspec URL, of the download.
        text: the text that becomes the caption, if there are several: one of the class's ``TEXTS``.
        max_pixels: the most pixels of a picture; larger ones are left out.
        **kwargs: the arguments of tfds.core.GeneratorBasedBuilder, such as data_dir.

    Raises:
        InputError: the source is not laid out as expected.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "image, caption, file_name"}
    TEXTS: ClassVar[tuple[str, ...]] = ()
    ANY_TEXT: ClassVar[bool] = False
    """Whether ``text`` may be the name of any column."""

    def __init__(self, *, source: str, text: str = "", max_pixels: int = MAX_PIXELS, **kwargs: Any):
        if text and text not in self.TEXTS and not self.ANY_TEXT:
            raise InputError(
                f"--text {text}: {self.name} knows {', '.join(self.TEXTS) or 'one text only; leave it out'}"
            )
        self.max_pixels = check_max_pixels(max_pixels)
        self.source, self.text = source, text or next(iter(self.TEXTS), "")
        self.left_out: list[BadExample] = []
        self.taken = 0
        self.found = self.splits()
        super().__init__(file_format="array_record", **kwargs)

    @abc.abstractmethod
    def splits(self) -> Splits:
        """Return, for each split, pairs of a file name and a caption, or what ``read`` makes a caption of."""

    @abc.abstractmethod
    def read(self, split: str, name: str, caption: Any) -> tuple[bytes, str]:
        """Return a picture's bytes and its caption, or raise BadExample."""

    def _file(self, folder: str, name: str) -> bytes:
        return read_file(self.fs, path_below(folder, name), name, longest_file(self.max_pixels))

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=f"{self.__doc__} Caption: {self.text or 'the only one'}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), doc="the file as it was"),
                    "caption": tfds.features.Text(),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in self.found}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        # The key is a number, not a name: captions may name one picture twice. TFDS orders by a hash of it, in bounded
        # memory; kept in order, everything would have to fit.
        for key, (name, caption) in enumerate(self.found[split]):
            try:
                data, text = self.read(split, name, caption)
                decode(data, name, max_pixels=self.max_pixels, small=True)
            except BadExample as error:
                self.left_out.append(error)
                continue
            self.taken += 1
            yield key, dict(image=data, caption=text, file_name=printable(name))


class JourneyDB(CaptionedPictures):
    """JourneyDB (Sun et al. 2023, arXiv 2307.00716), as far as its pictures were unpacked.

    Expected: ``data/train/*anno*.jsonl``, of which the one with "repath" in its name knows the published folders, and
    ``data/train/imgs/000/*.jpg`` ...; the same for ``valid``. A line has ``img_path``, ``prompt`` (what Midjourney was
    asked for) and, mostly, ``Task2.Caption`` (GPT-3.5's sentence about it). Pictures of archives that were not unpacked
    are passed over, not counted as left out.
    """

    name = "journeydb"
    TEXTS = ("prompt", "caption")

    def splits(self) -> Splits:
        self.fs, root = filesystem(self.source)
        self.folders, found = {}, {}
        for split in ("train", "valid"):
            for folder in (f"{root}/data/{split}", f"{root}/{split}"):
                annotations = sorted(self.fs.glob(f"{folder}/*anno*.jsonl"), key=lambda path: "repath" not in path)
                if annotations and self.fs.isdir(f"{folder}/imgs"):
                    self.folders[split] = f"{folder}/imgs"
                    found[split] = self._annotations(annotations[0], f"{folder}/imgs")
                    break
        if not found:
            raise InputError(
                f"{self.source}: no data/train with *anno*.jsonl and imgs/ in it; unpack the .tgz files there"
            )
        return found

    def _annotations(self, path: str, folder: str) -> Iterator[tuple[str, Any]]:
        there = {posixpath.relpath(file, folder) for file in find(self.fs, folder)}
        with self.fs.open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    name = posixpath.normpath(entry["img_path"])
                    text = entry.get("prompt") if self.text == "prompt" else (entry.get("Task2") or {}).get("Caption")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: expected img_path and texts ({why(error)})") from error
                if name in there:
                    yield name, text

    def read(self, split: str, name: str, caption: Any) -> tuple[bytes, str]:
        caption = check_caption(name, caption)
        return self._file(self.folders[split], name), caption


class CocoCaptions(CaptionedPictures):
    """COCO captions (Chen et al. 2015, arXiv 1504.00325): a picture once, with the caption of the lowest id.

    Expected: ``annotations/captions_<split>.json`` and the pictures in ``<split>/`` or ``images/<split>/``, with splits
    such as train2017 and val2017; one whose pictures are not there is passed over.
    """

    name = "coco_pairs"  # TFDS itself has coco and coco_captions

    def splits(self) -> Splits:
        self.fs, root = filesystem(self.source)
        self.folders, found = {}, {}
        for path in sorted(self.fs.glob(f"{root}/annotations/captions_*.json")):
            split = posixpath.basename(path).removeprefix("captions_").removesuffix(".json")
            for folder in (f"{root}/{split}", f"{root}/images/{split}"):
                if self.fs.isdir(folder):
                    self.folders[split], found[split] = folder, list(_coco_captions(self.fs, path))
                    break
        if not found:
            raise InputError(f"{self.source}: no annotations/captions_<split>.json with a folder <split> of pictures")
        return found

    def read(self, split: str, name: str, caption: Any) -> tuple[bytes, str]:
        caption = check_caption(name, caption)
        return self._file(self.folders[split], name), caption


class CaptionedFolderPictures(CaptionedPictures):
    """A folder of pictures as CaptionedFolder reads it, all of it the split train; ``text``: the column of its list."""

    name = "captioned_folder"
    ANY_TEXT = True

    def splits(self) -> Splits:
        self.folder = CaptionedFolder(self.source, text=self.text or "text", verify=False, max_pixels=self.max_pixels)
        return {"train": ((self.folder.name(index), index) for index in range(len(self.folder)))}

    def read(self, split: str, name: str, caption: Any) -> tuple[bytes, str]:
        return self.folder.read(caption)


def _coco_captions(fs: FileSystem, path: str) -> Iterator[tuple[str, str | None]]:
    try:
        whole = json.loads(fs.cat_file(path))
        names = {picture["id"]: picture["file_name"] for picture in whole["images"]}
        if odd := [name for name in names.values() if not isinstance(name, str)]:
            raise TypeError(f"a file_name is no text but {odd[0]!r:.40}")
        first: dict[Any, str] = {}
        for annotation in sorted(whole["annotations"], key=lambda annotation: annotation["id"]):
            first.setdefault(annotation["image_id"], annotation["caption"])
        return ((names[picture], first.get(picture)) for picture in sorted(names))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not COCO's captions ({why(error)})") from error
