"""Captions as people write them: read whole, or refused by line; what does not fit together is said."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afa_jax.data.folder import CaptionedFolder
from afa_jax.errors import BadExample, InputError

CSV, JSONL = "captions.csv", "captions.jsonl"
ROW = b'{"file_name": "0.png", "text": '


def make(folder: Path, files: dict[str, bytes | str]) -> None:
    """The files; pictures 0.png to 2.png are there always."""
    picture = Image.new("RGB", (4, 4))
    for name in ("0.png", "1.png", "2.png"):
        picture.save(folder / name)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder: Path, **options: Any) -> dict[str, str]:
    """Captions by picture; of bad examples the reason."""
    source = CaptionedFolder(str(folder), verify=False, **options)
    found = {}
    for index in range(len(source)):
        try:
            found[source.name(index)] = source.read(index)[1]
        except BadExample as error:
            found[source.name(index)] = f"bad: {error.reason}"
    return found


TWO = {"0.png": "fox, red", "1.png": "owl"}
CASES: dict[str, tuple[dict[str, bytes | str], dict[str, str] | str]] = {
    "commas in the last column": ({CSV: "file_name,text\n0.png,fox, red\n1.png,owl\n"}, TWO),
    "commas elsewhere": ({CSV: "text,file_name\nfox, red,0.png\n"}, "line 2: 3 cells in 2 columns"),
    "commas and quotes": ({CSV: 'file_name,text\n0.png,fox, "red"\n'}, "line 2: 3 cells in 2 columns"),
    "too few cells": ({CSV: "file_name,text\n0.png\n"}, "line 2: 1 cells in 2 columns"),
    "empty cells of a spreadsheet": ({CSV: "file_name,text,,\n0.png,fox;red,,,\n,,,\n\n"}, {"0.png": "fox;red"}),
    "a quote left open": ({CSV: 'file_name,text\n0.png,fox\n1.png,"owl\n2.png,elk\n'}, "line 3: a double quote opens"),
    "a quote closed too late": (
        {CSV: 'file_name,text\n0.png,"fox\n1.png,owl\n2.png,"\n'},
        "line 2: a double quote opens",
    ),
    "a quote within": ({CSV: 'file_name,text\n0.png,"big" fox\n'}, "line 2: text after a closing quote"),
    "a text of two lines": ({CSV: 'file_name,text\n0.png,"fox\nred"\n'}, {"0.png": "fox\nred"}),
    "semicolons": ({CSV: "file_name;text\n0.png;fox, red\n1.png;owl\n"}, TWO),
    "tabs and Excel's first line": ({CSV: "sep=\t\nfile_name\ttext\n0.png\tfox, red\n1.png\towl\n"}, TWO),
    "spaces and capitals": ({CSV: 'File_Name, Text\n0.png, "fox, red"\n1.png, owl\n'}, TWO),
    "UTF-16 and Mac's line ends": ({CSV: 'file_name,text\r0.png,"fox, red"\r1.png,owl\r'.encode("utf-16")}, TWO),
    "Latin-1": ({CSV: "file_name,text\n0.png,fox\n1.png,caf\xe9\n".encode("latin-1")}, "line 3: not UTF-8 .*0xe9"),
    "NUL": ({CSV: b"file_name,text\n0.png,fox\0\n"}, "line 2: NUL"),
    "a column twice": ({CSV: "file_name,text,Text\n0.png,fox,red\n"}, "line 1: the column text is there twice"),
    "other columns": (
        {CSV: "image,caption\n0.png,fox\n"},
        "expected columns file_name and text, there are: image, cap",
    ),
    "a book": ({CSV: f"file_name,text\n0.png,{'x' * 140_000}\n"}, "line 2: field larger"),
    "JSON lines": ({JSONL: b"\xef\xbb\xbf" + ROW + b'"fox, red"}\r\n' + ROW.replace(b"0", b"1") + b'"owl"}\r\n'}, TWO),
    "no caption": ({JSONL: ROW + b"null}"}, {"0.png": "bad: no caption"}),
    "a surrogate": ({JSONL: ROW + b'"fox \\ud83d"}'}, {"0.png": "bad: the caption has U.D83D"}),
    "NUL in JSON": ({JSONL: ROW + b'"fox \\u0000"}'}, {"0.png": "bad: the caption has U.0000"}),
    "a long text": ({JSONL: ROW + b'"' + b"x" * 60_000 + b'"}'}, {"0.png": "bad: a caption of 60,000"}),
    "a list in JSON": ({JSONL: b"[" + ROW + b'"fox"}]'}, "line 1: no JSON object"),
    "deep JSON": ({JSONL: ROW + b"[" * 100_000}, r"line 1: no JSON object \(it is nested too deep\)"),
    "a number of 5000 digits": ({JSONL: ROW + b"1" * 5000 + b"}"}, r"line 1: .* \(it has a number of thousands of dig"),
    "names of another folder": (
        {CSV: "file_name,text\n/x/y/0.png,fox\nC:\\y\\1.png,owl\n"},
        "outside of it; 0.png is in the folder: write names without folders",
    ),
    "names of nothing": ({CSV: "file_name,text\n../x.png,fox\n"}, "outside of it; put the files there, or links to"),
    "a key twice": ({JSONL: ROW + b'"fox", "text": "owl"}'}, "line 1: .*a key is there twice"),
    "names of Windows": ({JSONL: rb'{"file_name": "a\\3.png", "text": "fox"}', "a/3.png": b""}, {"a/3.png": "fox"}),
    "composed names": ({JSONL: '{"file_name": "\xe9.png", "text": "fox"}', "e\u0301.png": b""}, {"e\u0301.png": "fox"}),
    "nothing is there": ({CSV: "file_name,text\n7.png,fox\n"}, r"none of its 1 rows .*7.png"),
    "imagefolder": ({"metadata.jsonl": ROW + b'"fox"}'}, {"0.png": "fox"}),
    "imagefolder of another key": (
        {"metadata.jsonl": b'{"file_name": "0.png", "tags": 1}'},
        "there are: file_name, tags",
    ),
    "metadata.csv": ({"metadata.csv": "file_name,text\n0.png,fox\n"}, {"0.png": "fox"}),
    "metadata below": ({"train/metadata.csv": "file_name,text\n"}, "there is train/metadata.csv: give its folder"),
    "two lists": ({CSV: "file_name,text\n", "metadata.csv": "x"}, "captions.csv and in metadata.csv; .*data.captions"),
    "two texts": ({"0.txt": "fox", "0.caption": "owl"}, r"0.png in 0.*txt.* data.captions=txt"),
    ".caption and .png.txt": (
        {"0.caption": "fox, red", "1.png.TXT": b"\xff\xfeo\0w\0l\0"},
        TWO | {"2.png": "bad: no caption"},
    ),
    "Macs' files": (
        {"0.txt": "fox", "._0.png": b"x", "__MACOSX/3.png": b"x", ".ipynb_checkpoints/4.png": b"x", "Thumbs.db": b"x"},
        {"0.png": "fox", "1.png": "bad: no caption", "2.png": "bad: no caption"},
    ),
    "other files": ({"0.heic": b"x", "a.json": b"x", "b.json": b"x"}, r"2 .json, 1 .heic"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_captions_are_read_whole_or_refused_by_line(case, tmp_path):
    files, right = CASES[case]
    make(tmp_path, files)
    if case == "other files":
        for name in ("0.png", "1.png", "2.png"):
            (tmp_path / name).unlink()
    if isinstance(right, str):
        with pytest.raises(InputError, match=right) as error:
            read(tmp_path)
        assert str(error.value).isprintable()
        return
    found = read(tmp_path)
    assert found.keys() == right.keys()
    for name, caption in right.items():
        assert found[name].startswith(caption.replace("U.", "U+")) if caption[:4] == "bad:" else found[name] == caption


def test_a_choice_between_captions_is_the_users(tmp_path):
    make(tmp_path, {"0.txt": "fox", "0.caption": "owl", "1.txt": "elk", CSV: "file_name,caption\n0.png,cow\n"})
    assert read(tmp_path, captions="txt") == {"0.png": "fox", "1.png": "elk", "2.png": "bad: no caption"}
    with pytest.warns(UserWarning, match=r"1 texts have no picture|2 of 3 pictures"):
        assert read(tmp_path, captions=CSV, text="caption") == {"0.png": "cow"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({CSV: "file_name,text\n0.png,a\n0.png,b\n9.png,c\n"}, "1 of 3 rows .*9.png.*2 of 3 pictures .*1.png.*0.png"),
        ({CSV: "file_name,text\n0.png,a, b\n1.png,c\n2.png,d\n"}, r"captions.csv: 1 texts have a comma .*lines 2\)"),
        (
            {"0.txt": "a", "3.heic": b"x", "3.txt": "b", "4.mp4": b"x", "4.caption": "c", "5.txt": "d", "0.json": "{}"},
            r"2 captioned files are left out.*3.heic, 4.mp4.*1 texts have no picture \(5.txt",
        ),
        (
            {CSV: "file_name,text\n0.png,a\n1.png,b\n2.png,c\n/x/2.png,d\n../9.png,e\n9.png,f\n"},
            r"1 of 6 .* not there \(9.png\); 2 of 6 rows .* outside of the folder; 2.png is in the folder: write",
        ),
        ({"0.txt": "a", "\x1bX\nerror: y.heic": b"x", "\x1bX\nerror: y.txt": b"x"}, r"\\x1bX error: y.heic"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said_in_one_line(files, said, tmp_path):
    make(tmp_path, files)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path)
    assert len(caught) == 1 and str(caught[0].message).isprintable()
    with pytest.raises(UserWarning, match=said):
        raise UserWarning(str(caught[0].message))


def test_a_pipe_is_no_picture(tmp_path):
    make(tmp_path, {JSONL: json.dumps(dict(file_name="pipe.png", text="fox")) + "\n" + ROW.decode() + '"owl"}'})
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert read(tmp_path) == {"pipe.png": "bad: no file but a folder, a pipe or a device", "0.png": "owl"}
