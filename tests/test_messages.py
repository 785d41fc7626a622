"""What processes tell each other arrives as it was, by types and bits; errors by their class; and nothing else does."""

import errno
import json
import math
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from afa_jax.errors import BadExample, InputError, Stopped
from afa_jax.mesh.messages import dumps, loads
from afa_jax.training.checkpoints import NonFiniteError
from afa_jax.weights.tensors import WeightsError

NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000))[0]


class NeedsMore(InputError):
    """An error that is not made of the arguments it keeps."""

    def __init__(self, *, path: str):
        super().__init__(f"{path}: wrong")


class Elsewhere(Exception):
    """Of no known kind."""


def shape(value: object) -> object:
    """A value with all its types, floats by their bits; equal for those that are the same to the bit only."""
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, dict):
        return dict, [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    return type(value), value


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 1, -(10**400), 0.1, -0.0, 5e-324, 1e308, math.inf, -math.inf, NAN, "", "\0\ud800\u2028é",
        b"", bytes(range(256)), [], (), {}, [1, (2, [3, ()])], ((None, {}),), ["bytes", "00"], ["list"],
        {"dict": 1, 2: "2", None: (), True: [False], ("a", 1): b"\xff"}, {"losses": [1.0, NAN], "lines": None},
    ],
)  # fmt: skip
def test_a_value_arrives_as_it_was(value):
    assert shape(loads(dumps(value))) == shape(value)


@pytest.mark.parametrize("value", [np.float32(1), np.zeros(2), {1}, Path("a"), object(), signal.SIGINT, [print]])
def test_what_would_arrive_as_something_else_is_named_where_it_is_sent(value):
    with pytest.raises(TypeError, match="cannot be told to another process"):
        dumps(dict(value=value))


def test_nested_without_end_is_an_error_too():
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TypeError, match="nested"):
        dumps(value)


@pytest.mark.parametrize(
    "error",
    [
        InputError("a\x1b[31m: wrong"), BadExample("a.jpg", "no picture"), NonFiniteError("loss is nan"),
        WeightsError("a", 3), Stopped(signal.SIGTERM, 7), Stopped(signal.SIGINT, None), KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device", "/a/b"), OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file", "/a"), OSError("cannot identify it"),
    ],
)  # fmt: skip
def test_an_error_arrives_with_its_class_its_text_and_its_parts(error):
    _, told = loads(dumps((None, error)))
    assert type(told) is type(error) and str(told) == str(error)
    for part in ("errno", "strerror", "filename", "name", "reason", "by", "step", "status"):
        assert getattr(told, part, None) == getattr(error, part, None)


def test_an_error_that_another_process_cannot_make_keeps_its_text():
    told = loads(dumps(NeedsMore(path="a.png")))
    assert type(told) is InputError and str(told) == "a.png: wrong"
    told = loads(dumps(InputError(Path("a.png"))))
    assert type(told) is InputError and str(told) == "a.png"
    told = loads(json.dumps(["InputError", ["NotImported", "WeightsError"], ["a: wrong"], "a: wrong"]).encode())
    assert type(told) is WeightsError
    told = loads(dumps(OSError(errno.EACCES, "Permission denied", Path("a"))))
    assert type(told) is PermissionError and told.filename == "a"
    for error in (Elsewhere("what"), MemoryError("what"), SystemExit("what")):
        told = loads(dumps(error))
        assert type(told) is RuntimeError and str(told) == f"{type(error).__name__}: what"


@pytest.mark.parametrize(
    "data",
    [
        ["Elsewhere", "a"], ["threading.Thread"], ["InputError"], ["Stopped", "a", 1], {}, {"a": 1}, ["bytes", 3],
        ["list", {}], [],
    ],
)  # fmt: skip
def test_nothing_else_is_made_of_a_message(data):
    before = threading.active_count()
    with pytest.raises(ValueError, match="message"):
        loads(json.dumps(data).encode())
    with pytest.raises(ValueError, match="message"):
        loads(b"\x80\x04.")  # a pickle
    assert threading.active_count() == before
