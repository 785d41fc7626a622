"""The maps command as a user runs it, on tiny experts: files, figures, and every bad input in one line."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from afa_jax import maps
from afa_jax.cli.commands import load_config, run
from afa_jax.experts.frozen import load_experts
from afa_jax.fusion.files import save_fusion
from afa_jax.methods.options import SampleOptions
from afa_jax.report import maps as drawing
from afa_jax.report.maps import read_prompts
from afa_jax.sampling.generation import Picture, Request, generate
from tests import tiny
from tests.commands.conftest import says_nothing_of

PROMPT, OTHER = "octopus, noto style", "pizza and owl, noto style"


@pytest.fixture(scope="module")
def trained(root):
    """A workdir of aggregators whose weights are random: maps that differ from place to place."""
    experts = load_experts(load_config(f"{root}/config.py"))
    aggregators = tiny.trained(3, tiny.MICRO_UNET, tiny.PLAIN_SABW, 7)
    save_fusion(root / "random", aggregators, dict(experts=experts.record))
    return root / "random"


@pytest.fixture(scope="module")
def made(root, trained, tmp_path_factory):
    """One picture, and statistics over two prompts of which one is that picture's; and what the picture was made of."""
    folder = tmp_path_factory.mktemp("maps")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n\n  {OTHER}  \n")
    arguments = ["--config", f"{root}/config.py", "--workdir", str(trained), "--out", str(folder / "out")]
    arguments += ["--prompt", PROMPT, "--statistics", str(folder / "prompts.txt"), "--seed", "3"]
    asked = []

    def recorded(requests: Sequence[Request], *given: Any, options: SampleOptions, **named: Any) -> Iterator[Picture]:
        asked.append((len(requests), options, given))
        return generate(requests, *given, options=options, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "generate", recorded)
        assert run(maps.main, arguments) == 0
    # Maps are kept of the picture that was asked for, and one at a time; over many prompts nothing but their sums.
    assert [(n, o.batch, o.maps, o.path, o.routing) for n, o, _ in asked] == [
        (1, 1, True, True, False),
        (2, 2, False, False, True),
    ]
    return folder / "out", asked[0][1:]


@pytest.fixture(scope="module")
def out(made):
    """The folder; it says nothing of where the models are."""
    assert says_nothing_of(str(made[0].parents[1]), made[0]) == 5
    return made[0]


@pytest.fixture(scope="module")
def kept(made):
    """All maps of both prompts, [steps, n, h, w] by site, by the program that is compiled already."""
    _, (options, (denoiser, experts)) = made
    requests = [Request(prompt=PROMPT), Request(prompt=OTHER)]
    return list(generate(requests, denoiser, experts, seed=3, options=options))


def test_statistics_are_those_of_the_whole_maps(out, kept):
    record = json.loads((out / "maps.json").read_text())
    weights = np.asarray([[site.mean((2, 3)) for site in picture.maps] for picture in kept])  # [k, sites, steps, n]
    entropy = np.asarray(
        [[-(site * np.log(site) / np.log(3)).sum(1).mean((1, 2)) for site in picture.maps] for picture in kept]
    )
    found = record["statistics"]
    assert found["prompts"] == [PROMPT, OTHER]
    for name, values in (("weights", weights), ("entropy", entropy)):
        by_step = np.moveaxis(values, 2, 1)
        np.testing.assert_allclose(found[name], by_step.mean(0), atol=1.5e-4)
        np.testing.assert_allclose(found[f"{name}_deviation"], by_step.std(0), atol=1.5e-4)
        np.testing.assert_allclose(record["pictures"][0][name], by_step[0], atol=1.5e-4)
    assert np.std(weights, 0).max() > 1e-3  # the prompts do differ
    assert record["experts"] == ["a", "b", "c"] and len(record["timesteps"]) == 3
    assert record["sites"][0] == "conv_in" and record["sites"][-1] == "conv_out" and len(record["sites"]) == 5


def test_a_picture_has_a_sheet_and_an_animation_of_every_step(out, kept):
    name = "000_octopus-noto-style"
    with Image.open(out / f"{name}.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), kept[0].pixels)
        assert json.loads(picture.info["afa_jax"])["prompt"] == PROMPT
    with Image.open(out / f"{name}_maps.webp") as moving:
        seen = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
    assert len(seen) == 3 and all((seen[i] != seen[i + 1]).any() for i in range(2))
    assert (out / f"{name}_maps.png").is_file()


def test_the_page_needs_nothing_else(out):
    page = (out / "maps.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("<img") == 2 and page.count("data:image/webp") == page.count("data:image/png") == 1
    assert page.count('<table class="heat"') == 4 and page.count("<svg") == 1  # experts and entropy; means over sites
    assert "Over 2 prompts" in page and "conv_out, t=" in page


def test_nothing_is_replaced_unasked(root, trained, out, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ["--config", f"{root}/config.py", "--workdir", str(trained), "--out", str(out), "--prompt", PROMPT]
    assert run(maps.main, arguments) == 2
    assert "exists; choose another name, or --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "000_octopus-noto-style.png").write_bytes(b"older")
    assert run(maps.main, [*arguments, "--seed", "3", "--out", str(copy), "--overwrite"]) == 0
    assert (copy / "000_octopus-noto-style.png").read_bytes() == before["000_octopus-noto-style.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to draw: give --prompt, --statistics or both"),
        (["--prompt", " "], "--prompt is empty"),
        (["--statistics", "none.txt"], "--statistics none.txt: No such file"),
        (["--statistics", "emoji:0"], "write a number of scenes, such as emoji:64"),
        (["--statistics", "emoji:many"], "write a number of scenes, such as emoji:64"),
        (["--statistics", "emoji:99999999"], "choose fewer"),
        (["--statistics", "{empty}"], "no prompt in it; write one a line"),
        (["--statistics", "{binary}"], "not a text in UTF-8"),
        (["--prompt", "octopus", "--seed", "-2"], "--seed: -2: write a whole number from -1"),
        (["--prompt", "octopus", "--size", "30x64"], "multiples of"),
        (["--prompt", "octopus", "--method", "expert:a"], "maps exist only in an ensemble"),
        (["--prompt", "octopus"], "--workdir is missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(root, tmp_path, arguments, said, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00octopus")
    given = [text.format(empty=tmp_path / "empty.txt", binary=tmp_path / "binary.txt") for text in arguments]
    out = tmp_path / "out"
    assert run(maps.main, ["--config", f"{root}/config.py", "--out", str(out), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_scenes_of_two_topics_by_number():
    prompts = read_prompts("emoji:8", 1)
    assert len(set(prompts)) == 8 and all(" and " in prompt for prompt in prompts)
    assert read_prompts("emoji:8", 1) == prompts != read_prompts("emoji:8", 2)
