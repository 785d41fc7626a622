"""A folder of pictures with captions, on disk or in a bucket."""

from __future__ import annotations

import csv
import functools
import io
import json
import posixpath
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from afa_jax.data.files import digest, filesystem, find, join
from afa_jax.data.sources import PICTURES, BadExample, check_caption, decode, example, read_file
from afa_jax.errors import InputError

Items = list[tuple[str, str | None]]
"""(file name below the folder, caption); None is a caption in the .txt beside the picture, read when asked for."""


class CaptionedFolder:
    """Pictures with captions. The captions are one of three things, and which is found out.

    * ``captions.jsonl``: ``{"file_name": ..., "text": ...}`` a line;
    * ``captions.csv``: columns ``file_name`` and ``text``;
    * a ``.txt`` beside each picture, also in folders below.

    Args:
        path: a folder, or an fsspec URL of one such as ``gs://bucket/folder``.
        captions: "jsonl", "csv" or "txt", where a folder has several; "" finds out.
        verify: open every picture and caption at the start, so that a bad one shows before the run and not hours
            into it. Takes minutes for ten thousand pictures: set it to False for large folders and buckets. With
            data.bad=skip make_source does.
        skip_unreadable: where ``verify`` finds bad ones, leave them out, with a warning that names them, instead of
            stopping.

    Raises:
        InputError: no such folder, captions that are missing, malformed or ambiguous, or what ``verify`` finds.
    """

    def __init__(self, path: str, *, captions: str = "", verify: bool = True, skip_unreadable: bool = False):
        self.fs, self.root = filesystem(str(path))
        if not self.fs.isdir(self.root):
            raise InputError(f"{path}: no such folder")
        readers: dict[str, Callable[[], Items]] = dict(jsonl=self._jsonl, csv=self._csv, txt=self._beside)
        if captions and captions not in readers:
            raise InputError(f"data.captions={captions!r}: choose {', '.join(readers)}, or '' to find out")
        self.items: Items = readers[captions or self._find_out()]()
        if verify:
            self._verify(skip_unreadable)
        if not self.items:
            raise InputError(f"{path}: no readable picture with a caption")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"CaptionedFolder({self.root!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``image`` uint8 ``[h, w, 3]`` and ``caption``."""
        return example(self.name(index), *self.read(index))

    def name(self, index: int) -> str:
        """The file's name below the folder."""
        return self.items[index][0]

    def read(self, index: int) -> tuple[bytes, str]:
        """The picture's bytes, not decoded, and its caption.

        Raises:
            BadExample: the picture's file or the caption is missing.
        """
        name = self.name(index)
        caption = check_caption(name, self._caption(index))
        return read_file(self.fs, join(self.root, name), name), caption

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all names, sizes and captions."""
        listed = find(self.fs, self.root)

        def facts(index: int) -> tuple[str, int | None, str | None]:
            name = self.name(index)
            path = join(self.root, posixpath.normpath(name))
            try:
                caption = self._caption(index)
            except BadExample as error:
                caption = error.reason
            try:
                return name, listed[path] if path in listed else self.fs.size(path), caption
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return name, None, caption

        with ThreadPoolExecutor(16) as pool:
            return digest(pool.map(facts, range(len(self))))

    def _caption(self, index: int) -> str | None:
        name, caption = self.items[index]
        if caption is not None:
            return caption
        try:
            return self.fs.cat_file(join(self.root, _text_beside(name))).decode("utf-8-sig")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise BadExample(name, f"{_text_beside(name)} is not UTF-8") from error
        except (PermissionError, IsADirectoryError) as error:
            raise BadExample(name, f"{_text_beside(name)} is not readable ({type(error).__name__})") from error

    def _find_out(self) -> str:
        found = [kind for kind in ("jsonl", "csv") if self.fs.isfile(f"{self.root}/captions.{kind}")]
        if found:
            items = self._jsonl() if found == ["jsonl"] else self._csv() if found == ["csv"] else []
            if items and self.fs.isfile(join(self.root, _text_beside(items[0][0]))):
                found.append("txt")
        if len(found) > 1:
            raise InputError(
                f"{self.root}: captions twice, in captions.{found[0]} and in "
                f"{'captions.csv' if found[1] == 'csv' else '.txt files'}; remove one, or choose with data.captions"
            )
        return found[0] if found else "txt"

    def _text(self, name: str) -> str:
        try:
            return self.fs.cat_file(f"{self.root}/{name}").decode("utf-8-sig")
        except FileNotFoundError as error:
            raise InputError(f"{self.root}/{name}: no such file") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.root}/{name}: not UTF-8 ({error})") from error

    def _jsonl(self) -> Items:
        items: Items = []
        for number, line in enumerate(self._text("captions.jsonl").split("\n"), 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                    name, text = entry["file_name"], entry["text"] or ""
                    if not (isinstance(name, str) and isinstance(text, str)):
                        raise TypeError(f"not text: {name!r}, {text!r:.40}")
                    items.append((name, text))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{self.root}/captions.jsonl, line {number}: expected file_name and text ({error!r})"
                    ) from error
        return items

    def _csv(self) -> Items:
        rows = csv.DictReader(io.StringIO(self._text("captions.csv"), newline=""))
        try:
            return self._rows(rows)
        except csv.Error as error:
            raise InputError(f"{self.root}/captions.csv, line {rows.reader.line_num}: {error}") from error

    def _rows(self, rows: csv.DictReader[str]) -> Items:
        if not {"file_name", "text"} <= set(rows.fieldnames or ()):
            columns = ", ".join(rows.fieldnames or ()) or "none"
            raise InputError(f"{self.root}/captions.csv: expected columns file_name and text, there are: {columns}")
        items: Items = []
        for row in rows:
            if not row["file_name"]:
                raise InputError(f"{self.root}/captions.csv, line {rows.line_num}: no file_name")
            items.append((row["file_name"], row["text"] or ""))
        return items

    def _beside(self) -> Items:
        names = [posixpath.relpath(path, self.root) for path in sorted(find(self.fs, self.root))]
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        pictures = [name for name in names if posixpath.splitext(name)[1].lower() in PICTURES]
        if not set(names).intersection(_text_beside(name) for name in pictures):
            raise InputError(f"{self.root}: no captions.jsonl, no captions.csv and no .txt beside a picture")
        return [(name, None) for name in pictures]

    def _verify(self, skip: bool) -> None:
        kept, bad = [], []
        for index, item in enumerate(self.items):
            try:
                decode(self.read(index)[0], self.name(index), small=True)
                kept.append(item)
            except BadExample as error:
                if not skip:
                    raise InputError(
                        f"{join(self.root, error.name)}: {error.reason}; mend it, or leave such examples "
                        "out with data.bad=skip or data.skip_unreadable"
                    ) from error
                bad.append(error.name)
        self.items = kept
        if bad:
            warnings.warn(f"{self.root}: left out {len(bad)} unreadable pictures: {', '.join(bad)}", stacklevel=3)


def _text_beside(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
