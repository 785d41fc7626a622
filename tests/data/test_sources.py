"""Every source gives the same examples from the same pictures, names what is wrong, and pickles."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from afa_jax import prepare
from afa_jax.cli.commands import run
from afa_jax.data.decode import decode
from afa_jax.data.files import below_common, braces, filesystem
from afa_jax.data.folder import CaptionedFolder
from afa_jax.data.sources import PictureSource, make_source
from afa_jax.data.tar import TarSource
from afa_jax.errors import BadExample, InputError
from tests.data import formats

FORMATS = (
    "jsonl",
    "csv",
    "txt",
    "tar",
    "json_tar",
    "parquet",
    "bytes_parquet",
    "journeydb",
    "coco",
    "captioned_folder",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures in all formats, each in a folder of its name; prepared data sets in ``prepared``."""
    root = tmp_path_factory.mktemp("formats")
    formats.write_jsonl(root / "jsonl")
    formats.write_csv(root / "csv")
    formats.write_txt(root / "txt")
    for number, part in enumerate((range(4), range(4, formats.COUNT))):
        formats.write_tar(root / "tar" / f"{number:03d}.tar", part)
        formats.write_tar(root / "json_tar" / f"{number:03d}.tar", part, caption="json")
        formats.write_parquet(root / "parquet" / f"train-{number}.parquet", part)
        formats.write_parquet(root / "bytes_parquet" / f"train-{number}.parquet", part, struct=False)
    formats.write_journeydb(root / "journeydb")
    formats.write_coco(root / "coco")
    for builder, folder in (("journeydb", "journeydb"), ("coco", "coco"), ("folder", "csv")):
        arguments = ["--builder", builder, "--from", str(root / folder), "--out", str(root / "prepared")]
        assert run(prepare.main, arguments) == 0
    return root


def source_of(root: Path, name: str) -> PictureSource:
    kinds: dict[str, dict[str, Any]] = {
        "tar": dict(kind="tar", paths=f"{root}/tar/{{000..001}}.tar"),
        "json_tar": dict(kind="tar", paths=f"{root}/json_tar/*.tar"),
        "parquet": dict(kind="parquet", paths=f"{root}/parquet/*.parquet"),
        "bytes_parquet": dict(
            kind="parquet", paths=[f"{root}/bytes_parquet/train-{n}.parquet" for n in (0, 1)], row_groups=1
        ),
        "journeydb": dict(kind="tfds", name="journeydb", data_dir=f"{root}/prepared"),
        "coco": dict(kind="tfds", name="coco_pairs:1.0.0", data_dir=f"{root}/prepared", split="val2017"),
        "captioned_folder": dict(kind="tfds", data_dir=f"{root}/prepared/captioned_folder/1.0.0"),
    }
    fields = kinds.get(name, dict(kind="folder", path=f"{root}/{name}"))
    # Fields that are the loader's are none of the source's business.
    return make_source(ConfigDict(dict(size=(8, 8), bad="skip", **fields)))


def content(source: PictureSource) -> dict[str, bytes]:
    """Pictures by caption."""
    examples = [source[index] for index in range(len(source))]
    return {
        example["caption"]: example["image"].tobytes() + str(example["image"].shape).encode() for example in examples
    }


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_pictures_in_every_format(root, name):
    source = source_of(root, name)
    assert isinstance(source, PictureSource)
    assert len(source) == formats.COUNT
    expected = {
        caption: formats.picture(index).tobytes() + str(formats.picture(index).shape).encode()
        for index, caption in enumerate(formats.CAPTIONS)
    }
    assert content(source) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert content(copy) == expected
    assert len({source.name(index) for index in range(len(source))}) == formats.COUNT
    assert copy.fingerprint == source.fingerprint == source_of(root, name).fingerprint
    assert len(source.fingerprint) == 64


