"""Picture files with broken side data are their pixels; damaged and hostile ones are refused in bounded memory."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from afa_jax.data.avif_size import av1_pixels
from afa_jax.data.decode import PICTURES, check_max_pixels, decode, open_image
from afa_jax.errors import BadExample, InputError

PIXELS = np.zeros((16, 24, 3), np.uint8)
PIXELS[:, :12, 0] = PIXELS[:, 12:, 2] = 230
RGB = Image.fromarray(PIXELS)


def encode(kind: str, picture: Image.Image = RGB, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk, after its header."""
    png = encode("PNG")
    crc = zlib.crc32(kind + data) if crc is None else crc
    return png[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc) + png[33:]


def with_segment(payload: bytes, marker: int = 0xE1) -> bytes:
    """A JPEG with one more segment, at its begin."""
    jpeg = encode("JPEG", quality=95)
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def ifd(*entries: tuple[int, int, int, int]) -> bytes:
    """A TIFF directory: tag, type, count, value."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


def tiff(**tags: int) -> bytes:
    """A TIFF without strips, of these tags."""
    names = dict(
        width=256, height=257, bits=258, photometric=262, tile_width=322, tile_length=323, strips=273, tiles=324
    )
    return ifd(*((names[name], 4, 1, value) for name, value in tags.items())) + bytes(4)


UPRIGHT = {
    "EXIF of nothing": with_segment(b"Exif\0\0"),
    "EXIF twice": with_segment(b"Exif\0\0Exif\0\0" + ifd((274, 3, 1, 1))),
    "EXIF as Python's repr": with_segment(b"Exif\0\0b'Exif\\x00\\x00II*\\x00'"),
    "EXIF of garbage": with_segment(b"Exif\0\0" + bytes(range(40))),
    "orientation 99": with_segment(b"Exif\0\0" + ifd((274, 3, 1, 99))),
    "orientation as text": with_segment(b"Exif\0\0" + ifd((274, 2, 2, 0x36))),
    "XMP that is no UTF-8": with_segment(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xa8\xff/>"),
    "ICC profile of nothing": with_segment(b"ICC_PROFILE\0\1\1bad", 0xE2),
    "Photoshop's data cut": with_segment(b"Photoshop 3.0\08BIM\4\4\0\0\xff\xff\xff\xff", 0xED),
    "MPF of nothing": with_segment(b"MPF\0II*\0\xff\xff\xff\xff", 0xE2),
    "zeros behind a JPEG": encode("JPEG", quality=95) + bytes(100),
    "PNG's EXIF of nonsense": with_chunk(b"eXIf", b"nonsense"),
    "PNG's XMP of nonsense": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xa8\xff"),
    "PNG's text of 70 MB": with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(70 << 20))),
    "PNG's text with a wrong checksum": with_chunk(b"tEXt", b"a\0b", 0),
    "PNG's colour profile of nonsense": with_chunk(b"iCCP", b"bad\0\0notzlib"),
    "garbage behind a PNG": encode("PNG") + b"garbage" * 9,
    "a PNG without its end": encode("PNG")[:-12],
    "an animated PNG": encode("PNG", save_all=True, append_images=[ImageOps.invert(RGB)]),
    "an animated GIF": encode("GIF", save_all=True, append_images=[ImageOps.invert(RGB)]),
    "an animated WebP": encode("WEBP", save_all=True, append_images=[ImageOps.invert(RGB)], quality=100),
    "WebP's EXIF of nonsense": encode("WEBP", exif=b"nonsense", quality=100),
    "two pictures in a JPEG": encode("MPO", save_all=True, append_images=[RGB], quality=95),
    "CMYK": encode("JPEG", RGB.convert("CMYK"), quality=95),
    "a palette with alpha": encode("PNG", RGB.convert("RGBA").quantize(4)),
    "AVIF": encode("AVIF", quality=95),
    "AVIF's EXIF of nonsense": encode("AVIF", quality=95, exif=b"II*\0" + bytes(8)).replace(b"II*\0", b"junk"),
    "TIFF with EXIF of everywhere": encode("TIFF", tiffinfo={34665: 8, 37500: b"x" * 500}),
    "BMP": encode("BMP"),
}


@pytest.mark.parametrize("case", UPRIGHT)
def test_side_data_never_sinks_pixels(case):
    image = decode(UPRIGHT[case], case)
    assert image.shape == PIXELS.shape
    np.testing.assert_allclose(image[8, [6, 18]], PIXELS[8, [6, 18]], atol=8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_pictures_are_turned_as_their_orientation_says(kind):
    for value in range(1, 9):
        exif = Image.Exif()
        exif[274] = value
        data = encode(kind, exif=exif)
        with Image.open(io.BytesIO(data)) as file:
            np.testing.assert_array_equal(decode(data, kind), ImageOps.exif_transpose(file).convert("RGB"))
    assert decode(with_segment(b"Exif\0\0" + ifd((274, 3, 1, 6))[:-4]), "cut").shape == PIXELS.shape
    cut = ifd((274, 3, 1, 6)).replace(b"\1\0\x12", b"\x32\0\x12")  # says that it has fifty entries
    assert decode(with_segment(b"Exif\0\0" + cut), "fifty").shape == (24, 16, 3)
    xmp = b"http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation='8'/>"
    assert decode(with_segment(xmp), "xmp").shape == (24, 16, 3)


WEBP = b"RIFF\xb2\0\0\0WEBPVP8 \xa6\0\0\0\xb0\3\0\x9d\1\x2a" + struct.pack("<HH", 9329, 14578) + bytes(160)
AVIF = encode("AVIF", Image.new("RGB", (4096, 3072)), speed=10)


def ispe(width: int, height: int) -> bytes:
    return b"ispe" + bytes(4) + struct.pack(">II", width, height)


def of_rows(rows: int, picture: Image.Image = RGB, **options: Any) -> bytes:
    """A JPEG whose header says more rows than it has."""
    data = encode("JPEG", picture, **options)
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
    return data[:at] + struct.pack(">H", rows) + data[at + 2 :]


BAD = {
    "a PNG of 72 million pixels": (encode("PNG", Image.new("1", (9000, 8000))), "9000 x 8000 pixels, more than"),
    "a PNG of 720 million pixels": (encode("PNG", Image.new("1", (90_000, 8000))), "90000 x 8000 pixels, more than"),
    "a WebP of 190 bytes": (WEBP, "9329 x 14578 pixels"),
    "a lossless WebP": (WEBP[:12] + b"VP8L" + bytes(4) + b"\x2f" + b"\xff" * 4 + WEBP, "16384 x 16384 pixels"),
    "an extended WebP": (WEBP[:12] + b"VP8X" + bytes(8) + b"\xff" * 6 + WEBP, "16777216 x 16777216 pixels"),
    "a BMP": (encode("BMP")[:18] + struct.pack("<ii", 30_000, 30_000) + encode("BMP")[26:], "pixels"),
    "a GIF": (encode("GIF")[:6] + b"\xff" * 4 + encode("GIF")[10:], "pixels"),
    "a TIFF": (tiff(width=60_000, height=60_000, bits=8, photometric=1, strips=8), "pixels"),
    "a TIFF's tiles": (
        tiff(width=16, height=16, bits=8, photometric=1, tile_width=60_000, tile_length=60_000, tiles=8),
        "60000 x 60000 pixels",
    ),
    "a TIFF that claims data": (ifd((256, 4, 1 << 30, 8)) + bytes(4), "claims more data"),
    "a JPEG of a thousand scans": (encode("JPEG") + b"\xff\xda" * 1000, "more than 100 scans"),
    "a JPEG of ten times its rows": (of_rows(240), "fewer rows"),
    "a JPEG of one block more": (of_rows(32), "fewer rows"),
    "a gray JPEG of more rows": (of_rows(32, RGB.convert("L")), "fewer rows"),
    "a progressive JPEG of more rows": (of_rows(48, progressive=True), "fewer rows"),
    "an AVIF of other AV1 data": (AVIF.replace(ispe(4096, 3072), ispe(16, 16)), "12582912 pixels, and it says 16 x 16"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "none of AVIF, BMP"),
    "PDF": (b"%PDF-1.4\n", "none of"),
    "PPM": (b"P6 1 1 255 abc", "none of"),
    "half a JPEG": (encode("JPEG", quality=95)[:-40], "ends before its last pixel"),
    "half a PNG": (encode("PNG")[:-30], "not a readable picture"),
    "nothing": (b"", "not a readable picture"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_and_hostile_pictures_are_refused(case):
    data, reason = BAD[case]
    with pytest.raises(BadExample, match=reason) as error:
        decode(data, "x.jpg")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("mode", "bands"), [("RGB", 3), ("L", 1), ("CMYK", 4)])
@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(restart_marker_blocks=1), dict(quality=95)])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(mode, bands, options):
    noise = random.Random(0).randbytes(24 * 40 * bands)
    data = encode("JPEG", Image.frombytes(mode, (40, 24), noise), **options)
    for cut in (1, 2):
        np.testing.assert_array_equal(decode(data[:-cut], "x"), decode(data, "x"))
    for cut in (3, 4, 6, 9, 14):
        with pytest.raises(BadExample, match="ends before its last pixel"):
            decode(data[:-cut], "x")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (333, 257), (64, 1000)])
def test_an_avifs_pixels_are_its_sequence_headers(mode, size):
    data = encode("AVIF", Image.new(mode, size), speed=10)
    assert av1_pixels(data) == size[0] * size[1] * (2 if mode == "RGBA" else 1)
    frames = encode("AVIF", Image.new("RGB", size), save_all=True, append_images=[Image.new("RGB", size, "red")])
    assert av1_pixels(frames) == 2 * size[0] * size[1]  # the item and the track
    draw = random.Random(0)
    for _ in range(50):  # damage is read, or refused, in no time
        damaged = bytearray(frames)
        for _ in range(5):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            assert av1_pixels(bytes(damaged)) >= 0


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (17, 33), (40, 8)])
@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(restart_marker_blocks=1), dict(subsampling=0)])
def test_a_gray_jpeg_that_is_whole_is_read(size, options):
    data = encode("JPEG", Image.new("RGB", size, (128, 128, 128)), **options)
    assert (decode(data, "gray") == 128).all() and decode(data, "gray", small=True).size


def test_lab_is_rgb():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    soft = Image.linear_gradient("L").convert("RGB")
    lab = ImageCms.profileToProfile(soft, *profiles, outputMode="LAB")
    assert lab is not None
    assert np.abs(decode(encode("TIFF", lab), "x").astype(int) - np.asarray(soft)).max() <= 8


@pytest.mark.parametrize(("bits", "white"), [(8, 1), (8, 0), (12, 1), (16, 1), (16, 0)])
def test_white_is_white_whatever_the_bits(bits, white):
    data = (b"\xff" if white else b"\0") * (4 * 4 * bits // 8)
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, white), (273, 130), (277, 1), (278, 4), (279, len(data))]
    entries = ifd(*((tag, 3, 1, value) for tag, value in tags))
    assert (decode(entries.ljust(130, b"\0") + data, "x") == 255).all()


def test_the_bound_on_pixels_is_an_option():
    data = encode("PNG")
    assert decode(data, "x", max_pixels=16 * 24).shape == PIXELS.shape
    with pytest.raises(BadExample, match=r"24 x 16 pixels, more than data.max_pixels=383"):
        decode(data, "x", max_pixels=383)
    large = encode("PNG", Image.new("1", (15_000, 12_500)))  # what Pillow calls a bomb
    open_image(large, "x", 200_000_000).close()
    with pytest.raises(BadExample, match=r"x.png: 24 x 16"):
        open_image(data, "x.png", 383)
    assert {".avif", ".jfif", ".jpe"} < PICTURES and not {".eps", ".pdf"} & PICTURES


def test_what_is_within_the_bound_is_no_bomb(monkeypatch):
    data = encode("JPEG", Image.new("RGB", (2000, 1150), (128, 128, 128)))  # gray: its end is looked at, too
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_100_000)  # twice that is a bomb to Pillow
    assert decode(data, "x").shape == decode(data[:-2], "x").shape == (1150, 2000, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what a process has held")
def test_memory_is_bounded_by_pixels():
    code = """
import io
from pathlib import Path
from PIL import Image
from afa_jax.data.avif_size import av1_pixels
from afa_jax.data.decode import decode
data = io.BytesIO(); Image.new("RGBA", (4000, 4000)).save(data, "PNG")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
decode(data.getvalue(), "x")
print((peak() - before) * 1024 / 16e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert 3 < float(done.stdout) < 10  # bytes a pixel


@pytest.mark.parametrize("pixels", [0, -1, True, 1.5, "64"])
def test_a_bound_that_is_none(pixels):
    with pytest.raises(InputError, match=r"data.max_pixels="):
        check_max_pixels(pixels)
