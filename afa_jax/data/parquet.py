"""Parquet files with a column of pictures and one of captions, read at random."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from afa_jax.data.decode import MAX_PIXELS, check_max_pixels, longest_file
from afa_jax.data.files import below_common, digest, expand
from afa_jax.data.sources import example
from afa_jax.errors import BadExample, InputError, why

UNPACKED = 256 << 20  # bytes of a row group beyond four times its stated size


class ParquetSource:
    """Captioned pictures in parquet files, also as the Hugging Face hub stores them.

    Parquet is read by row groups: each process keeps the last few. Where they are large, one picture costs the reading
    of a hundred; convert such a data set to another kind, or write it anew with row groups of about ten.

    Args:
        paths: files, globs (``data/train-*.parquet``) or brace lists; one or several.
        image: the column of picture files: bytes, or a struct with a field ``bytes``.
        text: the column of captions.
        row_groups: the number of row groups kept in memory.
        max_pixels: the most pixels of a picture; larger pictures are bad examples and are not decoded.

    Raises:
        InputError: no such file, one that is truncated or not parquet, or a column that is missing or of another type.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        image: str = "image",
        text: str = "text",
        row_groups: int = 16,
        max_pixels: int = MAX_PIXELS,
    ):
        import pyarrow as pa
        import pyarrow.parquet as pq

        if row_groups < 1:
            raise InputError(f"data.row_groups={row_groups}; choose 1 or more")
        self.max_pixels = check_max_pixels(max_pixels)
        self.fs, self.files = expand(paths)
        self._short = below_common(self.files)
        self.image, self.text, self.row_groups = image, text, row_groups
        self._groups: list[tuple[int, int, int]] = []  # file, row group, rows of the file before it
        counts: list[int] = []
        stamps: list[Any] = [[image, text]]
        for number, path in enumerate(self.files):
            try:
                with self.fs.open(path, "rb") as file:
                    parquet = pq.ParquetFile(file)
                    metadata, schema = parquet.metadata, parquet.schema_arrow
            except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
                raise InputError(f"{path}: truncated or not parquet ({why(error)}); fetch it again") from error
            _check_columns(path, schema, image, text)
            before = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, before))
                counts.append(metadata.row_group(group).num_rows)
                before += counts[-1]
            if before != metadata.num_rows or min(counts, default=0) < 0:
                raise InputError(
                    f"{path}: its footer counts {metadata.num_rows} rows, its groups {before}; fetch it again"
                )
            size = self.fs.size(path)
            # The footer has each column's place and size in each row group, and mostly its least and greatest text.
            footer = self.fs.cat_file(path, start=size - 8 - metadata.serialized_size, end=size)
            stamps.append([self._short[number], size, footer.hex()])
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._fingerprint = digest(stamps if self.max_pixels == MAX_PIXELS else [*stamps, self.max_pixels])
        if not len(self):
            raise InputError(f"{self.files[0]}: no row")
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"ParquetSource({self.files[0]!r}, {len(self.files)} files, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, uint8 ``[h, w, 3]``, and ``caption``."""
        number, row = self._find(index)
        table = self._read(number)
        data = table.column(self.image)[row].as_py()
        if isinstance(data, dict):
            data = data["bytes"]
        if not data:
            raise BadExample(self.name(index), "no picture in its row")
        if len(data) > longest_file(self.max_pixels):
            raise BadExample(self.name(index), f"a picture of {len(data):,} bytes, which none of data.max_pixels has")
        try:
            caption = table.column(self.text)[row].as_py()
        except UnicodeDecodeError as error:
            raise BadExample(self.name(index), "the caption is not UTF-8") from error
        return example(self.name(index), data, caption, self.max_pixels)

    def name(self, index: int) -> str:
        """Return the file's name below the files' common folder, and the row, counted from 0 within the file."""
        number, row = self._find(index)
        file, _, before = self._groups[number]
        return f"{self._short[file]}, row {before + row}"

    @property
    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and footers."""
        return self._fingerprint

    def _find(self, index: int) -> tuple[int, int]:
        """Return the number of the row group, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        """Yield the input for Arrow: the path of a local file, else an open file.

        Arrow reads in threads. A thread that holds a Python file when the interpreter ends aborts the process
        ("terminate called without an active exception", in 4 of 550 processes that read a row group and ended).
        """
        if isinstance(self.fs, LocalFileSystem):
            yield path
        else:
            with self.fs.open(path, "rb") as file:
                yield file

    def _read(self, number: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # One at a time, as threads often want the same row group and would read it twice.
        with self._lock:
            if number not in self._kept:
                file, group, _ = self._groups[number]
                try:
                    with self._opened(self.files[file]) as opened:
                        table = self._unpacked(pq.ParquetFile(opened), group)
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise InputError(
                        f"{self.files[file]}: row group {group} is not readable ({why(error)}); fetch the file again"
                    ) from error
                self._kept[number] = table
                if len(self._kept) > self.row_groups:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            return self._kept[number]

    def _unpacked(self, parquet: Any, group: int) -> Any:
        """Read a row group, a few rows at a time, within a limit on its size in memory.

        The limit is needed because a dictionary of one picture may stand for a million rows.
        """
        import pyarrow as pa

        stored = parquet.metadata.row_group(group)
        stored_bytes = sum(stored.column(column).total_uncompressed_size for column in range(stored.num_columns))
        most, batches, size = 4 * max(stored_bytes, 0) + UNPACKED, [], 0
        for batch in parquet.iter_batches(16, row_groups=[group], columns=[self.image, self.text]):
            size += batch.nbytes
            if size > most:
                raise ValueError(f"it unpacks to more than {most >> 20:,} MB; write it with fewer rows in a group")
            batches.append(batch)
        return pa.Table.from_batches(batches)


def _check_columns(path: str, schema: Any, image: str, text: str) -> None:
    import pyarrow as pa

    for column in (image, text):
        if column not in schema.names:
            raise InputError(f"{path}: no column {column!r}; there are: {', '.join(schema.names)}")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and "bytes" in (field.name for field in kind):
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"{path}: column {image!r} is {kind}, not bytes; there are: {', '.join(schema.names)}")
    kind = schema.field(text).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {text!r} is {kind}, not text; there are: {', '.join(schema.names)}")
