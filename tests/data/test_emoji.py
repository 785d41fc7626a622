"""The emoji data set: its pictures, scenes, captions, tokenizer and builder."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afa_jax.data.emoji import rebuild, tokenizer
from afa_jax.data.emoji.builder import DATA_DIR, SIZE, renderer
from afa_jax.data.emoji.scenes import (
    HELD_OUT_COMBINATION,
    PLACE,
    SIZES,
    Box,
    Scene,
    SceneSource,
    compose,
    evaluation_prompts,
    held_out_pairs,
    load_pictures,
)
from afa_jax.data.emoji.vocabulary import HERE, Style, Subject, Vocabulary, read_vocabulary

TOPICS = ("animals", "food", "things")
STYLES = ("noto", "twemoji", "fluent", "blob")
GOLDEN_CAPTIONS = ["squid and owl, blob style", "carrot and helicopter, noto style", "whisky, blob style"]


def test_vocabulary_has_sixty_plain_names_a_topic():
    vocabulary = read_vocabulary()
    assert vocabulary.topics == TOPICS
    assert Counter(subject.topic for subject in vocabulary.subjects) == dict.fromkeys(TOPICS, 60)
    assert tuple(style.name for style in vocabulary.styles) == STYLES
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", subject.name) for subject in vocabulary.subjects)
    assert len({subject.codepoint for subject in vocabulary.subjects}) == 180


def test_vocabulary_refuses_a_name_given_twice(tmp_path):
    fox = {"name": "fox", "codepoint": "1f98a"}
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"topics": {"a": [fox], "b": [fox]}, "styles": {}}))
    with pytest.raises(ValueError, match="'fox'"):
        read_vocabulary(path)


def test_each_subject_has_a_picture_of_its_own_in_each_style():
    pictures = load_pictures()
    assert pictures.images.shape == (180, 4, SIZE, SIZE, 3)
    assert pictures.images.dtype == np.uint8
    assert (len(pictures.names), len(pictures.topics), pictures.styles) == (180, 180, STYLES)
    ink = (pictures.images < 245).any(axis=-1).mean(axis=(-2, -1))
    assert ink.min() > 0.05  # none is blank
    assert len({picture.tobytes() for picture in pictures.images.reshape(720, -1)}) == 720
    with pytest.raises(ValueError, match="read-only"):
        pictures.images[0] = 0


def test_reading_needs_no_tensorflow():
    code = """
import sys
from afa_jax.data.emoji.scenes import SceneSource
assert SceneSource(seed=0)[0]["image"].shape == (32, 64, 3)
assert "tensorflow" not in sys.modules and "torch" not in sys.modules and "resvg_py" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scene_depends_on_seed_and_index_only():
    one, two = SceneSource(seed=3), SceneSource(seed=3)
    later = [two[index] for index in (70, 7)][1]
    assert one[7]["caption"] == later["caption"]
    np.testing.assert_array_equal(one[7]["image"], later["image"])
    assert [one.scene(index) for index in range(20)] != [SceneSource(seed=4).scene(index) for index in range(20)]
    assert repr(one) == repr(two)  # grain compares it when it resumes


def test_scene_of_a_seed_stays_the_same_for_good():
    assert [SceneSource(seed=0).scene(index).caption for index in (0, 1, 2**20 - 1)] == GOLDEN_CAPTIONS


def test_caption_names_what_lies_in_each_place():
    source = SceneSource(seed=1)
    empty = 0
    for index in range(200):
        item = source[index]
        assert item["image"].shape == (PLACE, 2 * PLACE, 3)
        assert item["image"].dtype == np.uint8
        subjects = [name for name in (item["left"], item["right"]) if name]
        assert item["caption"] == f"{' and '.join(subjects)}, {item['style']} style"
        for place, name in enumerate((item["left"], item["right"])):
            drawn = item["image"][:, place * PLACE : (place + 1) * PLACE]
            assert (drawn.min() < 245) == bool(name)
            assert bool(item["topics"][place]) == bool(name)
            empty += not name
    assert 40 <= empty <= 80  # of 200 scenes, 30 % have one subject


