"""What comes from a file is shown on one line, without characters that act on a terminal or a page."""

import warnings

import pytest

from afa_jax.commands import run
from afa_jax.distributed import say
from afa_jax.errors import BadExample, InputError, printable, some
from afa_jax.report.escape import escape

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
}


@pytest.mark.parametrize("case", HOSTILE)
def test_texts_of_files_are_cleaned_wherever_they_are_printed(case, capsys):
    text = HOSTILE[case]

    def command(arguments: object) -> None:
        say(text)
        warnings.warn(text, stacklevel=1)
        raise InputError(f"{text}: wrong")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(command, []) == 2
    out, err = capsys.readouterr()
    lines = [*out.splitlines(), *err.splitlines()]
    assert len(lines) == 3 and lines[1].startswith("warning: ") and lines[2].startswith("error: ")
    for line in (printable(text), some([text] * 9), escape(text), str(BadExample(text, text)), *lines):
        assert line.isprintable() and len(line) < 11_000
        line.encode()
    assert printable("caf\xe9 \U0001f419, 日本語") == "caf\xe9 \U0001f419, 日本語"


def test_markup_is_shown():
    assert escape("<script>\u202ex") == "&lt;script&gt;\\u202ex"
    assert some(["a", "b", "c"], 2) == "a, b and 1 more"
