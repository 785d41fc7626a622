"""LoRAs baked in: diffusers' numbers, every tool's spelling, and a refusal for whatever cannot be baked in."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.formats.folders import FolderCheckpoint, write_folder
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.lora.baked import with_loras
from afa_jax.weights.lora.files import read_lora
from afa_jax.weights.lora.names import find_places
from afa_jax.weights.tensors import Tensor, WeightsError, read_tensors, write_tensors
from tests.models import goldens
from tests.reference.loras import factors, lora_file
from tests.reference.weights import random_state_dict

RECORD = goldens.record("lora")
SHAPES = {
    f"{name}.{key.removesuffix('.weight')}": shape
    for name in ("unet", "text_encoder")
    for key, shape in RECORD[name]["parameters"].items()
}
BLOCK, LAYER = "attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers.0"
QUERY, CONV = f"unet.mid_block.{BLOCK}.attn1.to_q", "unet.down_blocks.0.downsamplers.0.conv"
TEXT = f"{LAYER}.self_attn.q_proj"
OUT = (f"unet.mid_block.{BLOCK}.attn1.to_out.0", f"{LAYER}.self_attn.out_proj")
KOHYA = {module: f"lora_unet_{module[5:]}".replace(".", "_") for module in (QUERY, CONV, OUT[0])}


def model(dtype=np.float32, changes=None):
    """The golden U-Net and text encoder before any LoRA."""
    states = {}
    for name in ("unet", "text_encoder"):
        prefix = "" if name == "unet" else "text_model."
        shapes = {key.removeprefix(prefix): shape for key, shape in RECORD[name]["parameters"].items()}
        arrays = {prefix + key: value for key, value in random_state_dict(f"lora/{name}", shapes).items()}
        arrays = {key: array.astype(dtype) for key, array in arrays.items()} | (changes or {}).get(name, {})
        states[name] = RECORD[name]["config"], {key: Tensor.of(array) for key, array in arrays.items()}
    return MemoryCheckpoint(states, metadata={"kept": "yes"})


MODEL = model()


def weights(checkpoint):
    return {
        f"{name}.{key}": np.asarray(tensor)
        for name in checkpoint.components
        for key, tensor in checkpoint.tensors(name).items()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert array.dtype == other[key].dtype
        np.testing.assert_array_equal(array, other[key], err_msg=key)


def write(path, layout="kohya", modules=(QUERY, CONV, TEXT), rank=3, alpha=3, metadata=None, **names):
    """A LoRA file whose numbers depend on the modules alone."""
    tensors, own = lora_file("one", layout, dict.fromkeys(modules, (rank, alpha)), SHAPES, names)
    write_tensors(path, tensors, own if metadata is None else metadata)
    return path


def change(path, function):
    tensors = read_tensors(path)
    function(tensors)
    write_tensors(path, tensors)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "style.safetensors"


# What is computed


@pytest.mark.parametrize("file", RECORD["loras"])
def test_diffusers_fuses_the_same_weights(path, file):
    case = RECORD["loras"][file]
    write_tensors(path, *lora_file(file, case["layout"], case["modules"], SHAPES, case["names"]))
    # As they are stored: goldens.reference would turn pictures, and convolutions, to NHWC.
    expected = {
        key: value
        for key, value in read_tensors(goldens.GOLDENS / "lora.safetensors").items()
        if key.startswith(f"{file}/")
    }
    found = weights(with_loras(MODEL, [(path, case["scale"])]))
    before = weights(MODEL)
    assert {key for key in found if not np.array_equal(found[key], before[key])} == {
        key.removeprefix(f"{file}/") for key in expected
    }
    assert len(expected) == len(case["modules"])
    for key, value in expected.items():
        np.testing.assert_allclose(found[key.removeprefix(f"{file}/")], value, rtol=0, atol=5e-7, err_msg=key)


@settings(max_examples=50)
@given(st.data())
def test_the_dense_formula(tmp_path_factory, data):
    """W + weight * alpha / rank * up @ down, for linear layers and convolutions, whichever way 1x1 ones are stored."""
    size = st.integers(1, 6)
    out, rank, width = data.draw(size), data.draw(size), data.draw(size)
    kernel = data.draw(st.sampled_from([(), (1, 1), (3, 3), (1, 3)]))
    pixels = data.draw(st.booleans()) if kernel in ((), (1, 1)) else True
    alpha, weight = data.draw(st.none() | st.floats(0.5, 8)), data.draw(st.floats(-2, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w, up, down = (
        rng.standard_normal(s).astype(np.float32) for s in ((out, width, *kernel), (out, rank), (rank, width, *kernel))
    )
    base = MemoryCheckpoint({"unet": (MODEL.config("unet"), {"conv_in.weight": Tensor.of(w)})})
    tensors = {
        "lora_unet_conv_in.lora_up.weight": up[:, :, None, None] if pixels else up,
        "lora_unet_conv_in.lora_down.weight": down
        if kernel == (3, 3) or kernel == (1, 3)
        else down.reshape(rank, width, *((1, 1) if pixels else ())),
    }
    if alpha is not None:
        tensors["lora_unet_conv_in.alpha"] = np.array(alpha, np.float32)
    path = tmp_path_factory.getbasetemp() / "dense.safetensors"
    write_tensors(path, tensors)
    scale = weight * (1 if alpha is None else np.float32(alpha) / rank)
    dense = np.einsum("or,r...->o...", up.astype(np.float64), down.astype(np.float64))
    found = np.asarray(with_loras(base, [(path, weight)]).tensors("unet")["conv_in.weight"])
    np.testing.assert_allclose(found, w + scale * dense, rtol=1e-5, atol=1e-5)


def test_a_mid_is_a_convolution_between_the_two(path):
    """CP (Tucker) decomposition: the baked kernel does what down, mid and up do one after another."""
    rng = np.random.default_rng(0)
    w, up, mid, down, picture = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((5, 4, 3, 3), (5, 2, 1, 1), (2, 2, 3, 3), (2, 4, 1, 1), (1, 4, 6, 6))
    )
    names = {"up": up, "mid": mid, "down": down}
    tensors = {f"lora_unet_conv_in.lora_{name}.weight": array for name, array in names.items()}
    write_tensors(path, tensors | {"lora_unet_conv_in.alpha": np.array([1], np.float16)})
    base = MemoryCheckpoint({"unet": (MODEL.config("unet"), {"conv_in.weight": Tensor.of(w)})})
    found = np.asarray(with_loras(base, [(path, 1)]).tensors("unet")["conv_in.weight"])

    def convolve(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "SAME", precision="highest")

    expected = convolve(picture, w) + convolve(convolve(convolve(picture, down), mid), up) / 2
    np.testing.assert_allclose(convolve(picture, found), expected, atol=2e-5)


def test_several_add_up_in_any_order(tmp_path):
    one = write(tmp_path / "a.safetensors")
    tensors, _ = lora_file("two", "kohya", {QUERY: (2, 1.0)}, SHAPES)
    write_tensors(tmp_path / "b.safetensors", tensors)
    pairs = [(one, 0.5), (tmp_path / "b.safetensors", -1.5)]
    key = f"{QUERY}.weight"
    there, back = (weights(with_loras(MODEL, order))[key] for order in (pairs, pairs[::-1]))
    np.testing.assert_allclose(there, back, atol=1e-6)
    ups, downs = zip(factors("one", QUERY, SHAPES[QUERY], 3), factors("two", QUERY, SHAPES[QUERY], 2), strict=True)
    expected = weights(MODEL)[key] + 0.5 * ups[0] @ downs[0] - 1.5 / 2 * ups[1] @ downs[1]
    np.testing.assert_allclose(there, expected, atol=1e-6)
    twice = weights(with_loras(MODEL, [(one, 1), (one, 1.0)]))[key]
    np.testing.assert_allclose(twice, weights(with_loras(MODEL, [(one, 2)]))[key], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("of_lora", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_rounded_once(path, dtype, of_lora):
    write(path)
    change(path, lambda tensors: tensors.update({key: value.astype(of_lora) for key, value in tensors.items()}))
    half = model(dtype)
    exact = model(
        changes={
            name: {k: np.asarray(t, np.float32) for k, t in half.tensors(name).items()} for name in half.components
        }
    )
    baked = weights(with_loras(half, [(path, 0.3)]))
    expected = {key: array.astype(baked[key].dtype) for key, array in weights(with_loras(exact, [(path, 0.3)])).items()}
    assert_same(baked, expected)
    # 8 bits would round most of a LoRA away; what it does not touch stays as small as it was.
    changed = np.float16 if np.dtype(dtype).itemsize == 1 else dtype
    assert (baked[f"{QUERY}.weight"].dtype, baked["unet.conv_in.weight"].dtype) == (changed, dtype)


def test_what_no_lora_touches_is_the_models_own(path):
    baked = with_loras(MODEL, [(write(path, modules=[QUERY]), 1)])
    for name in MODEL.components:
        for key, tensor in baked.tensors(name).items():
            assert (tensor is MODEL.tensors(name)[key]) == (f"{name}.{key}" != f"{QUERY}.weight")


def test_weight_0_is_the_model_and_checked_all_the_same(path):
    assert with_loras(MODEL, []) is MODEL
    assert with_loras(MODEL, [(write(path), 0)]) is MODEL
    change(
        path,
        lambda tensors: tensors.update({"lora_unet_x.lora_up.weight": tensors.pop(f"{KOHYA[QUERY]}.lora_up.weight")}),
    )
    with pytest.raises(WeightsError, match="incomplete"):
        with_loras(MODEL, [(path, 0)])


def test_only_what_is_asked_for_is_read(path, monkeypatch):
    reads: list[str] = []

    def watched(name, tensor):
        def read():
            reads.append(name)
            return tensor.read()

        return Tensor(tensor.shape, tensor.dtype, read)

    base = MemoryCheckpoint(
        {
            n: (MODEL.config(n), {k: watched(f"{n}.{k}", t) for k, t in MODEL.tensors(n).items()})
            for n in MODEL.components
        }
    )
    write(path)
    mapped, memmap = [], np.memmap

    def watched_map(*args, **kwargs):
        mapped.append(kwargs["shape"])
        return memmap(*args, **kwargs)

    monkeypatch.setattr(np, "memmap", watched_map)
    baked = with_loras(base, [(path, 1)])
    assert reads == [] and set(mapped) <= {(4,)}  # the alphas
    mapped.clear()
    tensor = baked.tensors("unet")[f"{QUERY[5:]}.weight"]
    assert reads == [] and mapped == []
    np.asarray(tensor)
    assert reads == [f"{QUERY}.weight"]
    assert sorted(mapped) == [(3 * 16 * 4,)] * 2


# How it is spelled


def spelled(layout, *pairs):
    """Writes a file whose keys have patterns replaced, and which says no alpha but kohya's."""

    def spell(path, modules):
        write(path, layout, modules)
        replaced = read_tensors(path)
        for pattern, new in pairs:
            replaced = {re.sub(pattern, new, key): value for key, value in replaced.items()}
        write_tensors(path, replaced)
        return path

    return spell


