"""A folder of pictures with captions, on disk or in a bucket."""

from __future__ import annotations

import functools
import itertools
import posixpath
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from afa_jax.data.decode import MAX_PIXELS, PICTURES, check_max_pixels, decode, longest_file
from afa_jax.data.files import below, digest, filesystem, find, hidden
from afa_jax.data.sources import check_caption, example, path_below, read_file
from afa_jax.data.tables import csv_rows, decode_text, jsonl_rows
from afa_jax.errors import BadExample, InputError, printable, some

LISTS = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".caption")
LONGEST_TEXT = 1 << 20  # bytes of a text beside a picture


class CaptionedFolder:
    """Pictures of a folder with captions, whose form is found automatically.

    It is one of these:

    * ``captions.jsonl`` or, as Hugging Face's imagefolder has it, ``metadata.jsonl``: ``{"file_name": ..., "text":
      ...}`` a line;
    * ``captions.csv`` or ``metadata.csv``: columns ``file_name`` and ``text``;
    * a ``.txt`` or ``.caption`` beside each picture, also in folders below: ``0.txt`` or ``0.png.txt`` of ``0.png``.

    One warning names what does not match: rows without a picture, pictures without a row, captioned files that
    are no pictures. A name in a list must be that of a file below the folder, else it is a bad example. Links in the
    folder are followed. Files of the operating system (names that begin with a dot, __MACOSX) are passed over.

    Args:
        path: a folder, or an fsspec URL of one such as ``gs://bucket/folder``.
        captions: "jsonl", "csv", "txt", "caption", or a list's name, if a folder has several; "" finds it.
        text: the column, or key, of captions in a list.
        verify: open every picture and caption at the start, so that a bad one is found before the run and not hours
            into it. This takes minutes for ten thousand pictures: set it to False for large folders and buckets.
            With data.bad=skip make_source sets it to False.
        skip_unreadable: leave out the bad ones that ``verify`` finds, with a warning that names them, instead of
            stopping.
        max_pixels: the most pixels of a picture; larger pictures are bad examples and are not decoded.

    Raises:
        InputError: no such folder, captions that are missing, malformed or ambiguous, or what ``verify`` finds.
    """

    def __init__(
        self,
        path: str,
        *,
        captions: str = "",
        text: str = "text",
        verify: bool = True,
        skip_unreadable: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        self.fs, self.root = filesystem(str(path))
        self.max_pixels = check_max_pixels(max_pixels)
        if not self.fs.isdir(self.root):
            raise InputError(f"{path}: no such folder")
        known = ("jsonl", "csv", *(ending[1:] for ending in TEXTS), *LISTS)
        if captions and captions not in known:
            raise InputError(f"data.captions={captions!r}: choose {', '.join(known)}, or '' to find out")
        every = [below(self.root, path) for path in sorted(find(self.fs, self.root))]
        files = [name for name in every if not hidden(name)]
        self._texts, self._twice = _texts(files, captions)
        found = self._find_out(files, captions)
        self.items: list[tuple[str, str | None]] = self._listed(found, text, every) if found else self._beside(files)
        """(file name below the folder, caption); None is a caption in the text beside the picture."""
        if not self.items:
            raise InputError(f"{path}: {found or 'the folder'} has no picture with a caption")
        if verify:
            self._verify(skip_unreadable)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"CaptionedFolder({self.root!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, uint8 ``[h, w, 3]``, and ``caption``."""
        return example(self.name(index), *self.read(index), self.max_pixels)

    def name(self, index: int) -> str:
        """Return the file's name below the folder."""
        return self.items[index][0]

    def read(self, index: int) -> tuple[bytes, str]:
        """Return the picture's bytes, not decoded, and its caption.

        Raises:
            BadExample: the picture's file or the caption is missing.
        """
        name = self.name(index)
        caption = check_caption(name, self._caption(index))
        return read_file(self.fs, path_below(self.root, name), name, longest_file(self.max_pixels)), caption

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of all names, sizes and captions."""
        sizes = find(self.fs, self.root)

        def facts(index: int) -> tuple[str, int | None, str | None]:
            name = self.name(index)
            try:
                caption = self._caption(index)
            except BadExample as error:
                caption = error.reason
            try:
                path = path_below(self.root, name)
                return name, sizes[path] if path in sizes else self.fs.size(path), caption
            except (OSError, ValueError):
                return name, None, caption

        limit = [] if self.max_pixels == MAX_PIXELS else [self.max_pixels]
        with ThreadPoolExecutor(16) as pool:
            return digest(itertools.chain(pool.map(facts, range(len(self))), limit))

    def _caption(self, index: int) -> str | None:
        name, caption = self.items[index]
        if caption is not None or name not in self._texts:
            return caption
        text = self._texts[name]
        try:
            data = read_file(self.fs, path_below(self.root, text), name, LONGEST_TEXT)
        except BadExample as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise BadExample(name, f"{text} is {error.reason}") from error
        try:
            return decode_text(data, text)
        except InputError as error:
            raise BadExample(name, f"{text} is not UTF-8") from error

    def _find_out(self, files: list[str], captions: str) -> str:
        """Return the list file that has the captions; "" for text files beside the pictures."""
        beside = captions in [ending[1:] for ending in TEXTS]
        lists = [name for name in LISTS if name in files and captions in ("", name, name.partition(".")[2])]
        if captions and not beside:
            if not lists:
                raise InputError(f"{self.root}: data.captions={captions}, but there is no such list of captions")
            texts = {}
        else:
            texts, lists = self._texts, [] if beside else lists
        sources = [*lists, *([".txt files"] if texts else [])]
        if lists and len(sources) > 1:
            raise InputError(
                f"{self.root}: captions twice, in {lists[0]} and in {sources[1]}; remove one, or choose with "
                f"data.captions={lists[0]} or data.captions={'txt' if texts else lists[1]}"
            )
        if lists:
            return lists[0]
        if self._twice:
            name, texts_of = next(iter(self._twice.items()))
            raise InputError(
                f"{self.root}: {len(self._twice)} pictures have captions twice, such as {name} in "
                f"{' and '.join(texts_of)}; remove one, or choose with data.captions=txt or data.captions=caption"
            )
        if not texts:
            raise InputError(
                f"{self.root}: no captions.jsonl, no captions.csv and no .txt beside a picture{_seen(files)}"
            )
        return ""

    def _listed(self, found: str, column: str, every: list[str]) -> list[tuple[str, str | None]]:
        """Read the rows of a list file and compare them with the pictures that are there."""
        where, key = f"{self.root}/{found}", column.lower()
        content = decode_text(self.fs.cat_file(where), where)
        names = set(every)
        rows: list[tuple[int, Any, Any]] = []
        if found.endswith(".csv"):
            for line, cells in csv_rows(content, where, [["file_name"], [key]], [key], names):
                if not cells["file_name"].strip():
                    raise InputError(f"{where}, line {line}: no file_name")
                rows.append((line, cells["file_name"].strip(), cells[key]))
        else:
            for line, entry in jsonl_rows(content, where):
                if "file_name" not in entry or column not in entry:
                    there = ", ".join(printable(name, 80) for name in list(entry)[:20]) or "none"
                    raise InputError(
                        f"{where}, line {line}: expected file_name and {column}, there are: {there}; data.text names "
                        "the key of captions"
                    )
                name, text = entry["file_name"], entry[column]
                if not (isinstance(name, str) and name and isinstance(text, str | None)):
                    raise InputError(
                        f"{where}, line {line}: expected file_name and {column}, not {name!r:.80} and {text!r:.80}"
                    )
                rows.append((line, name, text or ""))
        composed = {unicodedata.normalize("NFC", name): name for name in every}
        items = [(_match(self.root, name, names, composed), text) for _, name, text in rows]
        self._count(where, [name for name, _ in items], every)
        return items

    def _count(self, where: str, named: list[str], every: list[str]) -> None:
        """Warn of rows without a picture, pictures without a row, and pictures with several rows."""
        there, rows = set(every), Counter(named)
        lacking = [name for name in named if name not in there]
        outside = [name for name in lacking if self._leads_out(name)]
        absent = [name for name in lacking if name not in outside]
        hint = _hint(outside, there)
        if lacking and len(lacking) == len(named):
            raise InputError(
                f"{where}: none of its {len(named):,} rows names a file in the folder: {some(lacking)}"
                + (f"; these are outside of it{hint}" if outside else "; mend its names, or put the files there")
            )
        pictures = [name for name in every if _is_picture(name) and not hidden(name)]
        bare = [name for name in pictures if name not in rows]
        several = [name for name, count in rows.items() if count > 1]
        self._warn(
            where,
            (f"{len(absent):,} of {len(named):,} rows name files that are not there", absent),
            (f"{len(outside):,} of {len(named):,} rows name files outside of the folder{hint}", outside),
            (f"{len(bare):,} of {len(pictures):,} pictures have no row and are left out", bare),
            (f"{len(several):,} pictures have several rows, each an example", several),
        )

    def _leads_out(self, name: str) -> bool:
        try:
            path_below(self.root, name.replace("\\", "/"))
        except BadExample:
            return True
        return bool(re.match(r"[A-Za-z]:[\\/]", name))

    def _beside(self, files: list[str]) -> list[tuple[str, str | None]]:
        """Return all pictures, their captions still unread; warn of other captioned files and of lone texts."""
        pictures = [name for name in files if _is_picture(name)]
        used, keys = set(self._texts.values()), {key for name in pictures for key in (name, _stem(name))}
        texts = {_stem(name): name for name in files if _is_text(name) and name not in used}
        others = [name for name in files if not _is_picture(name) and not _is_text(name)]
        left_out = [name for name in others if ({name, _stem(name)} & texts.keys()) - keys]
        for name in left_out:
            texts.pop(name, None), texts.pop(_stem(name), None)
        lonely = [name for key, name in texts.items() if key not in keys]
        self._warn(
            self.root,
            (f"{len(left_out):,} captioned files are left out, no pictures by their names", left_out),
            (f"{len(lonely):,} texts have no picture", lonely),
        )
        return [(name, None) for name in pictures]

    def _warn(self, where: str, *found: tuple[str, list[str]]) -> None:
        if parts := [f"{what} ({some(names)})" for what, names in found if names]:
            warnings.warn(f"{where}: {'; '.join(parts)}", stacklevel=4)

    def _verify(self, skip: bool) -> None:
        kept, bad = [], []
        for index, item in enumerate(self.items):
            name = self.name(index)
            try:
                decode(self.read(index)[0], name, max_pixels=self.max_pixels, small=True)
                kept.append(item)
            except BadExample as error:
                if not skip:
                    raise InputError(
                        f"{posixpath.join(self.root, name)}: {error.reason}; mend it, or leave such examples out with "
                        "data.bad=skip or data.skip_unreadable"
                    ) from error
                bad.append(name)
        self.items = kept
        if not kept:
            raise InputError(f"{self.root}: no readable picture with a caption")
        self._warn(self.root, (f"left out {len(bad)} unreadable pictures", bad))


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in PICTURES


def _is_text(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in TEXTS


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _texts(files: Iterable[str], captions: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return by picture the text file beside it, and all text files for pictures that have several."""
    texts: dict[str, list[str]] = {}
    for name in filter(_is_text, files):
        if captions not in [ending[1:] for ending in TEXTS] or name.lower().endswith(f".{captions}"):
            texts.setdefault(_stem(name), []).append(name)
    beside = {name: texts.get(_stem(name), []) + texts.get(name, []) for name in filter(_is_picture, files)}
    return (
        {name: found[0] for name, found in beside.items() if found},
        {name: found for name, found in beside.items() if len(found) > 1},
    )


def _match(root: str, name: str, names: set[str], composed: dict[str, str]) -> str:
    """Return the file that a name in a list means, or the name itself.

    Names with Windows separators or in another Unicode composition are found, too.
    """
    for form in (name, name.replace("\\", "/")):
        tidy = posixpath.normpath(form.removeprefix(f"{root}/"))
        found = tidy if tidy in names else composed.get(unicodedata.normalize("NFC", tidy))
        if found is not None:
            return found
    return name


def _hint(outside: Sequence[str], there: Collection[str]) -> str:
    """Return the end of a message: the remedy for names that lead out of the folder."""
    for name in outside:
        if (base := posixpath.basename(name.replace("\\", "/"))) in there:
            return f"; {printable(base, 200)} is in the folder: write names without folders"
    return "; put the files there, or links to them"


def _seen(files: list[str]) -> str:
    """Return the end of a message: the files that the folder has instead of pictures."""
    for name in files:
        if posixpath.basename(name) in LISTS:
            return f"; there is {name}: give its folder as the path"
    endings = Counter(posixpath.splitext(name)[1].lower() or "without ending" for name in files)
    there = ", ".join(f"{count:,} {printable(ending, 40)}" for ending, count in endings.most_common(6))
    return f"; there are files of other kinds: {there}" if there else "; there is no file"
