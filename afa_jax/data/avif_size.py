"""The size of an AVIF picture by the headers of its AV1 data, for which its decoder allocates memory.

The size in the file's boxes, which Pillow shows, can differ, and nothing compares the two before decoding. Formats:
ISO/IEC 14496-12 (boxes), 23008-12 (items), and the AV1 specification, 5.3 to 5.5 (units, sequence headers). Changes of
the sequence's size in a frame's own header are not followed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MOST_UNITS = 10_000  # the most headers in all AV1 data of a picture: an item has three, and each takes time


def av1_pixels(data: bytes) -> int:
    """Return the pixels of all images in an AVIF together, each as its largest sequence header says; 0 for damage.

    Raises:
        ValueError: there are more pieces in it than any picture has.
    """
    total = units = 0
    for stream in _streams(data):
        largest = 0
        for kind, unit in _units(stream):
            units += 1
            if units > _MOST_UNITS:
                raise ValueError(f"more than {_MOST_UNITS} units of AV1 data")
            if kind == 1:
                largest = max(largest, _sequence_pixels(unit))
        total += largest
    return total


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes between two byte offsets: kind, and where the content starts and ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            (size,), head = struct.unpack_from(">Q", data, start + 8), 16
        stop = end if size == 0 else min(start + size, end)
        if stop < start + head:
            return
        yield kind, start + head, stop
        start = stop


def _streams(data: bytes) -> Iterator[bytes]:
    """Yield the data of each item, and of the first frame of each track."""
    for kind, start, end in _boxes(data, 0, len(data)):
        try:
            if kind == b"meta":
                inner = {name: (at, stop) for name, at, stop in _boxes(data, start + 4, end)}
                if b"iloc" in inner:
                    yield from _items(data, inner[b"iloc"][0], inner.get(b"idat", (0, 0))[0])
            elif kind == b"moov":
                for name, at, stop in _boxes(data, start, end):
                    if name == b"trak":
                        yield _first_frame(data, at, stop)
        except struct.error:  # truncated; the decoder refuses it too
            return


def _items(data: bytes, at: int, idat: int) -> Iterator[bytes]:
    """Yield the data of each item of an iloc box, its extents joined."""

    def number(size: int) -> int:
        nonlocal at
        if at + size > len(data):
            raise struct.error
        at += size
        return int.from_bytes(data[at - size : at], "big")

    version = number(4) >> 24
    sizes = number(2)
    long, pieces, taken = (2 if version < 2 else 4), 0, 0
    for _ in range(number(long)):
        number(long)
        start = idat if version and number(2) & 15 == 1 else 0
        number(2)
        start += number(sizes >> 4 & 15)
        parts = []
        for _ in range(number(2)):
            number(sizes & 15 if version else 0)
            first, length = start + number(sizes >> 12), number(sizes >> 8 & 15)
            parts.append(data[first : first + length] if length else data[first:])
            pieces, taken = pieces + 1, taken + len(parts[-1])
            if pieces > _MOST_UNITS or taken > 2 * len(data):
                raise ValueError("its items claim more data than the file has")
        yield b"".join(parts)


def _first_frame(data: bytes, start: int, end: int) -> bytes:
    """Return the data of a track's first frame; no bytes where its tables are missing."""
    inner: dict[bytes, tuple[int, int]] = {}
    for name in (b"mdia", b"minf", b"stbl", None):
        inner = {kind: (at, stop) for kind, at, stop in _boxes(data, start, end)}
        start, end = inner.get(name, (0, 0)) if name else (0, 0)
    for table, form in ((b"stco", ">I"), (b"co64", ">Q")):
        if table in inner and b"stsz" in inner:
            (first,) = struct.unpack_from(form, data, inner[table][0] + 8)
            common, _, own = struct.unpack_from(">III", data, inner[b"stsz"][0] + 4)
            return data[first : first + (common or own)]
    return b""


def _units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the units (OBUs) of AV1 data, each with its kind first."""
    at = 0
    while at < len(stream):
        head = stream[at]
        at += 2 if head & 4 else 1
        size, shift = len(stream) - at, 0
        if head & 2:
            size = 0
            while at < len(stream) and shift < 56:
                byte = stream[at]
                size |= (byte & 127) << shift
                at, shift = at + 1, shift + 7
                if byte < 128:
                    break
        yield head >> 3 & 15, stream[at : at + min(size, 256)]  # a header needs no more
        at += size


def _sequence_pixels(unit: bytes) -> int:
    """Return the pixels of the largest frame that a sequence header allows."""
    value, left = int.from_bytes(unit, "big"), 8 * len(unit)

    def bits(count: int) -> int:
        nonlocal left
        left -= count
        return value >> left & (1 << count) - 1 if left >= 0 else 0

    bits(4)  # profile, whether it is a still picture
    if bits(1):  # a header of the short form
        bits(5)
    else:
        delay = 0
        if timing := bits(1):
            bits(64)
            if bits(1):
                zeros = 0
                while left > 0 and not bits(1):
                    zeros += 1
                bits(min(zeros, 32))
            if timing := bits(1):
                delay = bits(5) + 1
                bits(42)
        initial = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if timing and bits(1):
                bits(2 * delay + 1)
            if initial and bits(1):
                bits(4)
    wide, high = bits(4) + 1, bits(4) + 1
    return (bits(wide) + 1) * (bits(high) + 1) if left >= wide + high else 0