SPELLINGS = {
    "kohya": spelled("kohya"),
    "kohya, te1": spelled("kohya", ("lora_te_", "lora_te1_")),
    "kohya, LDM": spelled(
        "kohya",
        (r"unet_mid_block_attentions_0", "unet_middle_block_1"),
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_2_0_op"),
    ),
    "ComfyUI": spelled(
        "peft",
        (r"^unet.mid_block.attentions.0", "diffusion_model.middle_block.1"),
        (r"^unet.down_blocks.0.downsamplers.0.conv", "diffusion_model.input_blocks.2.0.op"),
    ),
    "OneTrainer": spelled("peft", ("lora_A", "lora_down"), ("lora_B", "lora_up")),
    "PEFT": spelled("peft"),
    "PEFT, text_model": spelled("peft", ("text_encoder.", "text_encoder.text_model.")),
    "PEFT, no component": spelled("peft", ("^(unet|text_encoder).", "")),
    "PEFT, adapter named": spelled("peft", ("lora_([AB])", r"lora_\1.default")),
    "diffusers 0.22": spelled(
        "peft",
        (r"(unet.*).lora_A", r"\1.lora.down"),
        (r"(unet.*).lora_B", r"\1.lora.up"),
        (r"lora_A", "lora_linear_layer.down"),
        (r"lora_B", "lora_linear_layer.up"),
    ),
}
PROCESSORS = {
    "diffusers 0.17": spelled("old"),
    "diffusers 0.15": spelled(
        "old", ("q_proj.lora_linear_layer", "to_q_lora"), ("out_proj.lora_linear_layer", "to_out_lora")
    ),
    "attention processors": spelled("old", ("^unet.", "")),
}


