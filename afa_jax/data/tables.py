"""Readers of captions and prompts in .csv and .jsonl files; nothing is cut or skipped without an error."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from afa_jax.errors import InputError, printable, some, why

_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode_text(data: bytes, where: str) -> str:
    """Return a text file's content: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        InputError: it is in another encoding; the error names the line.
    """
    encoding = _MARKS.get(data[:2], "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise InputError(f"{where}, line {line}: not UTF-8 ({byte}: {error.reason}); save the file as UTF-8") from error


def jsonl_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and object; empty lines are passed over.

    Raises:
        InputError: a line that is no JSON, no object, nested too deep, or has a key twice.
    """
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}, line {number}: no JSON object ({why(error)}); write one a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}, line {number}: no JSON object but {row!r:.40}; write one a line")
            yield number, row


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def csv_rows(
    text: str,
    where: str,
    needed: Sequence[Collection[str]],
    whole: Collection[str],
    names: Collection[str] = (),
    delimiters: str = ",;\t",
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row's first line and its cells by column, whose names come in lower case; empty rows are passed over.

    The delimiter is the first one by which the first line has the columns. A row may have too
    many commas where its last column is free text and it has no quotes: then the text goes to the end of the line, as
    people write tags, and a warning says so.

    Args:
        text: the file's content.
        where: the file, for messages.
        needed: groups of names; of each group a column must be there.
        whole: names of columns of free text.
        names: cells that only other rows can have, such as the pictures' names. One of them within a quoted text of
            several lines shows that a quote was left open.
        delimiters: the delimiters to try: comma, semicolon and tab.

    Raises:
        InputError: columns that are missing or there twice; a row with too few or too many cells, quotes that are not
            closed or in the wrong place, NUL characters, or a cell of more than 131,072 characters; names the line.
    """
    skipped = 0
    if separator := re.match(r"sep=.\s*?(?:\r\n|\r|\n)", text):  # Excel's
        text, skipped = text[separator.end() :], 1
    delimiter, columns = _columns(text, where, needed, whole, delimiters)
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            read.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, skipinitialspace=True, strict=True)
    long: list[str] = []
    while True:
        read.clear()
        number = reader.line_num + 1 + skipped
        place = f"{where}, line {number}"
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"{place}: {_reason(error)}") from error
        if any("\0" in line for line in read):
            raise InputError(
                f"{place}: NUL characters; the file is damaged, or UTF-16 without its mark: save it as UTF-8"
            )
        if number == skipped + 1 or not any(cell.strip() for cell in row):
            continue
        for line in read[1:]:
            if any(cell.strip(' "\r\n') in names for cell in line.split(delimiter)):
                raise InputError(f"{place}: {_OPEN} (it takes in the row {printable(line.strip(), 80)!r})")
        if len(row) > len(columns) and any(cell.strip() for cell in row[len(columns) :]):
            if columns[-1] not in whole or any('"' in line for line in read):
                raise InputError(
                    f"{place}: {len(row)} cells in {len(columns)} columns; put a text that has {_named(delimiter)} "
                    "between double quotes"
                )
            row = read[0].rstrip("\r\n").split(delimiter, len(columns) - 1)
            long.append(str(number))
        cells = dict(zip(columns, row, strict=False))
        if any(not group & cells.keys() for group in map(set, needed)):
            raise InputError(f"{place}: {len(row)} cells in {len(columns)} columns ({', '.join(columns)})")
        yield number, cells
    if long:
        warnings.warn(
            f"{where}: {len(long):,} texts have a {_named(delimiter)} and no quotes; each is read up to the end of its "
            f"line (lines {some(long)})",
            stacklevel=3,
        )


_OPEN = "a double quote opens a text here and is not closed; close it, or write two for one within quotes"


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return _OPEN
    if "expected after" in str(error):
        return f"text after a closing quote ({error}); write two double quotes for one within quotes"
    return str(error)


def _named(delimiter: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]


def _columns(
    text: str, where: str, needed: Sequence[Collection[str]], whole: Collection[str], delimiters: str
) -> tuple[str, Sequence[str]]:
    """Return the delimiter, and the columns' names in lower case, without empty ones at the end."""
    tried = []
    for delimiter in delimiters:
        try:
            first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error as error:
            raise InputError(f"{where}, line 1: {_reason(error)}") from error
        columns = [name.strip() for name in first]
        while columns and not columns[-1]:
            columns.pop()
        lower = [name.lower() for name in columns]
        if all(set(group) & set(lower) for group in needed):
            used = {*whole, *(name for group in needed for name in group)}
            if twice := sorted({name for name in lower if lower.count(name) > 1 and name in used}):
                raise InputError(f"{where}, line 1: the column {twice[0]} is there twice; remove one")
            return delimiter, lower
        tried.append(columns)
    wanted = " and ".join(" or ".join(group) for group in needed)
    there = ", ".join(printable(name, 80) for name in max(tried, key=len)[:20]) or "none"
    raise InputError(f"{where}: expected columns {wanted}, there are: {there}; name them in its first line")