def test_fingerprints_tell_changes_of_captions_and_pictures(tmp_path):
    formats.write_txt(tmp_path / "txt")
    formats.write_jsonl(tmp_path / "jsonl")
    formats.write_tar(tmp_path / "tar" / "a.tar")
    formats.write_parquet(tmp_path / "parquet" / "a.parquet")

    def prints() -> list[str]:
        folders = [dict(kind="folder", path=f"{tmp_path}/{name}") for name in ("txt", "jsonl")]
        files = [dict(kind=kind, paths=f"{tmp_path}/{kind}/*") for kind in ("tar", "parquet")]
        return [make_source(ConfigDict(fields)).fingerprint for fields in (*folders, *files)]

    before = prints()
    assert len(set(before)) == 4
    caption = tmp_path / "txt" / "0" / "0000.txt"
    caption.write_text(caption.read_text().replace("fox", "fax"))  # no longer than before
    (tmp_path / "jsonl" / formats.name(3)).write_bytes(formats.encoded(4))
    formats.write_tar(tmp_path / "tar" / "a.tar", range(formats.COUNT - 1))
    formats.write_parquet(tmp_path / "parquet" / "a.parquet", range(formats.COUNT - 1))
    assert not set(before) & set(prints())


@pytest.mark.parametrize("name", ["jsonl", "txt", "tar", "parquet"])
def test_a_bucket_is_read_as_a_folder_is(root, name):
    memory = fsspec.filesystem("memory")
    memory.put(str(root / name), f"/bucket/{name}", recursive=True)
    url = f"memory://bucket/{name}"
    kind = name if name in ("tar", "parquet") else "folder"
    source = make_source(
        ConfigDict(dict(kind=kind, path=url) if kind == "folder" else dict(kind=kind, paths=f"{url}/*"))
    )
    local = source_of(root, name)
    assert content(source) == content(local)
    assert source.fingerprint == local.fingerprint


def test_a_missing_driver_is_named():
    assert "gcsfs" not in sys.modules
    with pytest.raises(InputError, match=r"gs://bucket/x: .*pip install gcsfs") as error:
        filesystem("gs://bucket/x")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"abc://x: Protocol not known"):
        filesystem("abc://x")


def test_braces():
    assert braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert braces("{0..1}/{x,y}") == ["0/x", "0/y", "1/x", "1/y"]
    assert braces("plain") == ["plain"]
    for pattern in (
        "part-{0..99999999999}.tar",
        "{0..99999}/{0..9}.tar",
        "{0..9" + "9" * 5000 + "}",
        "{a,b}" * 17,
        "{a}" * 2000,
    ):
        with pytest.raises(InputError, match=r"more than 100,000 files; .*glob"):
            braces(pattern)


def test_files_in_several_folders_have_several_names(tmp_path):
    assert below_common(["/x/a/1.tar", "/x/b/1.tar"]) == ["a/1.tar", "b/1.tar"]
    assert below_common(["bucket/x/1.tar"]) == ["1.tar"]
    assert below_common(["https://host/a/1.tar", "https://host/b/c/1.tar"]) == ["a/1.tar", "b/c/1.tar"]
    for part in ("a", "b"):
        formats.write_tar(tmp_path / part / "0.tar", range(2))
        formats.write_parquet(tmp_path / part / "0.parquet", range(2))
    for kind in ("tar", "parquet"):
        source = make_source(ConfigDict(dict(kind=kind, paths=f"{tmp_path}/*/*.{kind}")))
        assert len({source.name(index) for index in range(4)}) == 4
        assert source.name(0).startswith(f"a/0.{kind}") and source.name(3).startswith(f"b/0.{kind}")


