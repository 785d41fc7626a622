"""The same captioned pictures in every format that afa_jax reads."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COUNT = 9
WORDS = ("fox", "owl", "crab", "snail", "pizza", "bread", "anchor", "guitar", "key")
CAPTIONS = [f"{word}, noto style" for word in WORDS]  # of the emoji tokenizer's vocabulary


def picture(index: int) -> np.ndarray:
    """uint8 [h, w, 3], upright ones and flat ones."""
    random = np.random.default_rng(index)
    return random.integers(0, 256, (20 + 3 * index, 44 - 2 * index, 3), np.uint8)


def encoded(index: int) -> bytes:
    """As PNG: no loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture(index)).save(buffer, "png")
    return buffer.getvalue()


def write_pictures(folder: Path) -> None:
    for index in range(COUNT):
        path = folder / name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))


def name(index: int) -> str:
    """In two folders."""
    return f"{index % 2}/{index:04d}.png"


def write_jsonl(folder: Path) -> None:
    write_pictures(folder)
    lines = [json.dumps(dict(file_name=name(index), text=CAPTIONS[index])) + "\n" for index in range(COUNT)]
    (folder / "captions.jsonl").write_text("".join(lines))


def write_csv(folder: Path) -> None:
    write_pictures(folder)
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "file_name"])
        rows.writerows([CAPTIONS[index], name(index)] for index in range(COUNT))


def write_txt(folder: Path) -> None:
    write_pictures(folder)
    for index in range(COUNT):
        (folder / name(index)).with_suffix(".txt").write_text(CAPTIONS[index] + "\n")


def write_tar(path: Path, indices: range = range(COUNT), caption: str = "txt", broken: int = -1) -> None:
    """Members as webdataset names them; picture ``broken`` is damaged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in indices:
            text = CAPTIONS[index] if caption == "txt" else json.dumps(dict(caption=CAPTIONS[index], width=3))
            data = encoded(index)[:50] if index == broken else encoded(index)
            for ending, content in (("png", data), (caption, text.encode()), ("cls", b"7")):
                member = tarfile.TarInfo(f"{index:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, indices: range = range(COUNT), struct: bool = True) -> None:
    """Row groups of two; the picture as the hub has it, or as plain bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [dict(bytes=encoded(i), path=f"{i}.png") if struct else encoded(i) for i in indices]
    table = pa.table(dict(id=list(indices), image=pictures, text=[CAPTIONS[i] for i in indices]))
    pq.write_table(table, path, row_group_size=2)


def write_journeydb(folder: Path) -> None:
    """Two archives unpacked; the annotations know a third."""
    train = folder / "data" / "train"
    lines = []
    for index in range(COUNT):
        path = train / "imgs" / f"{index % 2:03d}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))
        task = {"Task2": {"Caption": f"A sentence about {WORDS[index]}."}} if index else {}
        lines.append(dict(img_path=f"./{index % 2:03d}/{index}.png", prompt=CAPTIONS[index], Task1={}, **task))
    lines.append(dict(img_path="./002/77.png", prompt="not unpacked"))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (train / "train_anno_realease_repath.jsonl").write_text(text)
    (train / "train_anno.jsonl").write_text(json.dumps(dict(img_path="elsewhere/./imgs/1.png", prompt="old")) + "\n")


def write_coco(folder: Path) -> None:
    pictures, annotations = [], []
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for index in reversed(range(COUNT)):
        pictures.append(dict(id=index, file_name=f"{index:012d}.png"))
        (folder / "val2017" / f"{index:012d}.png").write_bytes(encoded(index))
        annotations.append(dict(id=100 + index, image_id=index, caption="a later caption"))
        annotations.append(dict(id=index, image_id=index, caption=CAPTIONS[index] + "\n"))
    whole = dict(info={}, images=pictures, annotations=annotations)
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(whole))
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(whole))  # no pictures of it here
