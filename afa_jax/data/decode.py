"""Decoding of picture files, of known formats and of a bounded size."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from afa_jax.data.avif_size import av1_pixels
from afa_jax.data.side_data import has_end, has_every_scan, orientation, pixels_only, webp_size
from afa_jax.errors import BadExample, InputError, why

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The only formats that are decoded, whatever the file's name. Pillow knows forty more; one of them starts
Ghostscript."""
PICTURES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".apng", ".tif", ".tiff", ".webp")
)
"""The file name endings of these formats."""
MAX_PIXELS = 64_000_000
NARROW = 20  # the largest ratio of a picture's long side to its short side
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a JPEG's next marker that cannot be within a scan
_BAND = 1 << 20  # pixels that become RGB at a time
_END = b"\xff\xd9"  # the end marker of a JPEG
_opening = threading.Lock()

# Pillow's warnings of damaged files are our errors, or harmless; so is its warning of many pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


def check_max_pixels(max_pixels: object) -> int:
    """Return ``data.max_pixels`` if it is a number of pixels.

    Raises:
        InputError: it is no whole number of 1 or more.
    """
    if not isinstance(max_pixels, int) or isinstance(max_pixels, bool) or max_pixels < 1:
        raise InputError(f"data.max_pixels={max_pixels!r}: choose how many pixels a picture may have, 1 or more")
    return max_pixels