@pytest.mark.parametrize("spelling", SPELLINGS | PROCESSORS)
def test_every_spelling_bakes_to_the_same_bits(tmp_path, spelling):
    modules = [QUERY, TEXT, *OUT] if spelling in PROCESSORS else [QUERY, CONV, TEXT, *OUT]
    expected = weights(with_loras(MODEL, [(write(tmp_path / "kohya.safetensors", modules=modules), 0.8)]))
    path = (SPELLINGS | PROCESSORS)[spelling](tmp_path / "other.safetensors", modules)
    assert_same(weights(with_loras(MODEL, [(path, 0.8)])), expected)


def full_unet(version):
    """The real U-Net's architecture and shapes."""
    config = UNetConfig.from_json(
        json.loads((goldens.GOLDENS / "configs" / version / "unet" / "config.json").read_text())
    )
    unet = goldens.abstract(lambda rngs: UNet(config, rngs=rngs))
    return config, MemoryCheckpoint.of(unet=unet).tensors("unet")


@pytest.mark.parametrize("version", ["sd15", "sd21"])
def test_names_are_unambiguous_on_the_real_unet(version):
    """Every layer under its own name, none hidden by another one's spelling."""
    config, tensors = full_unet(version)
    places = find_places({"unet": tensors}, config)
    layers = [key.removesuffix(".weight") for key, t in tensors.items() if len(t.shape) > 1]
    for layer in layers:
        for name in (layer, f"unet.{layer}", f"lora_unet_{layer.replace('.', '_')}"):
            assert places[name] == ("unet", f"{layer}.weight")
    ldm = re.compile(r"lora_unet_((in|out)put_blocks|middle_block|out|time_embed)_\d.*(?<!to_out)")
    found = {name: place for name, place in places.items() if ldm.fullmatch(name)}
    assert len(found) == len(layers) == len({*found.values()})
    known = {
        "time_embed_2": "time_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_8_1_proj_out": "down_blocks.2.attentions.1.proj_out",
        "input_blocks_11_0_out_layers_3": "down_blocks.3.resnets.1.conv2",
        "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
        "middle_block_1_transformer_blocks_0_ff_net_2": f"mid_block.{BLOCK}.ff.net.2",
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_6_1_transformer_blocks_0_attn1_to_out_0": f"up_blocks.2.{BLOCK}.attn1.to_out.0",
        "output_blocks_11_0_emb_layers_1": "up_blocks.3.resnets.2.time_emb_proj",
        "out_2": "conv_out",
    }
    assert {name: places[f"lora_unet_{name}"][1].removesuffix(".weight") for name in known} == known


