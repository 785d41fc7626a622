"""Prompts of a comparison: every kind of list, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from afa_jax.cli.commands import load_config
from afa_jax.errors import InputError
from afa_jax.evaluation.comparison.prompts import Item, load_items

CONFIGS = Path(__file__).parents[2] / "configs"


def load(**fields):
    return load_items(ConfigDict(fields))


def test_emoji_prompts_come_in_groups_and_say_what_must_be_seen():
    items = load(kind="emoji", seed=3, groups={"two topics": 6, "unseen combinations": 4})
    assert [item.group for item in items] == ["two topics"] * 6 + ["unseen combinations"] * 4
    for item in items:
        assert item.asked is not None and item.asked.left in item.prompt and item.asked.right in item.prompt
    assert items == load(kind="emoji", seed=3, groups={"two topics": 6, "unseen combinations": 4})
    assert items != load(kind="emoji", seed=4, groups={"two topics": 6, "unseen combinations": 4})


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a red car\n\n a blue dog \na red car\n")
    with pytest.warns(UserWarning, match="1 that are there twice are left out"):
        assert [item.prompt for item in load(kind="file", path=str(tmp_path / "a.txt"))] == ["a red car", "a blue dog"]
    # DrawBench's own columns.
    (tmp_path / "b.csv").write_text('Prompts,Category\n"One car, on a street.",Counting\nA red car.,Colors\n')
    found = [(item.prompt, item.group) for item in load(kind="file", path=str(tmp_path / "b.csv"))]
    assert found == [("One car, on a street.", "Counting"), ("A red car.", "Colors")]
    (tmp_path / "c.jsonl").write_text('{"caption": "a", "reference": "x.png"}\n{"prompt": "b"}\n')
    first, second = load(kind="file", path=str(tmp_path / "c.jsonl"))
    assert first == Item(prompt="a", reference=tmp_path / "x.png") and second == Item(prompt="b")


def test_cells_may_hold_line_breaks_and_prompts_unusual_spaces(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,category\n"a sign:\nSTOP",x\na\u2028b,y\n', newline="")
    assert [(item.prompt, item.group) for item in load(kind="file", path=str(tmp_path / "a.csv"))] == [
        ("a sign:\nSTOP", "x"),
        ("a\u2028b", "y"),
    ]


def test_of_prompts_that_are_alike_the_first_keeps_its_group(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,category\na,x\nb,y\na,y\n")
    with pytest.warns(UserWarning, match="1 that are there twice"):
        items = load(kind="file", path=str(tmp_path / "a.csv"))
    assert [(item.prompt, item.group) for item in items] == [("a", "x"), ("b", "y")]


def test_the_shipped_comparison_asks_for_200_prompts_that_differ():
    items = load_items(load_config(str(CONFIGS / "emoji.py")).evaluation.prompts)
    assert Counter(item.group for item in items) == {"two topics": 104, "unseen pairs": 48, "unseen combinations": 48}


def test_coco_takes_the_first_caption_of_each_picture(tmp_path):
    data = dict(
        images=[dict(id=2, file_name="2.jpg"), dict(id=1, file_name="1.jpg")],
        annotations=[
            dict(id=9, image_id=1, caption="later"),
            dict(id=3, image_id=1, caption="first "),
            dict(id=4, image_id=2, caption="two"),
        ],
    )
    (tmp_path / "captions.json").write_text(json.dumps(data))
    items = load(kind="coco", annotations=str(tmp_path / "captions.json"), pictures=str(tmp_path))
    assert [(item.prompt, item.reference) for item in items] == [
        ("first", tmp_path / "1.jpg"),
        ("two", tmp_path / "2.jpg"),
    ]


def test_a_count_chooses_by_a_hash_and_keeps_the_order(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"prompt {i}" for i in range(50)))
    some = load(kind="file", path=str(tmp_path / "a.txt"), count=10, seed=1)
    assert len(some) == 10 and some == sorted(some, key=lambda item: int(item.prompt.split()[1]))
    more = load(kind="file", path=str(tmp_path / "a.txt"), count=20, seed=1)
    assert set(some) <= set(more)
    assert some != load(kind="file", path=str(tmp_path / "a.txt"), count=10, seed=2)


def test_a_pictures_number_depends_on_prompt_and_seed_alone():
    numbers = {Item(prompt=p, group=g).number(s) for p in ("a", "b") for g in ("x", "y") for s in range(3)}
    assert len(numbers) == 6 and all(0 <= number < 2**31 for number in numbers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="emoj"), "kind='emoj'; choose emoji, file, coco"),
        (dict(kind="emoji", groups={"three topics": 3}), "no group 'three topics'; there are two topics"),
        (dict(kind="emoji", groups={"two topics": 0}), "there are none"),
        (dict(kind="file"), "path"),
        (dict(kind="file", path="nowhere.txt"), "nowhere.txt: no such file"),
        (dict(kind="coco", annotations="nowhere.json", pictures="."), "nowhere.json: no such file"),
        (dict(kind="emoji", groups={"unseen pairs": 9999}), "9999 prompts of 'mixed'"),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        load(**fields)


def test_a_table_without_prompts_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("words,other\na,b\n")
    with pytest.raises(InputError, match=r"a\.csv: expected columns prompt or .*there are: words, other"):
        load(kind="file", path=str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "a.jsonl, line 2: no JSON object"),
        ("b.jsonl", b"[1, 2]\n", "b.jsonl, line 1: no JSON object"),
        ("c.txt", b"caf\xe9\n", "c.txt, line 1: not UTF-8"),
        ("d.csv", b"prompt,category\na,x\n,y\n", "d.csv, line 3: no prompt"),
        ("e.csv", b"prompt,category\nfox, red,x\n", "e.csv, line 2: 3 cells in 2 columns"),
        ("f.csv", b'prompt,category\n"fox,x\nowl,y\n', "f.csv, line 2: a double quote opens"),
        ("g.jsonl", b"[" * 100_000, "g.jsonl, line 1: no JSON object"),
    ],
)
def test_a_broken_list_is_one_line_that_names_it(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        load(kind="file", path=str(tmp_path / name))


def test_broken_captions_of_coco_are_named(tmp_path):
    (tmp_path / "captions.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"captions\.json: Expecting value"):
        load(kind="coco", annotations=str(tmp_path / "captions.json"), pictures=str(tmp_path))