def test_folders_behind_links_count(tmp_path):
    formats.write_txt(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/0/back").symlink_to(tmp_path / "data")  # and round
    source = make_source(ConfigDict(dict(kind="folder", path=f"{tmp_path}/data")))
    assert [source.name(i) for i in range(len(source))] == sorted(f"link/{formats.name(i)}" for i in range(9))


def test_a_fingerprint_knows_pictures_by_any_name(tmp_path):
    formats.write_pictures(tmp_path / "data")
    formats.write_pictures(tmp_path / "other")
    (tmp_path / "data/link").symlink_to(tmp_path / "other")
    names = ["./0/0000.png", "x/../1/0001.png", f"{tmp_path}/data/0/0002.png", "1\\0003.png", "link/0/0004.png"]
    outside = [f"{tmp_path}/other/0/0002.png", "../other/1/0003.png", "\0.png", "\ud800.png", "x" * 300]
    lines = [json.dumps(dict(file_name=name, text="fox")) + "\n" for name in (*names, *outside)]
    (tmp_path / "data/captions.jsonl").write_text("".join(lines))

    def source() -> PictureSource:
        with pytest.warns(
            UserWarning,
            match=r"3 of 10 rows .* not there .*; 2 of .*outside.*13 of 18 pictures have no",
        ):
            return make_source(ConfigDict(dict(kind="folder", path=f"{tmp_path}/data", verify=False)))

    assert [source().name(index) for index in range(4)] == [formats.name(index) for index in range(4)]
    for index, reason in enumerate(
        ["outside of the folder"] * 2 + ["no file can have that name"] * 2 + ["no such file"]
    ):
        with pytest.raises(BadExample, match=reason) as error:
            source()[5 + index]
        assert str(error.value).isprintable()
    prints = [source().fingerprint]
    for path in ("data/0/0000.png", "data/1/0001.png", "data/0/0002.png", "data/1/0003.png", "other/0/0004.png"):
        (tmp_path / path).write_bytes(b"now of another size")
        prints.append(source().fingerprint)
    assert len(set(prints)) == 6


def test_bad_captions_are_left_to_the_loader(tmp_path, monkeypatch):
    formats.write_txt(tmp_path)
    (tmp_path / "0/0002.txt").write_bytes(b"f\xfcchse")
    (tmp_path / "0/0004.txt").unlink()
    config = ConfigDict(dict(kind="folder", path=str(tmp_path)))
    with pytest.raises(InputError, match=r"0002.png: 0/0002.txt is not UTF-8; .*data.bad=skip"):
        make_source(config)
    config.update(bad="skip", verify=True)
    source = make_source(config)
    before = source.fingerprint
    with pytest.raises(BadExample, match="not UTF-8"):
        source[1]
    (tmp_path / "0/0002.txt").write_text("fox")
    assert make_source(config).fingerprint != before

    assert isinstance(source, CaptionedFolder)

    def deny(path: str, **options: object) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(source.fs, "cat_file", deny)
    with pytest.raises(BadExample, match=r"0000.txt is not readable \(PermissionError\)"):
        source[0]
    source.items[0] = ("0/0000.png", "fox")
    with pytest.raises(BadExample, match=r"0000.png: not readable \(PermissionError\)"):
        source[0]


def test_captions_that_are_ambiguous_or_malformed(tmp_path):
    def refuse(message: str, **fields: object) -> None:
        with pytest.raises(InputError, match=message):
            make_source(ConfigDict(dict(kind="folder", path=str(tmp_path), **fields)))

    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        make_source(ConfigDict(dict(kind="folder", path=str(tmp_path / "nowhere"))))
    refuse("no captions.jsonl, no captions.csv and no .txt")
    formats.write_txt(tmp_path)
    formats.write_jsonl(tmp_path)
    refuse("captions twice, in captions.jsonl and in .txt files; .*data.captions")
    assert len(make_source(ConfigDict(dict(kind="folder", path=str(tmp_path), captions="txt")))) == formats.COUNT
    formats.write_csv(tmp_path)
    refuse("captions twice, in captions.jsonl and in captions.csv")
    refuse("choose jsonl, csv, txt", captions="yaml")
    (tmp_path / "captions.csv").write_text("picture,text\n1.png,fox\n")
    refuse("captions.csv: expected columns file_name and text, there are: picture, text", captions="csv")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "0/0000.png", "text": "fox"}\n\n{"file_name": "x.png"}\n')
    refuse("captions.jsonl, line 3: expected file_name and text", captions="jsonl")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "0/0000.png", "text": ["fox"]}\n')
    refuse(r"captions.jsonl, line 1: expected file_name and text, .*\['fox'\]", captions="jsonl")
    (tmp_path / "captions.csv").write_text(f"file_name,text\n1.png,fox\n2.png,{'x' * 200_000}\n")
    refuse("captions.csv, line 3: field larger", captions="csv")


