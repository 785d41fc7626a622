"""The cache: what it holds, what it depends on, and what may happen to its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from afa_jax.data.emoji.vocabulary import HERE
from afa_jax.data.sources import BadExample
from afa_jax.data.transform import Crop
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.frozen import Experts, load_experts
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.unet import UNet
from afa_jax.models.vae import to_images
from afa_jax.training.cache.cache import Cache, build_cache, cache_key, crop_of, make_cached_loader
from afa_jax.training.cache.encode import crop_random
from afa_jax.trees import stack
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny

CAPTIONS = ("octopus and pizza, noto style", "pizza, blob style", "octopus, fluent style")
CROP = Crop(size=(16, 24), flip=True)


@dataclasses.dataclass
class Drawings:
    """Noise of several sizes, with a note of what was asked for."""

    length: int = 10
    bad: tuple[int, ...] = ()
    foreign: tuple[int, ...] = ()
    dies_at: int = -1
    fingerprint: str = "drawings"
    asked: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"drawing {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        if index == self.dies_at:
            raise KeyboardInterrupt
        if index in self.bad:
            raise BadExample(self.name(index), "torn")
        if index in self.foreign:
            return dict(image=np.zeros((9, 9, 3), np.uint8), caption="tyrannosaurus")
        image = np.random.default_rng(index).integers(0, 256, (20 + index, 30, 3), np.uint8)
        return dict(image=image, caption=CAPTIONS[index % 3])


@pytest.fixture(scope="module")
def experts() -> Experts:
    return Experts(
        names=("a", "b"),
        hashes=("hash of a", "hash of b"),
        vae_hash="hash of the VAE",
        unet=jax.eval_shape(lambda: UNet(tiny.SMALL_UNET, rngs=nnx.Rngs(0))),  # whose arrays nobody needs
        text_encoder=stack([tiny.text_encoder(seed) for seed in range(2)]),
        vae=tiny.vae(0),
        tokenizer=Tokenizer(HERE),
        schedule=NoiseSchedule(),
    )


def build(experts: Experts, path: Path, source: Drawings | None = None, **options: Any) -> Cache:
    """Five shards of two examples, if nothing else is said."""
    options = dict(shard=2, batch=2, workers=2, progress=False) | options
    return build_cache(experts, source or Drawings(), CROP, path=path, **options)


@pytest.fixture(scope="module")
def built(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches")
    build(experts, path, crops=2)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A complete cache of two crops that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def shard(path: Path, number: int) -> Path:
    return next(path.glob(f"*/shard-{number:05d}-of-*.safetensors"))


def written(path: Path, number: int) -> tuple[int, int]:
    file = shard(path, number).stat()
    return file.st_ino, file.st_mtime_ns


def everything(cache: Cache) -> list[dict[str, Any]]:
    return [cache.example(int(i), j) for i in cache.indices for j in range(cache.crops)]


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for one, other in zip(a, b, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_the_values_are_those_of_the_networks(experts, tmp_path):
    # 5 examples in shards of 3 and batches of 2: the last of each is filled up.
    source = Drawings(length=5)
    cache = build(experts, tmp_path, source, crops=2, shard=3, seed=7)
    places = [(i, j) for i in range(5) for j in range(2)]
    crops = np.stack([CROP(source[i]["image"], crop_random(7, i, j)) for i, j in places])
    mean, std = jax.jit(lambda vae, x: vae.posterior(to_images(x)))(experts.vae, crops)
    ids = experts.tokenizer([*CAPTIONS, ""])
    states = np.asarray(jax.jit(encode_prompts)(experts.text_encoder, ids).text)
    for row, (i, j) in enumerate(places):
        example = cache.example(i, j)
        assert example["index"] == i and example["mean"].dtype == np.float32
        np.testing.assert_allclose(example["mean"], mean[row], atol=1e-5)
        np.testing.assert_allclose(example["std"], std[row], atol=1e-5)
        np.testing.assert_allclose(example["states"], states[:, i % 3], atol=1e-5)
    np.testing.assert_allclose(cache.no_caption, states[:, 3], atol=1e-5)
    assert len(cache) == 5 and list(cache.indices) == list(range(5)) and not cache.bad
    assert_same([cache[1]], [cache.example(1, 0)])
    assert np.abs(cache.example(1, 0)["mean"] - cache.example(1, 1)["mean"]).max() > 0.01
    for outside in ((5, 0), (-1, 0), (0, 2)):
        with pytest.raises(IndexError):
            cache.example(*outside)


def test_a_cache_can_be_sent_to_a_process_and_opened_again_without_reading_pictures(experts, built):
    source = Drawings()
    cache = build(experts, built, source, crops=2, shard=5)  # the cache that is there keeps its shards of two
    assert source.asked == [] and len(list(cache.shards.folder.glob("shard-*"))) == 5
    assert_same(everything(pickle.loads(pickle.dumps(cache))), everything(cache))
    record = json.loads((cache.shards.folder / "cache.json").read_text())
    assert record["experts"] == list(experts.hashes) and record["shard"] == 2 and record["crop"]["size"] == [16, 24]
    assert cache.shards.folder.name == record["key"][:16]


def test_all_that_the_values_depend_on_is_in_the_key(experts):
    usual: dict[str, Any] = dict(experts=experts, source=Drawings(), crop=CROP, crops=2, dtype=jnp.float32, seed=0)
    swapped = dataclasses.replace(experts, hashes=experts.hashes[::-1])
    other_vae = dataclasses.replace(experts, vae_hash="another")
    changes: list[dict[str, Any]] = [
        dict(),
        dict(experts=swapped),
        dict(experts=other_vae),
        dict(source=Drawings(fingerprint="others")),
        dict(crop=Crop(size=(24, 16), flip=True)),
        dict(crop=Crop(size=(16, 24))),
        dict(crops=3),
        dict(dtype=jnp.bfloat16),
        dict(seed=1),
    ]
    keys = [cache_key(**(usual | change)) for change in changes]
    assert len(set(keys)) == len(changes)
    assert cache_key(**usual | dict(source=Drawings())) == keys[0]


def test_files_that_change_change_the_key(tmp_path):
    shared: dict[str, Any] = dict(tokenizer=HERE / "tokenizer", scheduler=NoiseSchedule().to_json())
    save_folder(tmp_path / "a", unet=tiny.unet(0), text_encoder=tiny.text_encoder(0))
    keys = []
    for seed in range(2):
        save_folder(tmp_path / f"base{seed}", vae=tiny.vae(seed), **shared)
        config = ConfigDict(dict(base=f"{tmp_path}/base{seed}", experts=[dict(name="a", path=f"{tmp_path}/a")]))
        keys.append(cache_key(load_experts(config), Drawings(), CROP, 1, jnp.float32, 0))
    assert keys[0] != keys[1]
    hashes = [Tokenizer(HERE).sha256, Tokenizer(tmp_path / "base0").sha256]
    merges = tmp_path / "base0" / "tokenizer" / "merges.txt"
    *others, before, last = merges.read_text().splitlines()
    merges.write_text("\n".join([*others, last, before]))  # their order is their rank
    hashes.append(Tokenizer(tmp_path / "base0").sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_another_key_is_another_folder_and_the_old_one_stays(experts, copy, caplog):
    caplog.set_level("INFO")
    old = shard(copy, 0).parent
    new = build(experts, copy, Drawings(length=2, fingerprint="others"), crops=2).shards.folder
    assert new != old and new.parent == old.parent
    assert str(old) in caplog.text
    source = Drawings()
    build(experts, copy, source, crops=2)
    assert source.asked == []


def test_truncated_and_foreign_shards_are_made_again(experts, copy, built):
    with open(shard(copy, 0), "rb+") as file:
        file.truncate(os.path.getsize(file.name) - 1)
    shutil.copy(shard(copy, 2), shard(copy, 1))  # of this cache, but not these examples
    other = build(experts, copy, Drawings(fingerprint="others"), crops=2)
    shutil.copy(other.shards.path(3), next(p for p in copy.glob("*/shard-00003-*") if p.parent != other.shards.folder))
    source = Drawings()
    cache = build(experts, copy, source, crops=2)
    assert sorted(source.asked) == [0, 1, 2, 3, 6, 7]
    assert_same(everything(cache), everything(build(experts, built, crops=2)))


def test_shards_of_other_types_and_shapes_are_made_again(experts, copy, built):
    """Files that are safetensors, with the key of this cache, and were written by something else."""
    tensors: list[dict[str, Any]] = [
        dict(bad=dict(dtype="F8_E5M2")),
        dict(bad=dict(dtype="F8_E8M0")),  # numpy has none
        dict(crc32=dict(dtype="F32")),
        dict(mean=dict(dtype="I32")),
        dict(mean=dict(shape=[2, 2, 3, 2, 4])),
        dict(states=dict(shape=[2, -2, -16, 32])),
        dict(std=dict(shape=[2**62, 0, 1, 1, 1])),
    ]
    reasons = ["[]", '"x"', '{"2": 3}', '{"2": ["a"]}', "[" * 100_000, '{"1e9": ["a", "b"]}', "{", "\\ud800"]
    changes: list[tuple[dict[str, Any], str | None]] = [(change, None) for change in tensors] + [
        ({}, reason) for reason in reasons
    ]
    expected = everything(build(experts, built, crops=2))
    for change, reason in changes:
        path = shard(copy, 1)
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        for name, fields in change.items():
            header[name] |= fields
        if reason is not None:
            header["__metadata__"]["bad"] = reason
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        source = Drawings()
        assert_same(everything(build(experts, copy, source, crops=2)), expected)
        assert sorted(source.asked) == [2, 3] and path.read_bytes() == whole, (change, reason)
    record = next(copy.glob("*/cache.json"))
    for content in (b"\xff", b"[]", b"[" * 100_000, *(b'{"shard": %s}' % size for size in (b"-1", b"0", b"1e999"))):
        record.write_bytes(content.replace(b"{", b'{"key": "%s", ' % json.loads(good_record(built))["key"].encode()))
        build(experts, copy, crops=2)
    assert json.loads(record.read_text())["shard"] == 2


def good_record(built: Path) -> str:
    return next(built.glob("*/cache.json")).read_text()


@pytest.mark.parametrize("name", ["mean", "std", "states", "crc32"])
def test_a_flipped_byte_is_named_where_it_is_read(experts, copy, name):
    cache, damaged = build(experts, copy, crops=2), shard(copy, 1)
    with open(damaged, "rb+") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        start, end = json.loads(file.read(size))[name]["data_offsets"]
        file.seek(8 + size + start + (end - start) * 3 // 4)  # of its second example, its second crop
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(InputError, match=rf"{damaged.name}: example 3 .*delete"):
        cache.example(3, 1)
    cache.example(2, 1)
    damaged.unlink()
    source = Drawings()
    build(experts, copy, source, crops=2).example(3, 1)
    assert sorted(source.asked) == [2, 3]


def test_a_damaged_empty_caption_is_computed_again(experts, copy):
    path = next(copy.glob("*/no_caption.safetensors"))
    good = build(experts, copy, crops=2).no_caption
    content = bytearray(path.read_bytes())
    content[-1] ^= 16
    path.write_bytes(content)
    np.testing.assert_array_equal(build(experts, copy, crops=2).no_caption, good)
    assert path.read_bytes() != content


def test_a_killed_build_goes_on_with_the_missing_shards(experts, tmp_path, built):
    with pytest.raises(KeyboardInterrupt):
        build(experts, tmp_path, Drawings(dies_at=6), crops=2)
    finished = [written(tmp_path, number) for number in range(3)]
    folder = shard(tmp_path, 0).parent
    (folder / ".shard-00003-of-00005.safetensors.123.partial").write_bytes(b"half of it")
    (folder / "cache.json").write_text("{half")
    source = Drawings()
    cache = build(experts, tmp_path, source, crops=2)
    assert sorted(source.asked) == [6, 7, 8, 9]
    assert [written(tmp_path, number) for number in range(3)] == finished
    assert_same(everything(cache), everything(build(experts, built, crops=2)))
    shards = {f"shard-{number:05d}-of-00005.safetensors" for number in range(5)}
    assert {path.name for path in folder.iterdir()} == shards | {"cache.json", "no_caption.safetensors"}


def test_bad_examples_stop_the_build_or_are_left_out(experts, tmp_path):
    torn = Drawings(bad=(4,), foreign=(7,))
    with pytest.raises(BadExample, match=r"drawing 4.*torn.*data\.bad=skip"):
        build(experts, tmp_path, torn)
    torn.asked.clear()
    cache = build(experts, tmp_path, torn, bad="skip")
    assert min(torn.asked) == 4  # the shards before the bad one stayed
    assert list(cache.bad) == [4, 7] and cache.bad[4] == ("drawing 4", "torn")
    assert cache.bad[7][0] == "drawing 7" and "tyrannosaurus" in cache.bad[7][1]
    assert list(cache.indices) == [0, 1, 2, 3, 5, 6, 8, 9]
    with pytest.raises(BadExample, match="drawing 7"):
        cache[7]
    assert_same(everything(cache), everything(build(experts, tmp_path / "whole"))[:4] + everything(cache)[4:])
    with pytest.raises(InputError, match=r"shard-00002-of-00005.*drawing 4.*torn"):
        build(experts, tmp_path)


def test_a_source_that_is_gone_is_not_kept_as_bad(experts, tmp_path):
    gone = Drawings(length=20, bad=tuple(range(9, 20)))
    with pytest.raises(InputError, match=r"drawing 9 and the 8 examples after it are all bad \(torn\)"):
        build(experts, tmp_path, gone, shard=9, bad="skip")
    assert [path.name[:11] for path in tmp_path.glob("*/*.safetensors")] == ["shard-00000"]


def test_values_that_are_not_finite_are_refused_by_name(experts, tmp_path):
    vae = tiny.vae(0)
    bias = vae.encoder.conv_in.bias
    assert bias is not None
    bias[...] = jnp.nan
    with pytest.raises(InputError, match=r"^drawing 0, drawing 1: the VAE or .* NaN or infinity; try dtype=float32"):
        build(dataclasses.replace(experts, vae=vae), tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_folder_that_cannot_be_is_refused(experts, tmp_path):
    with pytest.raises(InputError, match=r"cache.path must be a local or mounted folder"):
        build(experts, Path("gs://bucket/cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache\.path: .* cannot be written"):
        build(experts, tmp_path / "file")


def test_bfloat16_is_stored_as_it_was_computed(experts, tmp_path):
    vae, text_encoder = tiny.vae(0), stack([tiny.text_encoder(seed) for seed in range(2)])
    vae.dtype = text_encoder.dtype = jnp.bfloat16
    half, source = dataclasses.replace(experts, vae=vae, text_encoder=text_encoder), Drawings(length=2)
    cache = build(half, tmp_path, source)
    crops = np.stack([CROP(source[i]["image"], crop_random(0, i, 0)) for i in range(2)])
    mean, std = jax.jit(lambda vae, x: vae.posterior(to_images(x)))(vae, crops)
    assert mean.dtype == jnp.float32
    for i, want in enumerate(zip(mean, std, strict=True)):
        example = cache[i]
        assert {example[name].dtype for name in ("mean", "std", "states")} == {np.dtype(ml_dtypes.bfloat16)}
        np.testing.assert_array_equal(example["mean"].astype(np.float32), want[0])
        np.testing.assert_array_equal(example["std"].astype(np.float32), want[1])
    assert cache.no_caption.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("wrong", [dict(crops=0), dict(shard=0), dict(batch=0), dict(bad="ignore")])
def test_wrong_options_are_refused_by_name(experts, tmp_path, wrong):
    with pytest.raises(InputError, match=rf"(cache|data)\.{next(iter(wrong))}="):
        build(experts, tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_the_crop_of_a_position_is_pure_and_every_crop_is_as_likely():
    drawn = [crop_of(3, position, 4) for position in range(4000)]
    assert drawn == [crop_of(3, position, 4) for position in range(4000)]
    assert drawn != [crop_of(4, position, 4) for position in range(4000)]
    assert np.abs(np.bincount(drawn) - 1000).max() < 110  # four standard deviations


def test_a_loader_draws_the_good_examples_with_the_crops_of_their_positions(experts, tmp_path):
    cache = build(experts, tmp_path, Drawings(bad=(4,)), crops=3, bad="skip")
    loader = make_cached_loader(cache, batch=3, seed=5)
    batches = [loader.at(step) for step in range(3)]
    assert sorted(np.concatenate([batch["index"] for batch in batches])) == list(cache.indices)
    for step, batch in enumerate(batches):
        assert batch["states"].shape[:2] == (3, 2) and batch["index"].dtype == batch["position"].dtype == np.int64
        for row, (index, position) in enumerate(zip(batch["index"], batch["position"], strict=True)):
            assert position == 3 * step + row
            want = cache.example(int(index), crop_of(5, int(position), 3))
            np.testing.assert_array_equal(batch["mean"][row], want["mean"])
            np.testing.assert_array_equal(batch["std"][row], want["std"])
            np.testing.assert_array_equal(batch["states"][row], want["states"])
    for batch, ahead in zip(batches[1:], itertools.islice(loader.iterate(1), 2), strict=True):
        np.testing.assert_array_equal(ahead["mean"], batch["mean"])
