"""Event files byte by byte, and what Weights & Biases is told."""

import io
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from afa_jax.errors import InputError
from afa_jax.training.log import Log
from afa_jax.training.workdir import Metrics, read_metrics
from afa_jax.training.writers import check_writers, make_writers, masked_crc32c

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def fields(message: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer by the wire format's rules: varints, doubles, bytes and floats."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value: Any = varint()
        elif kind == 2:
            length = varint()
            value, at = message[at : at + length], at + length
        else:
            size, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), at = struct.unpack(code, message[at : at + size]), at + size
        found.append((number, value))
    return found


def events(workdir: Path) -> list[dict[int, Any]]:
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
            event = content[12 : 12 + length]
            assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(event),)
            found.append(dict(fields(event)))
            content = content[16 + length :]
    return found


def test_the_checksum_is_crc32c():
    """The check value of CRC-32C and a vector of RFC 3720, with the mask taken off."""

    def unmasked(crc: int) -> int:
        rotated = (crc - 0xA282EAD8) % 2**32
        return (rotated << 15 | rotated >> 17) % 2**32

    assert unmasked(masked_crc32c(b"123456789")) == 0xE3069283
    assert unmasked(masked_crc32c(bytes(range(32)))) == 0x46DD794E


def test_event_files_hold_numbers_and_pictures_and_a_resumed_run_drops_later_steps(tmp_path):
    (writer,) = make_writers(["tensorboard"], tmp_path)
    writer.write(300, dict(loss=0.25, gradient_norm=-2.0), dict(grid=PICTURE))
    writer.close()
    (resumed,) = make_writers(["tensorboard"], tmp_path, first=200)
    resumed.write(201, dict(loss=0.5), {})
    resumed.close()
    version, written, version_too, session, after = events(tmp_path)
    assert version[3] == version_too[3] == b"brain.Event:2"
    assert written[2] == 300 and after[2] == 201
    values = [dict(fields(value)) for _, value in fields(written[5])]
    assert [value[1] for value in values] == [b"loss", b"gradient_norm", b"grid"]
    assert values[0][2] == 0.25 and values[1][2] == -2
    image = dict(fields(values[2][4]))
    assert (image[1], image[2], image[3]) == (5, 7, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image[4]))), PICTURE)
    # SessionLog START at step 201: TensorBoard drops everything from that step on that earlier files hold.
    assert session[2] == 201 and fields(session[7]) == [(1, 1)]


def test_tensorboard_reads_it(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (writer,) = make_writers(["tensorboard"], tmp_path, first)
        for step in steps:
            writer.write(step, dict(loss=step + 10.0 * first), dict(grid=PICTURE))
        writer.close()
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert [(e.step, e.width, e.height) for e in read.Images("grid")] == [(k, 7, 5) for k in (1, 2, 3, 4)]


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []

    def init(self, **options: Any) -> "FakeWandb":
        self.calls.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")

    def Image(self, picture: np.ndarray) -> tuple[str, tuple[int, ...]]:
        return "image", picture.shape


def test_weights_and_biases_continues_one_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    wandb.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps(dict(steps=4)))
    for first in (0, 2, 0):
        with Log(tmp_path, first, 4, writers=["wandb"], quiet=True) as log:
            log.write(first + 1, dict(loss=np.float32(0.5), grid=PICTURE))
    started, logged, finished, again, _, _, fresh, *_ = wandb.calls
    assert started["config"] == dict(steps=4) and started["resume"] == "allow" and started["name"] == tmp_path.name
    assert logged == (1, dict(loss=0.5, grid=("image", (5, 7, 3)))) and finished == "finish"
    assert again["id"] == started["id"] != fresh["id"]


def test_what_is_not_there_is_told_before_anything_is_written(monkeypatch):
    with pytest.raises(InputError, match="writers: no 'visdom'; choose from tensorboard, wandb"):
        check_writers(["visdom"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed; pip install wandb"):
        check_writers(["tensorboard", "wandb"])


def test_metrics_drop_later_lines_and_half_a_line(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.write(step, dict(loss=0.1 * step))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    metrics = Metrics(tmp_path, 2)
    metrics.write(3, dict(loss=0.7))
    metrics.close()
    assert read_metrics(tmp_path) == [dict(step=1, loss=0.1), dict(step=2, loss=0.2), dict(step=3, loss=0.7)]
    metrics = Metrics(tmp_path, 3, most=1)
    metrics.close()
    assert metrics.lines == 1 and len(read_metrics(tmp_path)) == 1