def test_the_check_at_the_start_may_be_left_out(tmp_path):
    formats.write_txt(tmp_path)
    bad = tmp_path / formats.name(2)
    bad.write_bytes(formats.encoded(2)[:60])
    (tmp_path / formats.name(4)).with_suffix(".txt").write_text(" \n")
    (tmp_path / formats.name(6)).with_suffix(".txt").unlink()
    config = ConfigDict(dict(kind="folder", path=str(tmp_path), verify=True, skip_unreadable=False))
    with pytest.raises(InputError, match=r"0002.png: not a readable picture.*data.skip_unreadable"):
        make_source(config)
    config.skip_unreadable = True
    with pytest.warns(UserWarning, match=r"left out 3 unreadable pictures \(0/0002.png, 0/0004.png, 0/0006.png\)"):
        assert len(make_source(config)) == formats.COUNT - 3
    config.verify = False
    source = make_source(config)
    assert len(source) == formats.COUNT
    found = {}
    for index in range(len(source)):
        try:
            source[index]
        except BadExample as error:
            copy = pickle.loads(pickle.dumps(error))  # as it comes out of a worker process
            found[copy.name] = copy.reason
    assert set(found) == {formats.name(2), formats.name(4), formats.name(6)}
    assert "not a readable picture" in found[formats.name(2)] and found[formats.name(6)] == "no caption"


def test_tars_that_are_no_good(tmp_path):
    path = tmp_path / "a.tar"
    formats.write_tar(path)
    whole = path.read_bytes()
    end = whole.rindex(b"ustar")  # within the last member's header
    for length in (100, 700, len(whole) // 2, end - 257, end + 20):  # also right between two members
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a.tar: truncated"):
            TarSource(str(path))
    damaged = bytearray(whole)
    damaged[end - 257 : end + 200] = b"x" * 457
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match=r"a.tar: truncated"):
        TarSource(str(path))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match=r"b.tar.gz: .*unpack .tar.gz"):
        TarSource(str(tmp_path / "b.tar.gz"))
    with pytest.raises(InputError, match=r"nowhere/\*.tar: no such file"):
        TarSource(f"{tmp_path}/nowhere/*.tar")


def test_a_sparse_tar_of_damaged_numbers_is_said_in_words(tmp_path):
    info, buffer = tarfile.TarInfo("0.png"), io.BytesIO()
    info.pax_headers = {"GNU.sparse.map": "0,x\0", "GNU.sparse.size": "1"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"a.tar: .*\(it has something else where a number belongs\)"):
        TarSource(str(tmp_path / "a.tar"))


def test_a_tar_index_is_made_when_asked_for_and_used_while_it_fits(tmp_path):
    path = tmp_path / "a.tar"
    formats.write_tar(path)
    plain = TarSource(str(path))
    assert not list(tmp_path.glob("*.json*"))
    first = TarSource(str(path), index=True)
    index = tmp_path / "a.tar.index.json"
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a.tar", index.name]
    assert first.fingerprint == plain.fingerprint == TarSource(str(path), index=True).fingerprint
    entry = json.loads(index.read_text())
    index.write_text(json.dumps(entry | dict(members=entry["members"][:3])))
    assert len(TarSource(str(path), index=True)) == 1  # it was read
    index.write_text(index.read_text()[:30])
    assert len(TarSource(str(path), index=True)) == formats.COUNT  # half of one was made anew
    formats.write_tar(path, range(3))
    assert len(TarSource(str(path), index=True)) == 3
    size, before = path.stat().st_size, TarSource(str(path), index=True).fingerprint
    formats.write_tar(path, range(3, 6))
    os.truncate(path, size)  # tars end in zeros; a tar of the same size
    os.utime(path, ns=(0, 1))
    assert TarSource(str(path), index=True)[0]["caption"] == formats.CAPTIONS[3]
    assert TarSource(str(path), index=True).fingerprint != before


