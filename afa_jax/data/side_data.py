"""Removal of metadata from picture files before they are decoded.

Cameras, editors and generators write metadata that is broken, huge or hostile: overlapping EXIF directories, text that
unpacks to gigabytes, chunks with wrong checksums. Pillow reads metadata before the pixels, and fails or runs out of
memory. So it is removed from the file's bytes first; only the orientation is used.
"""

from __future__ import annotations

import re
import struct
import zlib

PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT"))
_TIFF_PIXELS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347,
     512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}
)  # fmt: skip
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ORIENTATION = 274
_MOST_SCANS = 100  # the most scans of a progressive JPEG: each has few bytes and takes the time of the whole picture
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


def pixels_only(data: bytes) -> tuple[bytes, int]:
    """Return the file without data that its pixels do not need, and its EXIF orientation (1 to 8; 1 is upright).

    A file of another format, or damaged beyond parsing, is returned unchanged.

    Raises:
        ValueError: a TIFF whose directory claims more data than the file has; a JPEG of more than 100 scans.
    """
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(JPEG):
        return _jpeg(data)
    if data.startswith(TIFF):
        return _tiff(data)
    if data[4:8] == b"ftyp":
        return _avif(data), 1
    return data, 1


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation in EXIF, or else in XMP; 1 if neither can be read."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is not None:
            (start,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, start)
            for at in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(f"{order}HH", exif, at)
                if tag == _ORIENTATION:
                    (value,) = struct.unpack_from(order + {3: "H", 4: "I"}[kind], exif, at + 8)
                    return value if 1 <= value <= 8 else 1
    except (struct.error, KeyError):
        return 1
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) by a WebP's header, for which its decoder allocates memory when it is opened."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _png(data: bytes) -> tuple[bytes, int]:
    """Keep the chunks of pixels, up to the end marker; add the marker if nothing else is missing."""
    view, at = memoryview(data), len(PNG)
    kept: list[bytes | memoryview] = [PNG]
    exif = xmp = b""
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND":
            break
        if kind in _PNG_PIXELS:
            kept.append(view[at:end])
            if end > len(data):  # truncated
                return b"".join(kept), 1
        elif kind == b"eXIf":
            exif = data[at + 8 : at + 8 + length]
        elif kind == b"iTXt" and data[at + 8 : at + 25] == b"XML:com.adobe.xmp":
            xmp = data[at + 8 : at + 8 + length]
        at = end
    kept.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return b"".join(kept), orientation(exif, xmp)


def _jpeg(data: bytes) -> tuple[bytes, int]:
    """Drop application data and comments before the first scan, except those that say how colours are stored."""
    view, at = memoryview(data), 2
    kept: list[bytes | memoryview] = [data[:2]]
    exif = xmp = b""
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + length
        if marker in (0x00, 0x01, *range(0xD0, 0xDB)) or length < 2 or end > len(data):
            break
        payload = data[at + 4 : end] if marker == 0xE1 else b""
        if payload.startswith(b"Exif\0\0"):
            exif = exif or payload
        elif payload.startswith(b"http://ns.adobe.com/xap/1.0/"):
            xmp = xmp or payload
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(view[at:end])
        at = end
    if data.count(b"\xff\xda", at) > _MOST_SCANS:
        raise ValueError(f"more than {_MOST_SCANS} scans")
    kept.append(view[at:])
    return b"".join(kept), orientation(exif, xmp)


def has_end(data: bytes) -> bool:
    """Return whether a JPEG has an end marker after the start of its pixels; always true for other formats."""
    scan = data.find(b"\xff\xda") if data.startswith(JPEG) else -1
    return scan < 0 or data.find(b"\xff\xd9", scan) >= 0


def has_every_scan(data: bytes) -> bool:
    """Return whether a JPEG's scans bring all coefficients of all its components, to the last bit of each."""
    begin = re.search(rb"\xff[\xc0-\xc2]..\x08....(.)", data, re.DOTALL)
    components = begin[1][0] if begin else 0
    whole: dict[int, set[int]] = {}
    for scan in re.finditer(rb"\xff\xda\x00[\x06-\x0e]([\x01-\x04])", data):
        count, at = scan[1][0], scan.end()
        first, last, bits = data[at + 2 * count : at + 2 * count + 3].ljust(3, b"\xff")
        for component in data[at : at + 2 * count : 2]:
            if bits & 15 == 0:
                whole.setdefault(component, set()).update(range(first, last + 1))
    return len(whole) == components > 0 and all(found >= set(range(64)) for found in whole.values())


def _tiff(data: bytes) -> tuple[bytes, int]:
    """Leave only the first directory of a TIFF, and in it only the tags that its pixels need."""
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
    number, offset, size = (
        ("Q", "Q", 20) if big else ("H", "I", 12)
    )  # of the number of entries, of offsets, of an entry
    turned, kept, claimed = 1, [], 0
    try:
        (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + number, data, start)
        first = start + struct.calcsize(number)
        for at in range(first, min(first + size * count, len(data) - size + 1), size):
            tag, kind = struct.unpack_from(f"{order}HH", data, at)
            (values,) = struct.unpack_from(order + offset, data, at + 4)
            if tag == _ORIENTATION and kind == 3:
                (turned,) = struct.unpack_from(f"{order}H", data, at + size - struct.calcsize(offset))
            elif tag in _TIFF_PIXELS:
                kept.append(data[at : at + size])
                claimed += values * _TIFF_SIZES.get(kind, 1)
        if claimed > len(data):
            raise ValueError("its directory claims more data than the file has")
        directory = struct.pack(order + number, len(kept)) + b"".join(kept) + bytes(struct.calcsize(offset))
    except struct.error:
        return data, 1
    return data[:start] + directory + data[start + len(directory) :], turned if 1 <= turned <= 8 else 1


def _avif(data: bytes) -> bytes:
    """Rename EXIF items, which AVIF's decoder then passes over: in this format separate boxes turn a picture."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"meta":
            end = at + size if size else len(data)
            return data[:at] + data[at:end].replace(b"Exif", b"Exi_") + data[end:]
        if size < 8:
            break
        at += size
    return data