# Where alpha comes from


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1),
        ({"lora_alpha": 6}, 2),
        ({"lora_alpha": 6, "alpha_pattern": {QUERY[5:]: 1.5}}, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1.5}}, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"^attn1.to_q": 1.5, "to_k": 9}}, 2),
        ({"lora_alpha": 6, "alpha_pattern": {f"^{QUERY[5:]}": 1.5, "to_q": 9}}, 0.5),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
    ],
)
@pytest.mark.parametrize("where", ["unet.", "", "adapter_config.json"])
def test_peft_says_its_alpha(path, fields, scale, where):
    if where == "adapter_config.json":
        fields = {"lora_alpha": 3} | fields  # PEFT always writes one
        (path.parent / where).write_text(json.dumps(dict(peft_type="LORA", r=3) | fields))
        spelled("peft", ("^unet.", "base_model.model."))(path, [QUERY])
    else:
        metadata = (
            {"lora_adapter_metadata": json.dumps({where + key: value for key, value in fields.items()})}
            if fields
            else {}
        )
        write(path, "peft", [QUERY], metadata=metadata)
    (found,) = read_lora(path).changes.values()
    assert found.scale == pytest.approx(scale)


@pytest.mark.parametrize("key", [f"{KOHYA[QUERY]}.alpha", f"{QUERY}.alpha"])
def test_an_alpha_tensor_is_first(path, key):
    write(path, "kohya" if key.startswith("lora") else "peft", [QUERY])
    change(path, lambda tensors: tensors.update({key: np.array(6, np.int64)}))
    (found,) = read_lora(path).changes.values()
    assert found.scale == 2


