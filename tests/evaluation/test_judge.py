"""The judge: its accuracy on real scenes, what its numbers mean, and what it refuses."""

import json

import numpy as np
import pytest

from afa_jax.data.emoji.scenes import Prompt, evaluation_prompts, load_pictures
from afa_jax.data.emoji.vocabulary import Style, Subject, read_vocabulary
from afa_jax.evaluation.emoji import train_judge
from afa_jax.evaluation.emoji.judge import (
    BATCH,
    LAYERS,
    WEIGHTS,
    Judgement,
    accuracy,
    ceiling,
    floor,
    load_judge,
    real_scenes,
    shuffled,
    split_places,
)
from afa_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors

PROMPTS = evaluation_prompts("mixed", 16)  # as many places as the judge takes at a time


def test_ceiling_is_high_and_floor_is_chance():
    judge = load_judge()
    top = ceiling(judge, PROMPTS, crops=1)
    assert top["places"] == 32
    assert top["subject"] > 0.75
    assert top["subject_top5"] > 0.85
    assert top["style"] > 0.9
    bottom = floor(judge, PROMPTS, crops=1)
    assert bottom["subject"] < 0.1  # 1/180 by chance
    assert bottom["style"] < 0.5  # 1/4
    blank = ceiling(judge, PROMPTS, crops=1, through=lambda pictures: np.full_like(pictures, 255))
    assert blank["subject"] < 0.1


