"""Writers of a run's metrics besides metrics.jsonl: TensorBoard event files, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from afa_jax.errors import InputError
from afa_jax.files import replace_text
from afa_jax.json_files import append, read_object

NAMES = ("tensorboard", "wandb")


@runtime_checkable
class Writer(Protocol):
    """A receiver of the numbers and the pictures (uint8 ``[h, w, 3]``) of each step."""

    def write(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


def check_writers(names: Sequence[str]) -> None:
    """Raise InputError for a writer that does not exist or is not installed; call before the workdir is touched."""
    for name in names:
        if name not in NAMES:
            raise InputError(f"writers: no {name!r}; choose from {', '.join(NAMES)}, or none")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise InputError("writers: wandb is not installed; pip install wandb, or leave it out")


def make_writers(names: Sequence[str], workdir: Path, first: int = 0) -> list[Writer]:
    """Return the named writers for a run that begins, or continues, after step ``first``.

    Raises:
        InputError: as check_writers.
    """
    check_writers(names)
    makers: dict[str, Callable[[Path, int], Writer]] = dict(tensorboard=TensorBoard, wandb=WeightsAndBiases)
    return [makers[name](workdir, first) for name in names]


class TensorBoard:
    """An event file in ``workdir/tensorboard``, as TensorFlow's summary writers write it.

    The format: records of TFRecord files (length, its checksum, data, its checksum), each an Event message of
    tensorflow/core/util/event.proto, encoded here. When a run resumes, or restarts for lack of a checkpoint, a new
    file begins with the mark that makes TensorBoard drop the later steps of earlier files.
    """

    def __init__(self, workdir: Path, first: int = 0):
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        now, again = time.time(), any(folder.iterdir())
        # Names sort by time: TensorBoard reads the files in that order.
        self._file = FileIO(folder / f"events.out.tfevents.{now:017.6f}.{os.getpid()}.afa_jax", "a")
        self._event(0, _field(3, b"brain.Event:2"))
        if first or again:
            session_start = _field(1, 1)
            self._event(first + 1, _field(7, session_start))

    def write(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        values = [_field(1, tag.encode()) + _field(2, float(number)) for tag, number in numbers.items()]
        for tag, picture in pictures.items():
            height, width, _ = picture.shape
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            image = _field(1, height) + _field(2, width) + _field(3, 3) + _field(4, png.getvalue())
            values.append(_field(1, tag.encode()) + _field(4, image))
        self._event(step, _field(5, b"".join(_field(1, value) for value in values)))

    def close(self) -> None:
        self._file.close()

    def _event(self, step: int, content: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + _field(2, step) + content  # field 1 is a double
        length = struct.pack("<Q", len(event))
        record = length + struct.pack("<I", masked_crc32c(length)) + event + struct.pack("<I", masked_crc32c(event))
        append(self._file, record)


class WeightsAndBiases:
    """A run of Weights & Biases, named like the workdir, with the run's config; it needs ``pip install wandb``.

    A resumed run continues it. Weights & Biases takes no step twice, so it keeps the numbers of steps that are trained
    again; training them again gives the same numbers.
    """

    def __init__(self, workdir: Path, first: int = 0):
        import wandb

        record = workdir / "wandb.json"
        run_id = _run_id(record) if first and record.is_file() else uuid.uuid4().hex
        replace_text(record, json.dumps(dict(id=run_id)) + "\n")
        config = workdir / "config.json"
        self._image = wandb.Image
        self._run = wandb.init(
            project="afa_jax",
            name=workdir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config=read_object(config, "restore it from another copy of the run") if config.is_file() else None,
        )

    def write(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        values: dict[str, Any] = dict(numbers)
        values |= {name: self._image(picture) for name, picture in pictures.items()}
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(record: Path) -> str:
    advice = "remove it, and Weights & Biases shows what follows as another run"
    run_id = read_object(record, advice).get("id")
    if not isinstance(run_id, str):
        raise InputError(f"{record}: id={run_id!r} is no run's; {advice}")
    return run_id


def _field(number: int, value: int | float | bytes) -> bytes:
    """Return an encoded field of a protocol buffer: a varint, a float32, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of TFRecord files: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]