def test_compose_puts_a_picture_where_its_box_is():
    alone = compose(Scene(left="fox", right="", style="noto"))
    moved = compose(Scene(left="", right="fox", style="noto"))
    np.testing.assert_array_equal(alone[:, :PLACE], moved[:, PLACE:])
    small = compose(Scene(left="", right="fox", style="noto", boxes=(Box(), Box(26, 6, 2))))
    assert (small[:2] == 255).all()
    assert (small[28:] == 255).all()
    assert (small[:, : PLACE + 6] == 255).all()
    with pytest.raises(KeyError, match="zebra"):
        compose(Scene(left="zebra", right="", style="noto"))


def test_boxes_use_every_size_and_stay_inside():
    boxes = {box for scene in scenes(1000) for box in scene.boxes}
    assert {box.size for box in boxes} == set(SIZES)
    assert all(min(box.x, box.y) >= 0 and max(box.x, box.y) + box.size <= PLACE for box in boxes)


def scenes(count: int, seed: int = 5, **options: Any) -> list[Scene]:
    source = SceneSource(seed=seed, **options)
    return [source.scene(index) for index in range(count)]


def pairs_held_out(scene: Scene) -> int:
    return sum((name, scene.style) in held_out_pairs() for name in (scene.left, scene.right))


def test_held_out_pairs_are_a_twentieth_and_leave_each_subject_styles_to_learn():
    assert len(held_out_pairs()) == 36
    assert Counter(style for _, style in held_out_pairs()) == dict.fromkeys(STYLES, 9)
    assert max(Counter(name for name, _ in held_out_pairs()).values()) <= 2


def test_training_sees_nothing_held_out_and_all_else():
    topic_of = {subject.name: subject.topic for subject in read_vocabulary().subjects}
    seen = Counter((scene.left, scene.right, scene.style) for scene in scenes(20_000))
    drawn = {(name, style) for left, right, style in seen for name in (left, right) if name}
    assert drawn == set(itertools.product(topic_of, STYLES)) - held_out_pairs()
    topics = {(topic_of[left], topic_of[right]) for left, right, _ in seen if left and right}
    assert topics == set(itertools.product(TOPICS, TOPICS)) - {HELD_OUT_COMBINATION}
    assert not any(left == right for left, right, _ in seen)


def test_held_out_scenes_have_one_held_out_thing():
    for scene in scenes(2000, split="held_out", held_out="pairs"):
        assert pairs_held_out(scene) == 1
        assert scene.topics != HELD_OUT_COMBINATION
    for scene in scenes(2000, split="held_out", held_out="combinations"):
        assert pairs_held_out(scene) == 0
        assert scene.topics == HELD_OUT_COMBINATION