# What it says about itself


def test_hash_and_metadata_name_the_loras(path):
    write(path, modules=[QUERY])
    baked, other = with_loras(MODEL, [(path, 0.5)]), with_loras(MODEL, [(path, 0.25)])
    assert baked.sha256("text_encoder") == MODEL.sha256("text_encoder")
    assert len({baked.sha256("unet"), other.sha256("unet"), MODEL.sha256("unet")}) == 3
    assert baked.sha256("unet") == with_loras(MODEL, [(str(path), 0.5)]).sha256("unet")
    entry = dict(name="style.safetensors", sha256=read_lora(path).sha256, weight=0.5)
    assert {**baked.metadata, "afa_jax.loras": json.loads(baked.metadata["afa_jax.loras"])} == {
        "kept": "yes",
        "afa_jax.loras": [entry],
    }
    again = json.loads(with_loras(baked, [(path, 0.25)]).metadata["afa_jax.loras"])
    assert again == [entry, entry | {"weight": 0.25}]
    for strange in ("{", "{}", "[" * 100_000):
        base = MemoryCheckpoint(MODEL.states, metadata={"afa_jax.loras": strange})
        assert json.loads(with_loras(base, [(path, 0.5)]).metadata["afa_jax.loras"]) == [entry]
    for component in MODEL.components:
        assert baked.config(component) == MODEL.config(component)
        assert baked.what(component) == MODEL.what(component)
    assert (baked.path, baked.components, baked.tokenizer) == (MODEL.path, MODEL.components, MODEL.tokenizer)
    before = baked.sha256("unet")
    change(path, lambda tensors: tensors.update({f"{KOHYA[QUERY]}.alpha": np.array(1, np.float32)}))
    assert with_loras(MODEL, [(path, 0.5)]).sha256("unet") != before


