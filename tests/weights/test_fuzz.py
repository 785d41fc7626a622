"""Whatever is in a file: a result, or one line that names it. No crash, no traceback, no memory beyond the file's size.

The examples are the same every time (derandomize, see conftest.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afa_jax import convert
from afa_jax.cli.commands import run
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats.flax_folders import open_flax
from afa_jax.weights.formats.folders import save_folder
from afa_jax.weights.formats.single_file import CONFIGS as SAID
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.lora.baked import with_loras
from afa_jax.weights.opened import check_network, check_networks, open_checkpoint
from afa_jax.weights.tensors import Tensor, _chunks, open_tensors, write_tensors
from tests import tiny

MEMORY = 64 * 2**20  # bytes that reading a small file may take, whatever its numbers claim
NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    100,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    10**400,
]
few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
some = settings(few, max_examples=60)
many = settings(few, max_examples=120)

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([*NUMBERS, *(-n for n in NUMBERS)])
    | st.floats()
    | st.sampled_from(["", "a", "\n", "\x1b[2J", "é", "\0", "CrossAttnDownBlock2D", "silu", "../../x", "F32", "gelu"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["a", "shape", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def survives(use: Callable[[], Any]) -> Any:
    """The result, or None after an InputError of one printable line; both within the memory."""
    tracemalloc.start()
    try:
        return use()
    except InputError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 2500
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


def read_all(path: Path) -> None:
    for tensor in open_tensors(path).tensors.values():
        tensor.read()


# Bytes


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file's bytes: cut, lengthened, flipped, overwritten, or with another header length."""
    where, what = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))
    kind = draw(st.sampled_from(["cut", "cut_start", "insert", "overwrite", "length", "remove", "append", "flip"]))
    number = draw(st.sampled_from([n for n in NUMBERS if n < 2**64]))
    near = draw(st.booleans())  # much that matters is in the first bytes

    def change(data: bytes) -> bytes:
        at = int(where * (min(len(data), 400) if near else len(data)))
        match kind:
            case "cut":
                return data[:at]
            case "cut_start":
                return data[at:]
            case "insert":
                return data[:at] + what + data[at:]
            case "overwrite":
                return data[:at] + what + data[at + len(what) :]
            case "length":
                return number.to_bytes(8, "little") + data[8:]
            case "remove":
                return data[:at] + data[at + len(what) :]
            case "append":
                return data + what
        return data[:at] + bytes(b ^ 1 << number % 8 for b in data[at : at + 1]) + data[at + 1 :]

    return change


damages = st.lists(damage(), min_size=1, max_size=3)