def test_options_restrict_topics_styles_and_mixing():
    for scene in scenes(500, topics=("animals",), styles=("blob",), single=0.0):
        assert scene.topics == ("animals", "animals")
        assert scene.style == "blob"
    assert all(left == right for left, right in (scene.topics for scene in scenes(500, mixed=False, single=0.0)))
    assert all(not (scene.left and scene.right) for scene in scenes(500, single=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topics": ("plants",)}, "'plants'.*animals, food, things"),
        ({"styles": ()}, "style.*noto"),
        ({"split": "test"}, "train.*held_out"),
        ({"held_out": "subjects"}, "pairs.*combinations"),
        ({"single": 1.5}, "single"),
        ({"topics": ("food",), "split": "held_out", "held_out": "combinations"}, "both topics"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        SceneSource(seed=0, **options)


def test_index_outside_is_refused():
    source = SceneSource(seed=0, length=3)
    assert [source[index]["caption"] for index in range(len(source))] == [scene.caption for scene in scenes(3, seed=0)]
    with pytest.raises(IndexError, match="3 of 3"):
        source[3]


@pytest.mark.parametrize("kind", [*TOPICS, "mixed"])
def test_evaluation_prompts_are_fixed_different_and_even(kind):
    prompts = evaluation_prompts(kind, 100, seed=1)
    assert prompts == evaluation_prompts(kind, 100, seed=1) != evaluation_prompts(kind, 100, seed=2)
    assert len(set(prompts)) == 100
    assert Counter(prompt.style for prompt in prompts) == dict.fromkeys(STYLES, 25)
    for caption, left, right, style in prompts:
        scene = Scene(left=left, right=right, style=style)
        assert caption == scene.caption
        assert (scene.topics[0] != scene.topics[1]) if kind == "mixed" else scene.topics == (kind, kind)
        assert not pairs_held_out(scene)
        assert scene.topics != HELD_OUT_COMBINATION


def test_evaluation_prompts_of_the_held_out_split():
    for prompt in evaluation_prompts("mixed", 10, split="held_out", held_out="combinations"):
        assert Scene(left=prompt.left, right=prompt.right, style=prompt.style).topics == HELD_OUT_COMBINATION
    with pytest.raises(ValueError, match="animals, food, things, mixed"):
        evaluation_prompts("plants", 1)
    with pytest.raises(ValueError, match="only 342"):
        evaluation_prompts("food", 1400, split="held_out")


# The tokenizer


@pytest.fixture(scope="module")
def clip_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tokenizer.TOKENIZER_DIR)


def reference_ids(text: str) -> list[int]:
    """Byte-pair encoding as in OpenAI's CLIP, for text in ASCII: the pair that was merged first goes first."""
    ids = json.loads((tokenizer.TOKENIZER_DIR / "vocab.json").read_text())
    lines = (tokenizer.TOKENIZER_DIR / "merges.txt").read_text().splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    tokens = ["<|startoftext|>"]
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        parts = [*word[:-1], word[-1] + "</w>"]
        while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            first = min(known, key=lambda pair: ranks[pair])
            merged = []
            while parts:
                size = 2 if tuple(parts[:2]) == first else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged
        tokens += parts
    return [ids.get(token, ids["<|endoftext|>"]) for token in [*tokens, "<|endoftext|>"]]


def test_tokenizer_files_are_those_of_the_vocabulary(tmp_path):
    tokenizer.write_tokenizer(tmp_path, tokenizer.learn_merges(tokenizer.count_words(read_vocabulary())))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_text() == (tokenizer.TOKENIZER_DIR / name).read_text()


def test_each_word_is_one_token_and_captions_come_back(clip_tokenizer):
    words = tokenizer.count_words(read_vocabulary())
    assert len(clip_tokenizer) <= 2000
    assert clip_tokenizer.model_max_length == 16
    assert all(len(ids) == 3 for ids in clip_tokenizer(list(words)).input_ids)
    names = [subject.name for subject in read_vocabulary().subjects]
    longest = sorted(names, key=lambda name: len(name.split()))[-2:]
    captions = [Scene(left=longest[0], right=longest[1], style="noto").caption]
    captions += [scene.caption for scene in scenes(2000)]
    for caption, ids in zip(captions, clip_tokenizer(captions).input_ids, strict=True):
        assert len(ids) <= 16
        assert clip_tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption


def test_ids_are_those_of_a_plain_byte_pair_encoding(clip_tokenizer):
    texts = [scene.caption for scene in scenes(300)]
    texts += ["A giraffe's 42 hats -- don't!", "", "octopusoctopus", "aaaaaaaa and bananana", "r2-d2, 1.5", "~ # /"]
    assert clip_tokenizer(texts).input_ids == [reference_ids(text) for text in texts]


def test_unknown_characters_have_the_unknown_id(clip_tokenizer):
    unknown = clip_tokenizer.unk_token_id
    assert unknown == clip_tokenizer.eos_token_id == len(clip_tokenizer) - 1
    start, *middle, end = clip_tokenizer("fox ☃").input_ids
    assert (start, end) == (clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id)
    assert middle[1:] == [unknown] * len("☃".encode())
    padded = clip_tokenizer("fox", padding="max_length", truncation=True).input_ids
    assert padded == [start, middle[0], *[end] * (tokenizer.MAX_LENGTH - 2)]


def test_tokenizer_refuses_names_beyond_its_alphabet():
    with pytest.raises(ValueError, match="piñata"):
        tokenizer.learn_merges({"piñata": 1})


# The builder


def svg(colour: str) -> dict[str, str]:
    return {"body": f'<path fill="{colour}" d="M0 0h8v16h-8z"/>'}


@pytest.fixture
def packages(tmp_path):
    """Two styles of two subjects: SVGs whose left half is coloured, and WebP files of one colour."""
    from PIL import Image

    vectors, files = tmp_path / "node_modules" / "@x" / "vectors", tmp_path / "node_modules" / "files"
    (files / "assets").mkdir(parents=True)
    vectors.mkdir(parents=True)
    (vectors / "package.json").write_text('{"version": "1.0.0"}')
    (files / "package.json").write_text('{"version": "2.0.0"}')
    icons = {"red": svg("#f00"), "blue": svg("#00f")}
    (vectors / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
    (vectors / "chars.json").write_text('{"1": "red", "2": "blue", "3": "green"}')
    Image.new("RGBA", (100, 100), (0, 255, 0, 255)).save(files / "assets" / "1.webp", lossless=True)
    Image.new("RGBA", (100, 100), (0, 0, 0, 0)).save(files / "assets" / "2-fe0f.webp", lossless=True)
    return tmp_path / "node_modules"


VECTORS = Style(name="vectors", package="@x/vectors", version="1.0.0", licence="MIT", attribution="x")
FILES = Style(name="files", package="files", version="2.0.0", licence="MIT", attribution="y")


def test_builder_writes_what_tfds_reads(packages, tmp_path):
    import tensorflow_datasets as tfds

    subjects = tuple(Subject(name=name, codepoint=code, topic="t") for name, code in (("one", "1"), ("two", "2")))
    vocabulary = Vocabulary(subjects=subjects, styles=(VECTORS, FILES))
    folder = rebuild.build(packages, tmp_path / "out", vocabulary)
    assert folder == tmp_path / "out" / "emoji_pictures" / "1.0.0"
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = list(tfds.builder_from_directory(folder).as_data_source("train", decoders=decoders))
    found = [(record["subject"], record["topic"], record["style"], record["codepoint"]) for record in records]
    assert found == [
        (b"one", b"t", b"vectors", b"1"),
        (b"one", b"t", b"files", b"1"),
        (b"two", b"t", b"vectors", b"2"),
        (b"two", b"t", b"files", b"2"),
    ]
    red, green, blue, clear = (decode(record["image"]) for record in records)
    white = (255, 255, 255)
    assert all(picture.shape == (SIZE, SIZE, 3) for picture in (red, green, blue, clear))
    assert ((red[:, :32] == (255, 0, 0)).all(), (red[:, 32:] == white).all()) == (True, True)
    assert (blue[:, :32] == (0, 0, 255)).all()
    assert (green == (0, 255, 0)).all()
    assert (clear == white).all()
    with pytest.raises(FileExistsError, match="--out"):
        rebuild.build(packages, tmp_path / "out", vocabulary)


def decode(encoded: bytes) -> np.ndarray:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    assert image.format == "WEBP"
    return np.asarray(image)


def test_builder_names_what_is_missing(packages):
    with pytest.raises(FileNotFoundError, match=r"'vectors'.*@x/vectors"):
        renderer(Path("nowhere"), VECTORS)
    (packages / "files" / "package.json").write_text('{"version": "2.0.1"}')
    with pytest.raises(ValueError, match=r"files is 2\.0\.1, .* asks for 2\.0\.0"):
        renderer(packages, FILES)
    with pytest.raises(KeyError, match="'green' for codepoint 3"):
        renderer(packages, VECTORS)("3")


def test_the_shipped_data_set_names_no_machine():
    for path in DATA_DIR.glob("*.json"):
        assert str(HERE.parents[2]) not in path.read_text()


def test_one_place_is_the_filled_half_of_the_same_scene():
    whole, cut = SceneSource(seed=4, single=1.0), SceneSource(seed=4, single=1.0, places=1)
    sides = set()
    for i in range(20):
        scene, place = whole[i], cut[i]
        assert {key: scene[key] for key in scene if key != "image"} == {k: place[k] for k in place if k != "image"}
        left = bool(scene["left"])
        sides.add(left)
        half = scene["image"][:, :PLACE] if left else scene["image"][:, PLACE:]
        np.testing.assert_array_equal(place["image"], half)
    assert sides == {True, False}
    with pytest.raises(ValueError, match="1 with single=1"):
        SceneSource(seed=4, single=0.5, places=1)