def test_a_judgement_does_not_depend_on_the_pictures_beside():
    judge = load_judge()
    pictures = real_scenes([*PROMPTS, PROMPTS[0]])
    assert 2 * len(pictures) > BATCH
    every, last = judge(pictures), judge(pictures[-1:])
    assert every.subject_logits.shape == (len(pictures), 2, 180)
    assert every.style_logits.shape == (len(pictures), 2, 4)
    assert every.features.shape == (len(pictures), 2, 1280)
    np.testing.assert_allclose(every.subject_logits[-1:], last.subject_logits, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(every.features[-1:], last.features, atol=1e-5)


def test_places_are_left_then_right():
    pictures = real_scenes([Prompt("fox, noto style", "fox", "", "noto"), Prompt("", "", "fox", "noto")])
    places = split_places(pictures)
    assert places.shape == (4, 32, 32, 3)
    assert [bool((place < 245).any()) for place in places] == [True, False, False, True]


def test_real_scenes_are_drawn_anew_for_each_crop_and_alike_for_a_seed():
    one, two = real_scenes(PROMPTS[:2], crops=2), real_scenes(PROMPTS[:2], crops=2)
    np.testing.assert_array_equal(one, two)
    assert (one[:2] != one[2:]).any()
    assert (one != real_scenes(PROMPTS[:2], crops=2, seed=1)).any()


def judgement_of(subjects: list[tuple[str, str]], styles: list[str]) -> Judgement:
    """A judge who is sure."""
    vocabulary = read_vocabulary()
    names = [subject.name for subject in vocabulary.subjects]
    all_styles = [style.name for style in vocabulary.styles]
    return Judgement(
        subject_logits=np.array([[np.eye(180)[names.index(name)] for name in pair] for pair in subjects]),
        style_logits=np.array([[np.eye(4)[all_styles.index(style)]] * 2 for style in styles]),
        features=np.zeros((len(subjects), 2, 1280)),
    )


def test_accuracy_counts_places_that_have_a_subject():
    prompts = [Prompt("", "fox", "pizza", "noto"), Prompt("", "", "guitar", "blob"), Prompt("", "cat", "", "noto")]
    judgement = judgement_of([("fox", "taco"), ("fox", "guitar"), ("pizza", "cat")], ["noto", "fluent", "noto"])
    result = accuracy(judgement, prompts)
    assert result["places"] == 4
    assert result["subject"] == 2 / 4  # fox and guitar
    assert result["topic"] == 3 / 4  # a taco is food
    assert result["style"] == 3 / 4
    assert (result["animals/places"], result["food/places"], result["things/places"]) == (2, 1, 1)
    assert (result["animals/subject"], result["food/subject"], result["things/subject"]) == (0.5, 0, 1)
    assert result["food/topic"] == 1
    only_food = accuracy(judgement_of([("pizza", "fox")], ["noto"]), [Prompt("", "pizza", "taco", "noto")])
    assert {key.partition("/")[0] for key in only_food if "/" in key} == {"food"}
    # Sure of a fox, undecided within food: the first of it is not the taco.
    assert (only_food["subject_in_topic"], only_food["subject_top5"]) == (0.5, 1)


def test_accuracy_refuses_what_does_not_fit():
    judgement = judgement_of([("fox", "taco")], ["noto"])
    with pytest.raises(ValueError, match="16 prompts for 1 pictures"):
        accuracy(judgement, PROMPTS)
    with pytest.raises(ValueError, match="no prompt"):
        accuracy(judgement, [Prompt("", "", "", "noto")])
    with pytest.raises(KeyError, match="zebra"):
        accuracy(judgement, [Prompt("", "zebra", "", "noto")])


def test_shuffled_leaves_no_prompt_in_its_place():
    other = shuffled(PROMPTS)
    assert sorted(PROMPTS) == sorted(other)
    assert not any(a == b for a, b in zip(PROMPTS, other, strict=True))
    assert other == shuffled(PROMPTS) != shuffled(PROMPTS, seed=1)


def test_heads_of_another_vocabulary_are_refused(tmp_path):
    tensors, metadata = read_tensors(WEIGHTS), read_metadata(WEIGHTS)
    path = tmp_path / "other.safetensors"
    names = json.loads(metadata["subject"])
    write_tensors(path, tensors, {**metadata, "subject": json.dumps(names[::-1])})
    with pytest.raises(WeightsError, match="subjects are not those of vocabulary"):
        load_judge(path)
    write_tensors(path, tensors)
    with pytest.raises(WeightsError, match="train it again"):
        load_judge(path)
    write_tensors(path, {**tensors, "style.bias": np.zeros(5, np.float32)}, metadata)
    with pytest.raises(WeightsError, match="other tensors"):
        load_judge(path)
    for broken in ("[" * 10_000, "{"):
        write_tensors(path, tensors, {**metadata, "subject": broken})
        with pytest.raises(WeightsError, match="subjects are not those of vocabulary"):
            load_judge(path)
    write_tensors(path, {**tensors, "style.bias": np.full_like(tensors["style.bias"], np.nan)}, metadata)
    with pytest.raises(WeightsError, match="finite"):
        load_judge(path)
    path.write_bytes(WEIGHTS.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_judge(path)
    with pytest.raises(WeightsError, match="no such file"):
        load_judge(tmp_path / "none.safetensors")


def test_shipped_heads_are_small_and_name_what_they_were_trained_on():
    assert WEIGHTS.stat().st_size < 2 * 2**20
    assert all(style.package in read_metadata(WEIGHTS)["trained_on"] for style in train_judge.STYLES)


# ------------------------------------------------------------------------------------------------------- training


def test_discriminant_finds_what_classes_share():
    random = np.random.default_rng(0)
    classes = np.repeat(np.arange(3), 40)
    # Two columns tell the classes apart; the third varies more, within all of them.
    rows = np.stack([classes == 1, classes == 2, 10 * random.standard_normal(120)], 1) + 0.1 * random.random((120, 3))
    kernel, bias = train_judge.discriminant(rows, classes, 3, 0.1)
    assert ((rows @ kernel + bias).argmax(1) == classes).all()


def test_crops_are_places_of_a_scene_and_depend_on_the_generator_alone():
    pictures = load_pictures().images[:4].reshape(-1, 64, 64, 3)
    bottleneck = train_judge.Bottleneck.of(pictures)
    one, two = (
        [train_judge.crop(pictures[0], random, bottleneck, recolour=True) for _ in range(8)]
        for random in map(np.random.default_rng, (5, 5))
    )
    np.testing.assert_array_equal(one, two)
    assert np.array(one).shape == (8, 32, 32, 3)
    assert len({place.tobytes() for place in one}) == 8


def test_bottleneck_loses_the_less_the_more_it_keeps():
    pictures = load_pictures().images[:20].reshape(-1, 64, 64, 3)
    bottleneck = train_judge.Bottleneck.of(pictures)
    place = split_places(real_scenes(PROMPTS[:1]))[0].astype(np.float64)
    losses = [np.abs(bottleneck(place, kept, 3, 5) - place).mean() for kept in (0, 24, 64, 192)]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(losses[-1], 0, atol=1e-9)


def test_icons_are_found_by_name_where_a_package_has_no_codepoints(tmp_path, capsys):
    vocabulary = read_vocabulary()
    style = Style(name="s", package="p", version="1", licence="MIT", attribution="")
    files = {
        "p/chars.json": {},
        "p/icons.json": {
            "icons": {"foxface": {}, "cat": {}, "lion-face": {}, "turned": {}},
            "aliases": {"lion": {"parent": "lion-face"}, "owl": {"parent": "turned", "rotate": 1}},
        },
        "@iconify-json/noto/chars.json": {
            subject.codepoint: f"modern {subject.name}" for subject in vocabulary.subjects
        },
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert [subject.name for subject in train_judge.complete_names(tmp_path, style)] == ["fox", "cat", "lion"]
    assert set(json.loads((tmp_path / "p/chars.json").read_text()).values()) == {"foxface", "cat", "lion-face"}
    whale = Subject(name="whale", codepoint="1f433", topic="animals")
    assert train_judge.icon_name(whale, "spouting-whale", {"spurtingwhale"}, {}) == "spurtingwhale"
    assert train_judge.icon_name(whale, "spouting-whale", {"dolphin"}, {}) is None


def test_layers_are_what_the_heads_read():
    assert {key: array.shape for key, array in read_tensors(WEIGHTS).items()} == {
        "subject.kernel": (LAYERS, 180),
        "subject.bias": (180,),
        "style.kernel": (LAYERS, 4),
        "style.bias": (4,),
    }