def test_a_baked_folder_is_written_and_loaded(path, tmp_path):
    write_folder(tmp_path / "plain", MODEL)
    baked = with_loras(FolderCheckpoint(tmp_path / "plain"), [(write(path, modules=[CONV, TEXT]), 1)])
    write_folder(tmp_path / "baked", baked)
    assert "afa_jax.loras" in FolderCheckpoint(tmp_path / "baked").metadata
    for load in (load_unet, load_text_encoder):
        sources = baked, FolderCheckpoint(tmp_path / "baked"), MODEL
        one, other, plain = (jax.tree.leaves(load(source)) for source in sources)
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert sum(not np.array_equal(a, b) for a, b in zip(one, plain, strict=True)) == 1


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_a_folder_is_a_lora(tmp_path, name):
    folder = tmp_path / "style"
    file = write(folder / name)
    assert read_lora(folder).path == file
    metadata = with_loras(MODEL, [(folder, 1)]).metadata
    assert json.loads(metadata["afa_jax.loras"])[0]["name"] == "style"
    shutil.move(file, file.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=rf"^{file.with_suffix('.bin')}: pickled weights are refused"):
        read_lora(folder)
    file.with_suffix(".bin").unlink()
    with pytest.raises(WeightsError, match=rf"^{folder}: neither pytorch_lora_weights.safetensors nor .* is there"):
        read_lora(folder)


# What is refused


def put(key, shape=(3, 16), module=None):
    def function(tensors):
        tensors[f"{KOHYA[QUERY] if module is None else module}{key}"] = np.zeros(shape, np.float32)

    return function


def drop(key):
    return lambda tensors: tensors.pop(f"{KOHYA[QUERY]}{key}")


def fill(key, value):
    return lambda tensors: tensors[f"{KOHYA[QUERY]}{key}"].fill(value)


def both(module, up, down):
    def function(tensors):
        tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"] = (
            np.zeros(up, np.float32),
            np.zeros(down, np.float32),
        )

    return function