def damaged(data: bytes, changes: list[Callable[[bytes], bytes]]) -> bytes:
    for change in changes:
        data = change(data)
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small checkpoint; tests only read it."""
    path = tmp_path_factory.mktemp("fuzz") / "model"
    save_folder(
        path,
        unet=tiny.unet(0, tiny.MICRO_UNET),
        vae=tiny.vae(0),
        text_encoder=tiny.text_encoder(0),
        scheduler=dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    return path


def written(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    write_tensors(path, tensors, metadata)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(
        tmp_path_factory.mktemp("whole") / "a.safetensors",
        {"a": np.ones((2, 3), np.float32), "b.weight": np.zeros((0, 4), np.float16), "c": np.arange(5)},
        {"format": "pt", "é": "\n"},
    )


@many
@given(damages)
def test_damaged_tensors(whole: bytes, tmp_path: Path, changes: list) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damaged(whole, changes))
    survives(lambda: read_all(path))


entries = st.fixed_dictionaries(
    {},
    optional=dict(
        dtype=st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F4", "F8_E8M0", "C64", "", "\n"]) | junk,
        shape=st.lists(st.sampled_from(NUMBERS), max_size=5) | junk,
        data_offsets=st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=2) | junk,
        more=junk,
    ),
)


@many
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | junk, max_size=3),
    st.binary(max_size=64),
    st.sampled_from([0, 0, 0, -1, 1, 7]),
)
def test_invented_headers(tmp_path: Path, header: dict, data: bytes, off: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(max(0, len(text) + off).to_bytes(8, "little") + text + data)
    survives(lambda: read_all(path))


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        f"{{{ENTRY},{ENTRY}}}",  # one name twice
        '{"a":' + "[" * 100_000,
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"__metadata__":{' + '"x":' + '{"x":' * 5000 + "1" + "}" * 5001 + "}",
        "{" + ENTRY + ',"__metadata__":{"' + "x" * 10**6 + '":"' + "y" * 10**6 + '"}}',
        '{"' + "n" * 10**6 + '":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"a\\n\\u001b[2Jb":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[0,' + "9" * 5000 + '],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":' + str([1] * 100) + ',"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        "null",
        "{}",
    ],
    ids=range(16),
)
def test_headers_made_to_break_parsers(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.safetensors"
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    survives(lambda: read_all(path))
    path.write_bytes(len(text).to_bytes(8, "little") + text.replace(b"a", b"\xff\xfe") + b"\0\0\0\0")
    survives(lambda: read_all(path))


# Configs

CONFIGS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, tiny.SMALL_UNET),
    "vae": (VAEConfig, tiny.VAE_CONFIG),
    "text_encoder": (TextConfig, tiny.TEXT),
}


@pytest.mark.parametrize("name", CONFIGS)
@some
@given(st.data())
def test_configs_of_any_types(name: str, data: st.DataObject) -> None:
    cls, whole = CONFIGS[name]
    fields = json.loads(json.dumps(vars(whole)))
    for field in data.draw(st.lists(st.sampled_from([*fields, "_class_name", "act_fn", "model_type"]), max_size=3)):
        fields[field] = data.draw(junk)
    config = survives(lambda: cls.from_json(fields))
    if config is not None:
        assert cls.from_json(json.loads(json.dumps(vars(config)))) == config


@some
@given(st.dictionaries(st.sampled_from([*vars(NoiseSchedule()), "clip_sample", "trained_betas"]), junk, max_size=4))
def test_schedules_of_any_types(fields: dict) -> None:
    schedule = survives(lambda: NoiseSchedule.from_json(fields))
    if schedule is not None:
        assert len(schedule.alphas_cumprod) == schedule.num_train_timesteps


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", dict(block_out_channels=[2**20] * 2, cross_attention_dim=2**20)),
        ("unet", dict(layers_per_block=10**9)),
        ("unet", dict(block_out_channels=[8] * 10**5)),
        ("unet", dict(transformer_layers_per_block=10**9)),
        ("vae", dict(layers_per_block=10**12)),
        ("text_encoder", dict(num_hidden_layers=10**9)),
        ("text_encoder", dict(vocab_size=2**20, hidden_size=2**20, intermediate_size=2**20)),
    ],
)
def test_giant_networks_are_not_built(folder: Path, tmp_path: Path, part: str, fields: dict) -> None:
    """The numbers of a config are not what the tensors are; that is found without a giant network."""
    model = shutil.copytree(folder, tmp_path / "model")
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    tracemalloc.start()
    with pytest.raises(InputError):
        check_network(model, part)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


@few
@given(st.sampled_from(["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]), damages)
def test_damaged_json_in_a_folder(folder: Path, tmp_path: Path, name: str, changes: list) -> None:
    model = tmp_path / "model"
    if not model.exists():
        shutil.copytree(folder, model)
    whole = (folder / name).read_bytes()
    (model / name).write_bytes(damaged(whole, changes))
    checkpoint = open_checkpoint(model)
    for part in ("unet", "scheduler"):
        survives(functools.partial(checkpoint.config, part))
    (model / name).write_bytes(whole)


@few
@given(junk)
def test_any_value_as_the_json_of_a_folder(folder: Path, tmp_path: Path, value: Any) -> None:
    model = tmp_path / "model"
    if not model.exists():
        shutil.copytree(folder, model)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        whole = (folder / name).read_bytes()
        for text in (json.dumps(value), json.dumps(dict(_class_name=value))):
            (model / name).write_text(text)
            survives(lambda: open_checkpoint(model).config("unet"))
            survives(lambda: NoiseSchedule.from_json(open_checkpoint(model).config("scheduler")))
        (model / name).write_bytes(whole)


# LoRAs

MODULES = ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1")


# Of a model the few weights that the LoRAs below are for.
MODEL = MemoryCheckpoint(
    {
        "unet": (
            dataclasses.asdict(tiny.MICRO_UNET),
            {"mid_block.attentions.0.proj_in.weight": Tensor.of(np.ones((8, 8), np.float32))},
        ),
        "text_encoder": ({}, {"text_model.encoder.layers.0.mlp.fc1.weight": Tensor.of(np.ones((16, 8), np.float32))}),
    }
)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    factors = {}
    for module, (rows, columns) in zip(MODULES, ((8, 8), (16, 8)), strict=True):
        factors[f"{module}.lora_up.weight"] = np.ones((rows, 2), np.float32)
        factors[f"{module}.lora_down.weight"] = np.ones((2, columns), np.float32)
        factors[f"{module}.alpha"] = np.array(1, np.float32)
    return written(tmp_path_factory.mktemp("lora") / "a.safetensors", factors)


@few
@given(damages)
def test_damaged_loras(lora: bytes, tmp_path: Path, changes: list) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(damaged(lora, changes))
    survives(lambda: bake(path))


def test_what_is_damaged_here_can_be_read_whole(lora: bytes, single: Path, tmp_path: Path) -> None:
    """Else nothing but the first check would be tested."""
    (tmp_path / "lora.safetensors").write_bytes(lora)
    bake(tmp_path / "lora.safetensors")
    check_networks(single)
    (tmp_path / "a.msgpack").write_bytes(FLAX)
    assert len(open_flax(tmp_path / "a.msgpack").tensors) == 3


@some
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from([*MODULES, "unet.conv_in", "text_encoder.x", "", "lora_unet_conv_in"]),
            st.sampled_from(["lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "lora_A.weight",
                             "lora_B.weight", "dora_scale", ""]),
        ).map(".".join),
        st.tuples(st.lists(st.integers(0, 9), max_size=5), st.sampled_from(["<f4", "<f2", "<i8", "?"])),
        max_size=6,
    )
)  # fmt: skip
def test_invented_loras(tmp_path: Path, tensors: dict) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"".join(_chunks({name: np.zeros(shape, dtype) for name, (shape, dtype) in tensors.items()}, {})))
    survives(lambda: bake(path))


def bake(lora: Path) -> None:
    baked = with_loras(MODEL, [(lora, 0.5)])
    for part in ("unet", "text_encoder"):
        for tensor in baked.tensors(part).values():
            tensor.read()


# Flax files


def read_flax(path: Path) -> None:
    for tensor in open_flax(path).tensors.values():
        tensor.read()


FLAX = msgpack_serialize(
    {
        "conv_in": {"kernel": np.ones((3, 3, 1, 2), np.float32), "bias": np.zeros(2, np.float16)},
        "down_blocks_0": {"resnets_1": {"norm1": {"scale": np.ones(2, np.float32)}}},
    }
)


@many
@given(damages)
def test_damaged_flax_files(tmp_path: Path, changes: list) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(damaged(FLAX, changes))
    survives(lambda: read_flax(path))


@many
@given(st.lists(st.sampled_from([0x81, 0x91, 0xC7, 0xC9, 0xD8, 0xDD, 0xDF, 0xDB, 0xC6, 1, 0xFF, 0, 0x7F, 0xA1, 97])))
def test_invented_flax_files(tmp_path: Path, codes: list[int]) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(bytes(codes))
    survives(lambda: read_flax(path))


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 10**6,
        b"\x81\xa1a" * 10**5,
        b"\xdd\xff\xff\xff\xff" + b"\x91" * 100,
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xdd\x00\x0f\x42\x40" + b"\x00" * 10**6,
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=range(7),
)
def test_flax_files_made_to_break_parsers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(data)
    assert survives(lambda: read_flax(path)) is None


# Single files and shards


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of a text encoder alone, to be quick."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(path, MemoryCheckpoint.of(text_encoder=tiny.text_encoder(0)))
    return path


@few
@given(damages)
def test_damaged_single_files(single: Path, tmp_path: Path, changes: list) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damaged(single.read_bytes(), changes))
    survives(lambda: check_networks(path))


@few
@given(st.data())
def test_single_files_with_other_tensors_and_configs(single: Path, tmp_path: Path, data: st.DataObject) -> None:
    file = open_tensors(single)
    tensors: dict[str, Any] = dict(file.tensors)
    names = st.sampled_from(sorted(tensors))
    shapes = st.lists(st.integers(0, 8), max_size=5)
    for name in data.draw(st.lists(names, max_size=3)):
        tensors[name] = np.zeros(data.draw(shapes), np.float16)
    for name in data.draw(st.lists(names, max_size=3)):
        tensors.pop(name, None)
    configs = json.loads(file.metadata[SAID])
    part = data.draw(st.sampled_from(sorted(configs)))
    for field in data.draw(st.lists(st.sampled_from(sorted(configs[part])), max_size=2)):
        configs[part][field] = data.draw(junk)
    said = data.draw(st.sampled_from([json.dumps(configs), None]) | junk.map(json.dumps))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(_chunks(tensors, {} if said is None else {SAID: said})))
    survives(lambda: check_networks(path))


@some
@given(st.data())
def test_any_value_as_an_index_of_shards(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "unet").mkdir(exist_ok=True)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "secret.safetensors").write_bytes(EMPTY)
    (tmp_path / "unet" / "part.safetensors").write_bytes(EMPTY)
    files = st.sampled_from(["part.safetensors", "../secret.safetensors", "/etc/passwd", "", ".", "a\0b", "x" * 5000])
    weight_map = st.dictionaries(st.sampled_from(["a", "b", ""]), files | junk, max_size=3) | junk
    index = data.draw(junk | st.fixed_dictionaries(dict(weight_map=weight_map, metadata=junk)))
    path.write_text(json.dumps(index))
    survives(lambda: open_checkpoint(tmp_path).tensors("unet"))


EMPTY = (8).to_bytes(8, "little") + b"{}      "


# The command line


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\xff" * 100, EMPTY, EMPTY[:9], (10**6).to_bytes(8, "little") + b"{}", b"PK\x03\x04" * 10],
    ids=range(7),
)
def test_the_command_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "a\nb.safetensors"
    path.write_bytes(content)
    for arguments in ([str(path), "--out", str(tmp_path / "out")], ["--inspect", str(path)]):
        status = run(convert.main, arguments)
        printed, error = capsys.readouterr()
        if content == EMPTY and "--inspect" in arguments:
            assert status == 0 and "a file without tensors" in printed
        else:
            assert status == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "out").exists()