def pax_tar(path: Path, size: int | None = None, records: dict[str, str] | None = None) -> None:
    """A tar of one example whose picture's header has pax records; its size field says ``size``."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("0.png", formats.encoded(0)), ("0.txt", b"fox")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.pax_headers = (records or {}) if name == "0.png" else {}
            tar.addfile(member, io.BytesIO(data))
    if size is not None:
        changed = bytearray(path.read_bytes())
        header = tarfile.TarInfo("0.png")
        header.size = size
        changed[:512] = header.tobuf(tarfile.GNU_FORMAT)
        path.write_bytes(changed)


@pytest.mark.parametrize("time", ["inf", "-inf", "nan", "1e300", "x"])
def test_times_in_a_tar_are_no_matter(time, tmp_path):
    pax_tar(tmp_path / "a.tar", records=dict(mtime=time))
    for _ in range(2):
        source = TarSource(str(tmp_path / "a.tar"), index=True)
        assert source[0]["caption"] == "fox" and len(source.fingerprint) == 64


@pytest.mark.parametrize(
    "size", [-1, -512, -1024, -(2**62), 2**31, 2**33, 2**40, 2**62, "x" * 4_000_000, "pax sizes", "chain", "sparse"]
)
def test_headers_of_a_tar_have_bounds(size, tmp_path):
    path = tmp_path / "a.tar"
    if isinstance(size, int):
        pax_tar(path, size)
    elif size == "pax sizes":
        pax_tar(path, records=dict(size=str(2**62)))
    elif size == "chain":  # headers before headers before headers
        pax_tar(path)
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 512
        record = b"13 comment=x\n".ljust(512, b"\0")
        path.write_bytes((header.tobuf(tarfile.USTAR_FORMAT) + record) * 5000 + path.read_bytes())
    elif size == "sparse":
        pax_tar(path, records={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.png"})
    else:
        pax_tar(path, records=dict(comment=size))
    with pytest.raises(InputError, match=r"a.tar: truncated, compressed or not a tar") as error:
        TarSource(str(path))
    assert str(error.value).isprintable()


def test_links_in_a_tar_are_their_files_and_others_are_said(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("a\x1b[31m\nerror: forged/0.png", formats.encoded(0)),
            ("0.png", formats.encoded(0)),
            ("0.txt", b"fox"),
            ("1.txt", b"owl \xed\xa0\x80"),
            ("2.heic", b"x"),
            ("2.txt", b"elk"),
            ("__MACOSX/0.png", b"x"),
            ("../3.png", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in (
            ("1.png", tarfile.LNKTYPE, "0.png"),
            ("4.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("5.png", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    with pytest.warns(UserWarning, match=r"1 captioned members are no pictures by their names: a.tar/2.heic"):
        source = TarSource(str(tmp_path / "a.tar"))
    names = [source.name(index) for index in range(len(source))]
    assert names[1:] == ["a.tar/0", "a.tar/1", "a.tar/../3"]
    np.testing.assert_array_equal(source[1]["image"], formats.picture(0))
    with pytest.raises(BadExample, match="no readable caption"):
        source[2]
    with pytest.raises(BadExample) as error:
        source[0]
    assert str(error.value).startswith("a.tar/a\\x1b[31m error: forged/0: no caption")


@pytest.mark.parametrize(
    "entry",
    [["0.png", 10**30, 5, 0], ["0.png", 512, -5, 0], ["0.png", 512, 5, {}], ["0.png", True, 5, 0], [1, 2, 3], None, 7],
)
def test_an_index_of_other_values_is_made_anew(entry, tmp_path):
    pax_tar(tmp_path / "a.tar")
    TarSource(str(tmp_path / "a.tar"), index=True)
    index = tmp_path / "a.tar.index.json"
    whole = json.loads(index.read_text())
    for members in ([entry], entry):
        index.write_text(json.dumps(whole | dict(members=members)))
        assert TarSource(str(tmp_path / "a.tar"), index=True)[0]["caption"] == "fox"
        assert json.loads(index.read_text()) == whole


def test_captions_in_a_tar_that_are_no_text(tmp_path):
    formats.write_tar(tmp_path / "a.tar", range(1), caption="json")
    with pytest.raises(BadExample, match=r"a.tar/0000: the caption is no text \(3\)"):
        TarSource(str(tmp_path / "a.tar"), caption="width")[0]


def test_parquet_that_is_no_good(tmp_path):
    path = tmp_path / "a.parquet"
    formats.write_parquet(path)

    def refuse(message: str, **fields: object) -> None:
        with pytest.raises(InputError, match=message):
            make_source(ConfigDict(dict(kind="parquet", paths=str(path), **fields)))

    refuse("a.parquet: no column 'caption'; there are: id, image, text", text="caption")
    refuse("no column 'jpg'; there are: id, image, text", image="jpg")
    refuse("column 'id' is int64, not bytes; there are", image="id")
    refuse("column 'image' is struct.*, not text", text="image")
    path.write_bytes(path.read_bytes()[:-30])
    refuse("a.parquet: truncated or not parquet")


def test_a_dictionary_of_one_picture_is_no_million_of_them(tmp_path):
    count, picture = 2000, formats.encoded(0) + bytes(400_000)  # 800 MB
    pictures = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([picture], pa.binary()))
    pq.write_table(pa.table(dict(image=pictures, text=["fox"] * count)), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    source = make_source(ConfigDict(dict(kind="parquet", paths=f"{tmp_path}/a.parquet")))
    with pytest.raises(InputError, match=r"a.parquet: row group 0 .* unpacks to more than .* fewer rows in a group"):
        source[0]


def test_parquet_with_damaged_pages_or_text(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = np.array([0, 3, 9], np.int32)
    text = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"foxf\xfcchse"))
    pq.write_table(pa.table(dict(image=[formats.encoded(0)] * 2, text=text)), path)
    source = make_source(ConfigDict(dict(kind="parquet", paths=str(path))))
    assert source[0]["caption"] == "fox"
    with pytest.raises(BadExample, match=r"a.parquet, row 1: the caption is not UTF-8"):
        source[1]
    formats.write_parquet(path)
    source = make_source(ConfigDict(dict(kind="parquet", paths=str(path))))
    damaged = bytearray(path.read_bytes())
    damaged[4:200] = b"\xff" * 196
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"a.parquet: row group 0 is not readable .*fetch the file again") as error:
        source[1]
    assert "\n" not in str(error.value)
    assert source[2]["caption"] == formats.CAPTIONS[2]


def test_unknown_kinds_and_fields_are_refused():
    with pytest.raises(InputError, match=r"data.kind='zip': choose emoji, folder, tfds, tar, parquet"):
        make_source(ConfigDict(dict(kind="zip")))
    with pytest.raises(InputError, match=r"data \(kind folder\): .*'seed'"):
        make_source(ConfigDict(dict(kind="folder", path="x", seed=0)))
    with pytest.raises(InputError, match=r"data \(kind tar\): .*'paths'"):
        make_source(ConfigDict(dict(kind="tar")))


def test_prepared_data_sets_that_are_not_there(root):
    def refuse(message: str, **fields: object) -> None:
        with pytest.raises(InputError, match=message):
            make_source(ConfigDict(dict(kind="tfds", **fields)))

    place = f"{root}/prepared"
    refuse("prepared/nothing: no prepared data set", name="nothing", data_dir=place)
    refuse("no prepared data set", data_dir=place)
    refuse("no feature 'text', there are: .*caption", name="journeydb", data_dir=place, caption="text")
    refuse("no split 'test'; there are: train", name="journeydb", data_dir=place, split="test")
    half = make_source(ConfigDict(dict(kind="tfds", name="journeydb", data_dir=place, split="train[:4]")))
    assert len(half) == 4
    assert half.fingerprint != source_of(root, "journeydb").fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("features.json", b'{"pythonClassName": "this.Evil"}', "a feature of the class 'this.Evil'"),
        ("features.json", b'{"python\\u0043lassName": "this.Evil"}', "a feature of the class 'this.Evil'"),
        ("features.json", b'{"featuresDict": {"features": {"a": {"type": "x"}}}}', "a feature of the class 'x'"),
        ("features.json", b"[" * 100_000, "features.json: damaged"),
        ("features.json", b"\xff", "features.json: damaged"),
        ("features.json", b"{}", "damaged"),
        ("dataset_info.json", b"{", "damaged"),
        ("dataset_info.json", b"\xff", "damaged"),
        ("dataset_info.json", b"", "damaged|no prepared"),
        ("journeydb-train.array_record-00000-of-00001", b"x" * 500, "not readable|damaged|no split"),
    ],
)
def test_a_damaged_prepared_data_set_is_one_line_and_runs_nothing(root, tmp_path, name, content, message):
    shutil.copytree(root / "prepared/journeydb", tmp_path / "journeydb")
    (tmp_path / "journeydb/1.0.0" / name).write_bytes(content)
    for fields in (dict(name="journeydb"), dict(name="journeydb:1.0.0"), dict(name="")):
        place = tmp_path if fields["name"] else tmp_path / "journeydb/1.0.0"
        with pytest.raises(InputError, match=message) as error:
            make_source(ConfigDict(dict(kind="tfds", data_dir=str(place), **fields)))
        assert str(error.value).isprintable()


def test_preparing_leaves_out_what_is_bad_and_says_so(root, tmp_path, capsys):
    shutil.copytree(root / "journeydb", tmp_path / "from")
    (tmp_path / "from/data/train/imgs/001/3.png").write_bytes(b"no picture")
    annotations = tmp_path / "from/data/train/train_anno_realease_repath.jsonl"
    annotations.write_text(annotations.read_text().replace('"A sentence about bread."', "7"))
    arguments = ["--builder", "journeydb", "--from", str(tmp_path / "from"), "--out", str(tmp_path / "out")]
    assert run(prepare.main, [*arguments, "--text", "caption"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/out/journeydb/1.0.0: 6 train" in said
    assert (
        "left out 3 of 9" in said
        and "001/5.png (the caption is no text (7))" in said
        and "000/0.png (no caption)" in said
    )
    assert "001/3.png (not a readable picture" in said
    source = make_source(ConfigDict(dict(kind="tfds", name="journeydb", data_dir=str(tmp_path / "out"))))
    assert sorted(content(source)) == sorted(
        f"A sentence about {formats.WORDS[i]}." for i in range(9) if i not in (0, 3, 5)
    )
    assert "001/1.png" in {source.name(i).partition("(")[2].rstrip(")") for i in range(len(source))}
    assert run(prepare.main, arguments) == 2
    assert "1.0.0 exists; remove it" in capsys.readouterr().err


def test_preparing_names_what_it_does_not_find(tmp_path, capsys):
    for builder, message in (
        ("journeydb", "no data/train with *anno*.jsonl and imgs/"),
        ("coco", "no annotations/captions_<split>.json"),
        ("folder", "no captions.jsonl, no captions.csv and no .txt"),
    ):
        arguments = ["--builder", builder, "--from", str(tmp_path), "--out", str(tmp_path / "out")]
        assert run(prepare.main, arguments) == 2
        assert message in capsys.readouterr().err
    arguments = ["--builder", "coco", "--from", str(tmp_path), "--out", str(tmp_path / "out"), "--text", "caption"]
    assert run(prepare.main, arguments) == 2
    assert "--text caption: coco_pairs knows one text only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    formats.write_txt(tmp_path / "bad")
    for picture in (tmp_path / "bad").rglob("*.png"):
        picture.write_bytes(b"no picture")
    arguments = ["--builder", "folder", "--from", str(tmp_path / "bad"), "--out", str(tmp_path / "out")]
    assert run(prepare.main, arguments) == 2
    assert "a split has no readable picture with a caption" in capsys.readouterr().err


def test_pictures_are_seen_as_a_viewer_shows_them(tmp_path):
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, 3:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    image = decode((tmp_path / "clear.png").read_bytes(), "clear")
    assert (image[:, :3] == 255).all() and (image[:, 3:] == (200, 0, 0)).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(clear[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    assert decode((tmp_path / "turned.jpg").read_bytes(), "turned").shape == (6, 4, 3)
    Image.fromarray(clear[..., 0]).save(tmp_path / "gray.png")
    assert decode((tmp_path / "gray.png").read_bytes(), "gray").shape == (4, 6, 3)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_more_are_refused(ending):
    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, ending)
        return buffer.getvalue()

    gray = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(decode(encode(gray), "gray")[..., 1], gray >> 8)
    if ending == "tiff":
        for dtype in (np.float32, np.int32):
            with pytest.raises(BadExample, match="save it as 8 bits a channel"):
                decode(encode(gray.astype(dtype)), "gray")


def test_narrow_pictures_are_bad_examples():
    def encode(height: int, width: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "png")
        return buffer.getvalue()

    assert decode(encode(2, 40), "wide").shape == (2, 40, 3)
    for size in ((2, 41), (41, 2)):
        with pytest.raises(BadExample, match=r"narrow: .* pixels, narrower than 20:1"):
            decode(encode(*size), "narrow")


def test_no_source_needs_tensorflow(root):
    code = f"""
import sys
from ml_collections import ConfigDict
from afa_jax import prepare
from afa_jax.data import builders, loader
from afa_jax.data.sources import make_source
make_source(ConfigDict(dict(kind="tfds", name="journeydb", data_dir="{root}/prepared")))[0]
make_source(ConfigDict(dict(kind="tar", paths="{root}/tar/*.tar")))[0]
make_source(ConfigDict(dict(kind="parquet", paths="{root}/parquet/*.parquet")))[0]
make_source(ConfigDict(dict(kind="folder", path="{root}/csv")))[0]
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
