"""What comes from a file is shown on one line, without characters that act on a terminal or a page."""

import contextlib
import errno
import os
import re
import sys
import warnings

import jax
import pytest

from afa_jax.cli.commands import Parser, run
from afa_jax.errors import LONGEST, BadExample, InputError, printable, some
from afa_jax.mesh.processes import log_once
from afa_jax.report.pages import render

HOSTILE = {
    "an escape sequence": "\x1b[31mX\x1b]0;title\x07",
    "a forged line": "a.jpg\nerror: forged\r\nwarning: forged",
    "other line ends": "a\x0b\x0c\x85\u2028\u2029b",
    "bytes of C1": "a\x9b31m",
    "writing turned": "photo_\u202egpj.exe\u2066\u200f",
    "no width": "a\u200b\u200d\ufeff\u2060b",
    "half a pair": "a\ud800\udcffb",
    "NUL": "a\0b",
    "tags": "a\U000e0041",
    "long": "x" * 100_000,
    "long, of escapes": "\U000e0041" * 100_000,
}


def shown(text: str) -> str:
    """A text in a page."""
    page = render("chart.html", svg="a chart", keys=[(text, "red")], left_out=0)
    return page.rpartition("</span></p>")[0].rpartition(">")[2]


@pytest.mark.parametrize("case", HOSTILE)
def test_texts_of_files_are_cleaned_wherever_they_are_printed(case, capsys):
    text = HOSTILE[case]

    def command(arguments: object) -> None:
        log_once(text)
        warnings.warn(text, stacklevel=1)
        raise InputError(f"{text}: wrong")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(command, []) == 2
    out, err = capsys.readouterr()
    lines = [*out.splitlines(), *err.splitlines()]
    assert len(lines) == 3 and lines[1].startswith("warning: ") and lines[2].startswith("error: ")
    errors = InputError(text), BadExample(text, text)
    assert all(len(argument) <= LONGEST for error in errors for argument in error.args)
    for line in (printable(text), some([text] * 9), *map(str, errors), *lines):
        assert line.isprintable() and len(line) <= LONGEST + len("warning: ")
    for line in (*lines, shown(text)):
        assert line.isprintable() and len(line) < 11_000
        line.encode()
    assert printable("caf\xe9 \U0001f419, 日本語") == "caf\xe9 \U0001f419, 日本語"


@pytest.mark.parametrize("how", ["full", "gone", "closed"])
@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize("command", [lambda _: print("a"), lambda _: Parser(prog="a").parse_args(["--help"])])
def test_output_that_takes_nothing_is_named_in_a_line(command, how, buffering, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(open("/dev/full", "w", buffering=buffering))
        gone = stack.enter_context(open(write, "w", buffering=buffering))
        monkeypatch.setattr(sys, "stdout", dict(full=full, gone=gone, closed=None)[how])
        try:
            status = run(command, [])
        except SystemExit as ended:  # after --help
            status = int(ended.code or 0)
        stack.enter_context(sys.stdout)
    said = capsys.readouterr().err.splitlines()
    expected = dict(full=" or a temporary file: no space left on the disk; make", gone=": whoever", closed=None)[how]
    assert status == (2 if expected else 0)
    assert expected is None or (said[0].startswith("error: standard output") and expected in said[0])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full", "/a/b"), r"/a/b: no space left on the disk; make room"),
        (OSError(errno.ENOSPC, "full"), r"standard output or a temporary file: no space left"),
        (OSError(errno.EDQUOT, "full", "/a\x1b"), r"/a\\x1b: no space left"),
        (OSError(errno.EFBIG, "large", "/a/b"), r"/a/b: no file may be that large there; raise the limit"),
        (OSError(errno.EIO, "Input/output error", "/a/b"), r"/a/b: Input/output error; choose another place"),
    ],
)  # fmt: skip
def test_an_error_of_the_disk_names_the_place_and_what_to_do(error, said, capsys):
    def command(arguments: object) -> None:
        raise error

    assert run(command, []) == 2
    assert re.fullmatch(f"error: {said}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 20268947296 bytes.\nmore"),
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), MemoryError(),
    ],
)  # fmt: skip
def test_too_little_memory_is_a_line_that_says_what_to_make_smaller(error, capsys):
    def command(arguments: object) -> None:
        raise error

    assert run(command, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "--size" in said and "batch" in said
    assert all(line in said for line in str(error).splitlines()[:1])


def test_markup_is_shown():
    assert shown("<script>\u202ex") == "&lt;script&gt;\\u202ex"
    assert some(["a", "b", "c"], 2) == "a, b and 1 more"
