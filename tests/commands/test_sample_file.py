"""Sampling of a file of prompts: which lines are refused, what is made, what stays, and when nothing is touched."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from afa_jax import sample
from afa_jax.cli.commands import run
from afa_jax.errors import InputError
from afa_jax.sampling import generation
from afa_jax.sampling import pictures as sampling
from afa_jax.sampling import sample_many as bulk
from afa_jax.sampling.generation import Request
from afa_jax.sampling.prompt_files import read_prompts
from afa_jax.sampling.sample_many import agreed, covered, existing, first_difference, path_of

PROMPTS = ["octopus and pizza, noto style", "fox, blob style", "car, noto style", "fox, blob style", "owl, noto style"]


@pytest.fixture(scope="module")
def arguments(root: Path) -> list[str]:
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return [
        f"--config={root}/config.py", "--method=uniform", "--seed=5", "--num_images=2", f"--prompts={root}/prompts.txt"
    ]  # fmt: skip


def programs_made() -> int:
    """How many samplers have been compiled."""
    return int(cast(Any, generation.sample_batch)._cache_size())


@pytest.fixture(scope="module")
def made(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures, on a mesh of eight devices."""
    out = tmp_path_factory.mktemp("made") / "out"
    programs = programs_made()
    assert run(sample.main, [*arguments, f"--out={out}"]) == 0
    assert programs_made() == programs + 1  # two batches, one program
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("?????/*"))}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.rglob("*.*")}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", b"fox\n\ncar\n", "a.txt:2: the line is empty"),
        ("a.txt", b"fox\ncar \xff\n", "a.txt:2: not UTF-8"),
        ("a.txt", b"", "a.txt: it is empty"),
        ("a.txt", b"fox\ncar\nzebra, noto style", "a.txt:3: prompt 'zebra, noto style': these models never learnt"),
        ("a.jsonl", b'{"prompt": "fox"}\n{"prompt": }\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"prompt": "fox"}\n{"caption": "car"}\n', "a.jsonl:2: write"),
        ("a.jsonl", b'{"prompt": "fox"}\n["car"]\n', "a.jsonl:2: write"),
        ("a.jsonl", b'{"prompt": "fox", "negative_prompt": 3}\n', "a.jsonl:1: write"),
        ("a.jsonl", b'{"prompt": " "}\n', "a.jsonl:1: the line is empty"),
        ("a.jsonl", b'{"prompt": "fox", "negative_prompt": "zebra"}\n', "a.jsonl:1: prompt 'zebra'"),
    ],
)
def test_a_line_that_cannot_be_sampled_is_named_and_nothing_is_written(root, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_bytes(text)
    arguments = [f"--config={root}/config.py", "--method=uniform", f"--prompts={tmp_path / name}"]
    assert run(sample.main, [*arguments, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt=fox", "--prompts=a.txt"], "argument --prompts: not allowed with argument --prompt"),
        (["--prompts=nowhere.txt"], "--prompts nowhere.txt: No such file"),
        (["--prompts=a.txt", "--maps"], "--maps goes with --prompt"),
    ],
)
def test_options_that_do_not_fit_are_refused(root, capsys, more, message):
    assert run(sample.main, [f"--config={root}/config.py", "--method=uniform", "--out=out", *more]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_read_line_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf fox \r\ncar\xe2\x80\xa8b\n fox \n\n")
    with pytest.raises(InputError, match=r"a\.txt:4: the line is empty"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf fox \r\ncar\xe2\x80\xa8b\n fox \n")
    found = read_prompts(tmp_path / "a.txt", "blob").requests
    assert [request.prompt for request in found] == ["fox", "car\u2028b", "fox"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "fox", "id": 3}\n{"negative_prompt": "car", "prompt": "owl"}')
    with pytest.warns(UserWarning, match=r"id: not used, in 1 of 2 lines"):
        requests = read_prompts(tmp_path / "a.jsonl", "blob").requests
    assert requests == [
        Request(prompt="fox", negative_prompt="blob"), Request(prompt="owl", negative_prompt="car")
    ]  # fmt: skip


def test_pictures_are_numbered_by_line_and_carry_their_recipe(made):
    assert sorted(contents(made)) == [f"{p:08d}.png" for p in range(10)]
    pictures = []
    recipe: dict[str, Any] = {}
    for p, path in enumerate(sorted(made.glob("00000/*.png"))):
        with Image.open(path) as picture:
            recipe = json.loads(picture.info["afa_jax"])
            pictures.append(np.asarray(picture))
        assert (recipe["prompt"], recipe["number"], recipe["seed"]) == (PROMPTS[p // 2], p, 5)
        assert pictures[-1].shape == (32, 64, 3)
    # The same prompt twice: lines 1 and 3; each picture has its own noise.
    assert len({picture.tobytes() for picture in pictures}) == 10
    shared = json.loads((made / "recipe.json").read_text())
    assert shared["num_images"] == 2 and shared["steps"] == recipe["steps"] == 3
    assert shared["made_by"] == recipe["made_by"] and "number" not in shared


def test_a_picture_is_the_one_that_prompt_and_number_make_alone(made, root, arguments, tmp_path):
    """Bit for bit: without a mesh, of another batch; sampled by its prompt and number, not from the file."""
    arguments = [*arguments[:3], "--num_images=3", f"--prompt={PROMPTS[1]}", f"--out={tmp_path}"]
    assert run(sample.main, arguments) == 0
    with Image.open(tmp_path / "uniform_000_002_fox-blob-style.png") as one, Image.open(path_of(made, 2)) as other:
        assert one.tobytes() == other.tobytes()


def test_only_what_is_missing_or_broken_is_made_again(made, arguments, tmp_path, capsys):
    whole, out = contents(made), tmp_path / "out"
    shutil.copytree(made, out)
    path_of(out, 3).unlink()
    path_of(out, 9).write_bytes(whole["00000009.png"][:-3])
    before = times(out)
    programs = programs_made()
    assert run(sample.main, [*arguments, f"--out={out}"]) == 0
    assert programs_made() == programs  # a batch of two is filled up to eight
    assert ": 2 pictures made, 8 were there already" in capsys.readouterr().out
    assert contents(out) == whole
    assert {name for name, time in times(out).items() if time != before.get(name)} == {"00000003.png", "00000009.png"}
    assert run(sample.main, [*arguments, f"--out={out}"]) == 0
    assert ": 0 pictures made, 10 were there already" in capsys.readouterr().out


def test_another_recipe_is_refused_and_overwriting_removes_what_was_made(made, arguments, root, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "mine.txt").touch()
    (out / "00000" / "mine.png").touch()
    (out / "00000" / ".00000004.png.123.partial").touch()
    before = times(out)
    (tmp_path / "other.txt").write_text("fox")
    for other, message in (
        (["--seed=6"], "seed is 5 there and 6 here"),
        (["--num_images=3"], "num_images is 2 there and 3 here"),
        (["--guidance=3"], "guidance is 2.0 there and 3.0 here"),
        ([f"--prompts={tmp_path / 'other.txt'}"], "prompts_sha256 is "),
        (["--method=expert:a"], "method is 'uniform' there and 'expert:a' here"),
    ):
        assert run(sample.main, [*arguments, f"--out={out}", *other]) == 2
        assert f"error: {out}/recipe.json: {message}" in capsys.readouterr().err
    assert times(out) == before
    assert run(sample.main, [*arguments, f"--out={out}", f"--prompts={tmp_path / 'other.txt'}", "--overwrite"]) == 0
    assert set(times(out)) == {"mine.txt", "mine.png", "00000000.png", "00000001.png", "recipe.json"}


def test_numbered_pictures_of_an_unknown_recipe_are_left_alone(made, arguments, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "out" / "recipe.json").unlink()
    before = times(tmp_path / "out")
    for more in ([], ["--overwrite"]):
        assert run(sample.main, [*arguments, f"--out={tmp_path / 'out'}", *more]) == 2
        assert "out holds pictures of an unknown recipe" in capsys.readouterr().err
    (tmp_path / "out" / "recipe.json").write_text('{"bread": "flour"}')
    assert run(sample.main, [*arguments, f"--out={tmp_path / 'out'}", "--overwrite"]) == 2
    assert "recipe.json is not of this command" in capsys.readouterr().err
    assert times(tmp_path / "out").items() >= before.items()


@pytest.mark.filterwarnings("default")
def test_prompts_that_are_cut_are_said_once(arguments, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("\n".join(["fox", "fox and " * 20 + "pizza", "fox and " * 20 + "car"]))
    assert run(sample.main, [*arguments, f"--prompts={tmp_path / 'long.txt'}", f"--out={tmp_path / 'out'}"]) == 0
    error = capsys.readouterr().err
    assert error.count("14 fit") == 1 and "long.txt:2: prompt " in error and "; 1 more are too long" in error


def test_what_another_process_sees_counts(tmp_path, monkeypatch):
    for p in (0, 1001):
        path_of(tmp_path, p).parent.mkdir(exist_ok=True)
        bulk._write(path_of(tmp_path, p), np.zeros((2, 2, 3), np.uint8), {})
    (tmp_path / "00001" / "00000002.png").write_bytes(path_of(tmp_path, 0).read_bytes())  # not its folder
    there = existing(tmp_path, 1003)
    assert np.flatnonzero(there).tolist() == [0, 1001]
    assert np.flatnonzero(existing(tmp_path, 1001)).tolist() == [0]
    other = np.zeros(1003, bool)
    other[[1, 1002]] = True
    monkeypatch.setattr(bulk, "gather", lambda view: [view, np.packbits(other).tobytes()])
    assert np.flatnonzero(agreed(there)).tolist() == [0, 1, 1001, 1002]


def test_the_first_difference_has_a_path():
    assert first_difference(dict(a=1, b=[1, dict(c=2)]), dict(a=1, b=[1, dict(c=3)])) == "b.1.c is 2 there and 3 here"
    assert first_difference(dict(a=1), dict(a=1, b=2)) == "b is None there and 2 here"
    assert first_difference(dict(a=[1]), dict(a=[1, 2])) == "a is [1] there and [1, 2] here"
    assert first_difference(dict(a=[1, 2]), dict(a=[1, 2])) is None


def test_nested_spans_count_once():
    assert covered([(5, 6), (0, 4), (1, 2), (3, 4.5)]) == 5.5
    assert covered([]) == 0


def test_a_batch_is_under_way_while_the_one_before_is_used(made, root, monkeypatch):
    """The order of calls, with a sampler that only counts."""
    calls: list[str] = []
    real = generation.sample_batch

    def counted(*arguments, **options):
        calls.append("sample")
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "sample_batch", counted)
    config = sample.parse(sample.Parser(), [f"--config={root}/config.py"])[1]
    experts = sampling.Models(config).experts
    method = sampling.make_method(dict(kind="uniform"), sampling.Models(config))
    options = sampling.SampleOptions(size=(32, 64), steps=3, guidance=2.0, batch=2)
    requests = [Request(prompt=prompt, number=2 * i) for i, prompt in enumerate(PROMPTS)]
    pictures = []
    for picture in generation.generate(requests, method.denoiser, experts, seed=5, options=options):
        calls.append("use")
        pictures.append(picture)
    assert calls == ["sample", "sample", "use", "use", "sample", "use", "use", "use"]
    assert [picture.request for picture in pictures] == requests
    for i, picture in enumerate(pictures):
        with Image.open(path_of(made, 2 * i)) as other:
            assert picture.pixels.tobytes() == other.tobytes()


def test_a_picture_that_is_not_finite_is_refused_and_a_vae_that_overflows_decodes_in_float32(root, monkeypatch):
    config = sample.parse(sample.Parser(), [f"--config={root}/config.py", "--config.dtype=float16"])[1]
    models = sampling.Models(config)
    method = sampling.make_method(dict(kind="uniform"), models)
    options = sampling.SampleOptions(size=(32, 64), steps=1, guidance=1.0, batch=2)
    requests = [Request(prompt=prompt, number=i) for i, prompt in enumerate(PROMPTS)]
    finite, dtypes = np.ones((5, 2), bool), []

    def faked(denoiser, text_encoder, vae, rows, seed, steps, **_):
        """The second batch overflows where the VAE decodes in float16."""
        numbers = np.asarray(rows[2])
        dtypes.append(np.dtype(vae.dtype).name)
        overflown = (numbers >= 2) & (dtypes[-1] == "float16")
        flags = finite[numbers] & ~np.stack([np.zeros_like(overflown), overflown], 1)
        return dict(pixels=np.zeros((len(numbers), 32, 64, 3), np.uint8), finite=flags)

    monkeypatch.setattr(generation, "sample_batch", faked)
    with pytest.warns(UserWarning, match="float32"):
        made = [*generation.generate(requests, method.denoiser, models.experts, seed=5, options=options)]
    assert [picture.request for picture in made] == requests
    assert dtypes == ["float16"] * 3 + ["float32"] * 2  # two and one that was under way, then anew from the second on
    finite[3, 0] = False
    made = []
    with (
        pytest.warns(UserWarning, match="float32"),
        pytest.raises(InputError, match=r"'fox, blob style'.*the latents.*dtype=float32"),
    ):
        made.extend(generation.generate(requests, method.denoiser, models.experts, seed=5, options=options))


@pytest.mark.parametrize(("part", "flags"), [("unet", [False, False]), ("vae", [True, False]), ("", [True, True])])
def test_what_is_not_finite_is_told_apart(root, part, flags):
    config = sample.parse(sample.Parser(), [f"--config={root}/config.py"])[1]
    method = sampling.make_method(dict(kind="expert", expert="a"), sampling.Models(config))
    models = dict(unet=method.denoiser, text=method.experts.text_encoder, vae=method.experts.vae)
    if part:
        models[part] = jax.tree.map(lambda leaf: np.nan * leaf if jnp.ndim(leaf) else leaf, models[part])
    ids = method.experts.tokenizer(["fox"])
    options = sampling.SampleOptions(size=(32, 32), steps=1, guidance=1.0, batch=1, one_by_one=False)
    program, steps = generation.program_of(options, method.experts.schedule)
    made = generation.sample_batch(*models.values(), (ids, ids, np.zeros(1, np.int32)), 0, steps, program=program)
    assert made["finite"].tolist() == [flags]