REFUSED = {
    "no key": (lambda tensors: tensors.clear(), "no LoRA in it, this is a file without tensors"),
    "factors without a matrix's name": (
        lambda t: (t.clear(), put(".lora_down", module=KOHYA[QUERY])(t)),
        rf"a LoRA without pairs of MODULE.lora_up.weight and .*1 unmatched \({KOHYA[QUERY]}\.lora_down",
    ),
    "another model": (
        lambda t: (t.clear(), put(".weight", module="conv_in")(t)),
        r"no LoRA in it, this is no model that is known here \(it has conv_in\.weight\)",
    ),
    "LoHa": (put(".hada_w1_a"), rf"LoHa \(1 keys \({KOHYA[QUERY]}\.hada_w1_a\)\) is not supported; bake it in with"),
    "LoKr": (put(".lokr_w1"), "LoKr"),
    "OFT": (put(".oft_blocks"), "OFT"),
    "DoRA": (put(".dora_scale"), "DoRA"),
    "DoRA, PEFT": (put(f"{QUERY}.lora_magnitude_vector", module=""), "DoRA"),
    "GLoRA": (put(".a1.weight"), "GLoRA"),
    "IA3": (put(".on_input"), r"\(IA\)\^3"),
    "full": (put(".diff"), "whole differences"),
    "bias": (put(f"{QUERY}.lora_B.bias", module=""), "LoRA with biases"),
    "embeddings": (put("bundle_emb.me.string_to_param.*", module=""), "textual inversion embeddings"),
    "embedding file": (put("emb_params", module=""), "textual inversion embeddings"),
    "strange": (put(".scalar"), rf"1 unmatched \({KOHYA[QUERY]}\.scalar\)"),
    "twice the same": (put(".lora_A.weight"), rf"1 unmatched \({KOHYA[QUERY]}\.lora_"),
    "up alone": (drop(".lora_down.weight"), rf"1 incomplete \({KOHYA[QUERY]} has no down\)"),
    "down alone": (drop(".lora_up.weight"), rf"1 incomplete \({KOHYA[QUERY]} has no up\)"),
    "alpha alone": (put(".alpha", (), "lora_unet_conv_in"), "2 incomplete"),
    "alphas": (put(".alpha", (2,)), rf"alpha of {KOHYA[QUERY]} is \(2,\), not one number"),
    "alpha nan": (fill(".alpha", np.nan), rf"alpha of {KOHYA[QUERY]} is nan"),
    "rank 0": (both(KOHYA[QUERY], (16, 0), (0, 16)), r"down of .* is float32 \(0, 16\), not a LoRA's factor"),
    "no matrix": (put(".lora_down.weight", (16,)), r"down of .* is float32 \(16,\), not a LoRA's factor"),
    "integers": (
        lambda t: t.update({f"{KOHYA[QUERY]}.lora_up.weight": np.zeros((16, 3), np.int8)}),
        r"up of .* is int8 \(16, 3\), not a LoRA's factor",
    ),
    "unknown": (
        lambda t: [both(f"lora_unet_nowhere_{i:02}", (16, 3), (3, 16))(t) for i in range(20)],
        r"20 unmatched \(lora_unet_nowhere_00, .*_04 and 15 more\), which the model does not have$",
    ),
    "a norm": (both("lora_unet_conv_norm_out", (8, 3), (3, 8)), r"1 unmatched \(lora_unet_conv_norm_out\)"),
    "SDXL": (both("lora_te2_text_model_x", (16, 3), (3, 16)), r"does not have; it was made for SDXL$"),
    "Flux": (both("lora_unet_double_blocks_0_img_attn_proj", (16, 3), (3, 16)), r"it was made for Flux$"),
    "SD3": (both("transformer.x", (16, 3), (3, 16)), r"it was made for a diffusion transformer"),
    "two names": (
        both("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", (16, 3), (3, 16)),
        "2 names for the same weights",
    ),
    "misshapen": (
        both(KOHYA[QUERY], (16, 3), (3, 8)),
        rf"1 misshapen \({KOHYA[QUERY]}: up \(16, 3\), down \(3, 8\) on \(16, 16\)\)$",
    ),
    "ranks differ": (put(".lora_down.weight", (2, 16)), "1 misshapen"),
    "mid on a linear layer": (put(".lora_mid.weight", (3, 3, 3, 3)), r"mid \(3, 3, 3, 3\) on \(16, 16\)"),
    "SD2": (
        both(f"lora_unet_mid_block_{BLOCK}_attn2_to_k".replace(".", "_"), (16, 3), (3, 1024)),
        r"misshapen .*; it was made for SD2\.x: its text states are 1024 wide, this model's 32$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_baked_in_is_refused(path, case):
    spoil, message = REFUSED[case]
    change(write(path), spoil)
    with pytest.raises(WeightsError, match=rf"^{path}: .*{message}") as caught:
        with_loras(MODEL, [(path, 1)])
    assert "\n" not in str(caught.value)


def test_a_network_that_the_model_lacks_is_named(path):
    base = MemoryCheckpoint({"unet": (MODEL.config("unet"), MODEL.tensors("unet"))})
    with pytest.raises(
        WeightsError, match=r"1 unmatched \(lora_te_.*q_proj\), which the model \(no text_encoder in it\)"
    ):
        with_loras(base, [(write(path), 1)])


@pytest.mark.parametrize("name", ["style.pt", "style.ckpt", "nothing.safetensors"])
def test_other_files_are_refused(tmp_path, name):
    with pytest.raises(WeightsError, match=rf"^{tmp_path / name}: (pickled weights are refused|no such file)"):
        with_loras(MODEL, [(tmp_path / name, 1)])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(path, weight):
    with pytest.raises(WeightsError, match=rf"^{path}: the LoRA's weight is {weight}"):
        with_loras(MODEL, [(write(path), weight)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no such file; it says the alpha of style.safetensors"),
        ("{", "not readable as JSON"),
        ('{"peft_type": "LOHA"}', "LOHA is not supported"),
        ('{"use_dora": true, "lora_alpha": 1}', "DoRA is not supported"),
        ('{"init_lora_weights": "pissa_niter_4", "lora_alpha": 1}', "pissa_niter_4, which changes the model itself"),
        ("{}", "lora_alpha of .* is None"),
        ('{"lora_alpha": "3"}', "lora_alpha of .* is '3'"),
        ('{"lora_alpha": NaN}', "alpha of .* is nan"),
        ('{"lora_alpha": 1' + 400 * "0" + "}", "alpha of .* is inf"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}', r"alpha_pattern '\(a\+\)\+\$' is no module's name"),
    ],
)
def test_peft_configs_that_cannot_be_used_are_refused(path, config, message):
    spelled("peft", ("^unet.", "base_model.model."))(path, [QUERY])
    if config is not None:
        (path.parent / "adapter_config.json").write_text(config)
    with pytest.raises(WeightsError, match=rf"^{path.parent}/(style\.safetensors|adapter_config\.json): .*{message}"):
        read_lora(path)


def test_metadata_that_leaves_a_network_out_is_refused(path):
    write(path, "peft", [QUERY, TEXT], metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 3}'})
    with pytest.raises(WeightsError, match=rf"^{path}: lora_alpha of encoder.*q_proj is None in PEFT's config"):
        read_lora(path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_metadata_that_is_no_config_is_refused(path, text):
    with pytest.raises(WeightsError, match=rf"^{path}: its lora_adapter_metadata is not a JSON object"):
        read_lora(write(path, "peft", metadata={"lora_adapter_metadata": text}))


@pytest.mark.parametrize("factor", ["up", "down"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_refused_when_read(path, factor, value):
    change(write(path), fill(f".lora_{factor}.weight", value))
    baked = with_loras(MODEL, [(path, 1)])
    with pytest.raises(WeightsError, match=rf"^{path}: {factor} of {KOHYA[QUERY]} holds NaN or infinity"):
        np.asarray(baked.tensors("unet")[f"{QUERY[5:]}.weight"])
    np.asarray(baked.tensors("unet")[f"{CONV[5:]}.weight"])


def test_a_model_that_is_not_finite_is_not_blamed_on_the_lora(path):
    key = f"{QUERY[5:]}.weight"
    base = model(changes={"unet": {key: np.full((16, 16), np.nan, np.float32)}})
    with pytest.raises(WeightsError, match=rf"^a model in memory \(unet\): {key} holds NaN"):
        np.asarray(with_loras(base, [(write(path), 1)]).tensors("unet")[key])


@pytest.mark.parametrize(("dtype", "weight"), [(np.float16, 1e20), (np.float32, 1e39)])
def test_too_large_a_result_is_refused(path, dtype, weight):
    baked = with_loras(model(dtype), [(write(path), weight)])
    with pytest.raises(WeightsError, match=rf"{QUERY[5:]}.weight is too large for float\d\d with {path} at 1e\+"):
        np.asarray(baked.tensors("unet")[f"{QUERY[5:]}.weight"])


FRAGMENTS = [
    "lora_unet_",
    "lora_te_",
    "unet.",
    "conv_in",
    "mid_block",
    ".",
    "_",
    "attn1",
    "to_q",
    "lora_up",
    "lora_A",
    "lora",
    "up",
    ".weight",
    ".alpha",
    "\n",
]


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.lists(
            st.sampled_from(
                [
                    *FRAGMENTS,
                    *(
                        f"{KOHYA[CONV]}{end}"
                        for end in (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha")
                    ),
                ]
            ),
            min_size=1,
            max_size=4,
        ).map("".join),
        st.tuples(st.lists(st.integers(0, 9), max_size=5), st.sampled_from([np.float32, np.float16, np.int8])),
        max_size=6,
    ),
    st.none()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.dictionaries(
            st.sampled_from(["unet.lora_alpha", "lora_alpha", "alpha_pattern", "peft_type", ""]), inner
        ),
    ),
)
def test_any_file_is_baked_in_or_refused(tmp_path_factory, keys, config):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    write_tensors(path, {key: np.ones(shape, dtype) for key, (shape, dtype) in keys.items()}, metadata)
    with contextlib.suppress(WeightsError):
        weights(with_loras(MODEL, [(path, 1)]))
