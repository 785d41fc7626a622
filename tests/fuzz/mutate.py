"""Damage for files: of bytes, of lines, and of the structure inside, whose lengths and sums are made right again."""

from __future__ import annotations

import json
import random
import re
import struct
import tarfile
import zlib
from typing import Any

NUMBERS = (
    "0", "-1", "1e300", "1e400", "NaN", "Infinity", "-Infinity", "0.1", "2147483648", "4294967296", "8589934592",
    "9223372036854775808", "18446744073709551615", "1" * 400, "1" * 5000, "-" + "9" * 30,
)  # fmt: skip
TEXTS = (
    "", "\x00", "a\x00b", "\ud800", "\x1b[31mred", "line\nerror: forged", "\u202eevil", "../../x", "/etc/passwd",
    "x" * 100_000, "None", "🐙", "a,b", '"', "..", ".", "con", "\ufeff", "%s%n", "file:///x", "=1+1",
)  # fmt: skip
DEEP = 100_000
LARGEST = 2**20  # bytes of JSON that a change looks into, and that a copied list may fill
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, name: str, random: random.Random) -> bytes:
    """One to four changes of a file's bytes; those that suit the kind of file are more frequent."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice((*_structural(name), _structural(name)[0], _bytes))(data, random)
    return data


def _structural(name: str) -> tuple[Any, ...]:
    if name.endswith((".safetensors", ".sft")):
        return _safetensors, _bytes
    if name.endswith(".json"):
        return _json, _json, _text
    if name.endswith((".jsonl", ".log")):
        return _json_line, _text, _line
    if name.endswith(".tar"):
        return _tar, _bytes
    if name.endswith(".png"):
        return _png, _bytes
    if name.endswith((".csv", ".txt", ".tsv", ".yaml", ".caption", ".md")):
        return _text, _line
    return (_bytes,)


def _bytes(data: bytes, random: random.Random) -> bytes:
    if not data:
        return random.randbytes(random.choice((1, 8, 600)))
    at = random.randrange(len(data))
    # Headers decide more than what follows them.
    at = random.choice((at, at % min(len(data), 64), at % min(len(data), 1024)))
    match random.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + random.randbytes(1) + data[at + 1 :]
        case 3:
            return data[:at] + random.randbytes(random.choice((1, 4, 64))) + data[at:]
        case 4:
            end = at + random.choice((1, 4, 64, 512))
            return data[:at] + data[end:]
        case 5:
            end = at + random.choice((1, 8, 64, 512))
            return data[:end] + data[at:end] * random.choice((1, 2, 50)) + data[end:]
        case 6:
            size = random.choice((1, 2, 4, 8))
            number = (random.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, random.choice(("little", "big")))
            return data[:at] + number + data[at + size :]
        case 7:
            return data + random.randbytes(random.choice((1, 512, 4096)))
        case _:
            end = at + random.choice((4, 16, 256))
            return data[:at] + bytes(len(data[at:end])) + data[end:]


def _text(data: bytes, random: random.Random) -> bytes:
    """Change a number, a word or a mark, or put a text that is hard to digest somewhere."""
    text = data.decode("utf-8", "surrogateescape")
    tokens = list(re.finditer(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\w+|[^\w\s]", text)) if len(text) < 200_000 else []
    if not tokens:
        return _bytes(data, random)
    token = random.choice(tokens)
    new = random.choice((random.choice(NUMBERS), random.choice(TEXTS), "", token[0] * 2, token[0] + "\n", "[" * DEEP))
    return (text[: token.start()] + new + text[token.end() :]).encode("utf-8", "surrogatepass")


def _line(data: bytes, random: random.Random) -> bytes:
    """Remove, double, swap, join or change the ends of lines; another encoding."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at] += b"x" * random.choice((10, 200_000))
        case 3:
            return data.replace(b"\n", random.choice((b"\r", b"\r\n", b"\n\n", b"\x00\n", b" ")))
        case 4:
            return data.decode("utf-8", "replace").encode(
                random.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1")), "replace"
            )
        case 5:
            return data.replace(b",", random.choice((b";", b"\t", b",,", b"")))
        case _:
            lines[at] = lines[at][: len(lines[at]) // 2]
    return b"\n".join(lines)


def _json_line(data: bytes, random: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = _json(lines[at], random)
    return b"\n".join(lines)


def _json(data: bytes, random: random.Random) -> bytes:
    """Change one value somewhere in a JSON document to one of another type, size or sense."""
    if len(data) > LARGEST:
        return _bytes(data, random)
    try:
        # Indentation grows with the square of the depth: 5,000 levels would be 50 MB.
        indent = random.choice((None, 2)) if b"[" * 100 not in data else None
        text = json.dumps(_changed(json.loads(data), random), indent=indent)
    except (ValueError, RecursionError):
        return _text(data, random)
    # What json.dumps cannot write: numbers that Python would not keep, nesting, keys that are there twice.
    if '"@number@"' in text:
        text = text.replace('"@number@"', random.choice(NUMBERS), 1)
    if '"@deep@"' in text:
        text = text.replace('"@deep@"', random.choice(("[" * DEEP, "[" * 5000 + "]" * 5000, '{"a":' * DEEP)), 1)
    if random.random() < 0.1 and (keys := re.findall(r'"[^"\\]{1,40}":', text)):
        text = text.replace(keys[0], random.choice(keys) + random.choice(("null", "1", '"x"', "[]")) + "," + keys[0], 1)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, random: random.Random) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return value | {random.choice(TEXTS): value[key]}
            case _:
                return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        match random.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                copies = random.choice((2, 3000))
                fits = len(json.dumps(value[at])) * copies < LARGEST
                return value[:at] + [value[at]] * (copies if fits else 2) + value[at:]
            case _:
                return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    others: tuple[Any, ...] = (None, True, False, [], {}, [1], {"a": 1}, "@number@", "@number@", "@deep@", 0, -1, 1.5)
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.3:
        small = value if abs(value) < 10**300 else 7  # a float holds no more, and str() has its limit too
        return random.choice((small + 1, small - 1, -small, small * 1000, float(small), str(small)))
    return random.choice((*others, random.choice(TEXTS)))


def _safetensors(data: bytes, random: random.Random) -> bytes:
    """Change the header and say its new length, so that the change is read and not the length's mistake."""
    if len(data) < 8:
        return _bytes(data, random)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = random.choice((_json, _json, _text, _bytes))(header.rstrip(b" "), random)
    return struct.pack("<Q", len(header)) + header + rest


def _tar(data: bytes, random: random.Random) -> bytes:
    """Change a field of a member's header, with the sum that goes with it; or put a pax header before a member."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    if not headers:
        return _bytes(data, random)
    number = random.choice(headers)
    if random.random() < 0.4:
        keys = (
            "size",
            "mtime",
            "path",
            "linkpath",
            "GNU.sparse.size",
            "GNU.sparse.map",
            "GNU.sparse.realsize",
            "hdrcharset",
        )
        text = random.choice((*NUMBERS, "inf", "-inf", *(text[:3000] for text in TEXTS)))
        record = f" {random.choice(keys)}={text}\n".encode("utf-8", "surrogatepass")
        claimed = random.choice((len(record) + len(str(len(record) + 3)), 99_999_999_999))
        body = str(claimed).encode() + record
        info = tarfile.TarInfo("pax")
        info.type, info.size = random.choice((tarfile.XHDTYPE, tarfile.XGLTYPE)), len(body)
        extra = info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
        blocks.insert(number, extra)
        return b"".join(blocks)
    fields = {
        "name": (0, 100),
        "size": (124, 12),
        "mtime": (136, 12),
        "type": (156, 1),
        "link": (157, 100),
        "prefix": (345, 155),
    }
    start, width = fields[random.choice(list(fields))]
    value = random.choice(
        (
            random.randbytes(width),
            b"\x80" + bytes(width - 1) if width > 1 else b"S",
            b"\xff" * width,
            b"\x80" + (2**33).to_bytes(width - 1, "big") if width > 8 else b"1",
            b"7" * (width - 1) + b"\0",
            random.choice(TEXTS).encode("utf-8", "surrogatepass")[:width].ljust(width, b"\0"),
            random.choice((b"1", b"2", b"L", b"S", b"g", b"x", b"K", b"5", b"3"))[:width].ljust(width, b"\0"),
        )
    )
    block = bytearray(blocks[number])
    block[start : start + width] = value
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    blocks[number] = bytes(block)
    return b"".join(blocks)


def _png(data: bytes, random: random.Random) -> bytes:
    """Change a chunk, or add one, with the sum that goes with it."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return _bytes(data, random)
    number = random.randrange(len(chunks))
    kind, body = chunks[number]
    match random.randrange(4):
        case 0:
            size = random.choice((1, 64, 13_300, 100_000, 2**31 - 1, 0))
            other = random.choice((1, 64, 13_300, 100_000))
            chunks[0] = (b"IHDR", struct.pack(">II", size, other) + chunks[0][1][8:])
        case 1:
            extra = random.choice(
                (b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"acTL", b"fcTL", b"tRNS", b"PLTE", b"gAMA")
            )
            text = random.choice(
                (random.randbytes(30), b"a\0\0" + zlib.compress(b"x" * 5_000_000), b"XML:com.adobe.xmp\0\0\0\0\0\xa8")
            )
            chunks.insert(random.randrange(1, len(chunks) + 1), (extra, text))
        case 2:
            chunks[number] = (kind, _bytes(body, random))
        case _:
            chunks.insert(number, chunks[number])
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