def longest_file(max_pixels: int) -> int:
    """Return how many bytes a picture file may have: 16 a pixel, more than any format needs, and 64 MB around them."""
    return 16 * max_pixels + (64 << 20)


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, small: bool = False) -> np.ndarray:
    """Decode a picture file to uint8 ``[h, w, 3]``, turned by its EXIF orientation, transparency on white.

    An animation gives its first frame. Broken or huge metadata is ignored; missing pixels are an error. The memory is
    up to 19 bytes a pixel for a WebP, 12 for an AVIF, 7 to 13 for others.

    Args:
        data: the file's bytes.
        name: its name in messages.
        max_pixels: the most pixels of the picture; the header is checked before anything is decoded.
        small: only check that it can be read: a JPEG is decoded at a fraction of its size, which is faster.

    Raises:
        BadExample: not a whole picture of one of FORMATS; more than ``max_pixels``; one of integers or floats of 32
            bits, which have no white; one so narrow (above 20:1) that covering a crop would take gigabytes.
    """
    try:
        data, turned = pixels_only(data)
        ended = has_end(data)
        with open_image(data if ended else data + _END, name, max_pixels) as file:
            if max(file.size) > NARROW * min(file.size):
                raise BadExample(name, f"{file.width} x {file.height} pixels, narrower than {NARROW}:1")
            if file.mode in ("I", "F"):
                raise BadExample(name, f"pixels of 32 bits (Pillow's mode {file.mode}); save it as 8 bits a channel")
            if file.format in ("AVIF", "WEBP"):
                turned = orientation(file.info.get("exif", b""), file.info.get("xmp", b""))
            if small:
                file.draft("RGB", (64, 64))
            # For gray with more than 8 bits Pillow would clip white and, in a TIFF, swap black and white.
            shift = 4 if any(tile.args and "I;12" in tile.args for tile in getattr(file, "tile", ())) else 8
            inverted = file.mode.startswith("I;16") and getattr(file, "tag_v2", {}).get(262) == 0
            file.load()
            if file.format == "JPEG" and (_lacks_rows(data, file) if ended else _lacks_data(data)):
                what = "with fewer rows than its header says" if ended else "that ends before its last pixel"
                raise BadExample(name, f"a JPEG {what}; fetch it again")
            pixels = np.empty((file.height, file.width, 3), np.uint8)
            rows = max(1, _BAND // file.width)
            for top in range(0, file.height, rows):  # copies of the whole picture would double the memory
                band = file.crop((0, top, file.width, min(top + rows, file.height)))
                pixels[top : top + rows] = _rgb(band, shift)
        return _upright(~pixels if inverted else pixels, turned)
    except (MemoryError, BadExample):
        raise
    except UnidentifiedImageError as error:
        raise BadExample(name, f"not a readable picture (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # any exception of Pillow's decoders on damaged bytes
        raise BadExample(name, f"not a readable picture ({why(error)})") from error


def open_image(source: bytes | Path, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture file, not decoded yet: of FORMATS only, and of at most ``max_pixels``.

    Raises:
        BadExample: it has more pixels.
        OSError, SyntaxError, ValueError ...: as Image.open.
    """
    name = name or str(source)
    if isinstance(source, Path):
        with source.open("rb") as head:
            start = head.read(32)
    else:
        start = source[:32]
    if start[:4] == b"RIFF":
        _check_size(webp_size(start) or (0, 0), name, max_pixels)
    image = _unbounded(source, FORMATS)
    try:
        _check_size(image.size, name, max_pixels)
        tags = getattr(image, "tag_v2", {})
        _check_size((tags.get(322, 1), tags.get(323, 1)), name, max_pixels)  # a TIFF's tiles
        if image.format == "AVIF":
            _check_av1(source.read_bytes() if isinstance(source, Path) else source, image.size, name)
    except (BadExample, ValueError):
        image.close()
        raise
    return image


def _unbounded(source: bytes | Path, formats: tuple[str, ...]) -> Image.Image:
    """Open a picture of any size; Pillow's bound is global and its error lacks the size, so ours is checked later."""
    with _opening:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadExample(name, f"{size[0]} x {size[1]} pixels, more than data.max_pixels={max_pixels}")


def _lacks_rows(data: bytes, file: Image.Image) -> bool:
    """Return whether a JPEG's data end before its last row; its decoder fills the rest with gray and reports nothing.

    In such a file, bytes appended to the first scan change the picture; in a whole file they are ignored. This is
    tried at an eighth of the size, and only where the last pixel is that gray.
    """
    corner = file.crop((file.width - 1, file.height - 1, file.width, file.height)).tobytes()
    end = _END_OF_SCAN.search(data, max(0, data.find(b"\xff\xda")) + 2)
    if set(corner) - {127, 128} or end is None:
        return False
    pictures = []
    for more in (b"", bytes(range(255)) * 16):
        with _unbounded(data[: end.start()] + more + data[end.start() :], ("JPEG",)) as again:
            again.draft("RGB", (1, 1))
            pictures.append(again.tobytes())
    return pictures[0] != pictures[1]


def _lacks_data(data: bytes) -> bool:
    """Return whether a JPEG without an end marker lacks pixel data, too: then appended bytes change its pixels."""
    if not has_every_scan(data):
        return True
    restarts = re.findall(rb"\xff([\xd0-\xd7])", data)
    begun = restarts[-1][0] if restarts else 0xD7
    marks = [bytes((0xFF, 0xD0 | (begun + number) & 7)) for number in range(1, 9)]  # in the order expected
    pictures = set()
    for junk in (b"", b"\xaa" * 512, b"\x55" * 512):
        more = junk + b"".join(mark + junk for mark in marks) if junk else b""
        with _unbounded(data.rstrip(b"\xff") + more + _END, ("JPEG",)) as again:
            pictures.add(hashlib.sha256(again.tobytes()).digest())
    return len(pictures) > 1


def _check_av1(data: bytes, size: tuple[int, int], name: str) -> None:
    """Raise BadExample for an AVIF whose AV1 data are far larger than it says: colours, alpha and a small one fit."""
    if (found := av1_pixels(data)) > 4 * size[0] * size[1] + _BAND:
        raise BadExample(name, f"its AV1 data are of {found} pixels, and it says {size[0]} x {size[1]}")


def _rgb(band: Image.Image, shift: int) -> np.ndarray:
    if band.mode.startswith("I;16"):
        return (np.asarray(band) >> shift).astype(np.uint8)[..., None]
    if band.mode == "La":
        band = band.convert("LA")
    if band.has_transparency_data:
        canvas = Image.new("RGBA", band.size, "white")
        canvas.alpha_composite(band.convert("RGBA"))
        band = canvas
    return np.asarray(band.convert("RGB"))


def _upright(pixels: np.ndarray, turned: int) -> np.ndarray:
    """Turn and mirror as EXIF's orientation asks for."""
    if turned in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
