"""Single files: what is written comes back, real keys are known, and whatever is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.architectures import different_architectures
from afa_jax.models.clip import TextEncoder
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import ConfigError, TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.trees import take
from afa_jax.weights.checkpoint import NETWORKS, MemoryCheckpoint
from afa_jax.weights.description import describe
from afa_jax.weights.expected import expected_shapes
from afa_jax.weights.formats.families import family_of
from afa_jax.weights.formats.folders import write_folder
from afa_jax.weights.formats.ldm_configs import found_config
from afa_jax.weights.formats.ldm_keys import ema_key, ldm_shape, ldm_table
from afa_jax.weights.formats.single_file import CONFIGS, SingleFileCheckpoint, write_single_file
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.opened import check_networks, open_checkpoint, text_config, unet_config, vae_config
from afa_jax.weights.tensors import Tensor, WeightsError, read_metadata, read_tensors, write_tensors
from tests import tiny
from tests.models import goldens
from tests.reference.weights import random_input
from tests.reference.write_single_files import DTYPES, checkpoint

CLASSES: dict[str, Any] = dict(unet=UNetConfig, vae=VAEConfig, text_encoder=TextConfig)
# Of both families, with the heads and groups that published models of these widths would have.
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNET1 = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=(CROSS, PLAIN),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=64,
)
UNET2 = dataclasses.replace(
    UNET1,
    block_out_channels=(64, 128),
    attention_head_dim=(1, 2),
    use_linear_projection=True,
    upcast_attention=True,
)
VAE_CONFIG = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
TEXT1 = TextConfig(
    vocab_size=20,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=8,
)
TEXT2 = dataclasses.replace(TEXT1, hidden_act="gelu")
CONFIG = {
    "sd1": dict(unet=UNET1, vae=VAE_CONFIG, text_encoder=TEXT1),
    "sd2": dict(unet=UNET2, vae=VAE_CONFIG, text_encoder=TEXT2),
}
SCHEDULER = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", prediction_type="v_prediction")
MARK = "model.diffusion_model.input_blocks.0.0.weight"


def module(config, seed=0):
    create = {UNetConfig: UNet, VAEConfig: VAE, TextConfig: TextEncoder}[type(config)]
    return tiny.randomised(jax.eval_shape(lambda: create(config, rngs=nnx.Rngs(0))), seed)


@pytest.fixture(scope="module")
def models():
    def model(configs):
        return MemoryCheckpoint.of(**{name: module(config) for name, config in configs.items()}, scheduler=SCHEDULER)

    return {name: model(configs) for name, configs in CONFIG.items()}


@pytest.fixture(scope="module")
def ours(models, tmp_path_factory):
    """The tensors of both files as we write them."""
    folder = tmp_path_factory.mktemp("ours")
    for name, model in models.items():
        write_single_file(folder / f"{name}.safetensors", model)
    return {name: read_tensors(folder / f"{name}.safetensors") for name in models}


@pytest.fixture
def foreign(ours, tmp_path):
    """Write a file as others do, without our metadata: ``foreign("sd1", changes)``; None takes a tensor out."""

    def write(name, changes=None, metadata=None, **options):
        tensors = ours[name] | (changes or {})
        path = tmp_path / "model.safetensors"
        write_tensors(path, {key: value for key, value in tensors.items() if value is not None}, metadata)
        return SingleFileCheckpoint(path, **options)

    return write


def only(tensors, *prefixes):
    return {key: None for key in tensors if not key.startswith(prefixes)}


def assert_same(found, expected, dtype=None):
    """Bit for bit, names and dtypes included."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        array = np.asarray(tensor)
        array = array if dtype is None else array.astype(dtype)
        read = np.asarray(found[key])
        assert (read.dtype, read.shape) == (array.dtype, array.shape) == (found[key].dtype, found[key].shape), key
        assert read.tobytes() == array.tobytes(), key


def assert_same_config(one, other):
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(other))


# What is written comes back


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reading_writing_reading_is_bit_identical(tmp_path, models, name, dtype):
    one, two = tmp_path / "one.safetensors", tmp_path / "new" / "two.safetensors"
    write_single_file(one, models[name], dtype=dtype, metadata=dict(made="by hand"))
    first = open_checkpoint(one)
    assert first.components == (*NETWORKS, "scheduler")
    for component in NETWORKS:
        assert_same(first.tensors(component), models[name].tensors(component), dtype)
        assert CLASSES[component].from_json(first.config(component)) == CONFIG[name][component]
    assert first.config("scheduler") == SCHEDULER
    check_networks(first)
    write_single_file(two, first)
    assert one.read_bytes() == two.read_bytes()
    assert [path.name for path in two.parent.iterdir()] == ["two.safetensors"]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_file_equals_the_folder_of_the_same_model(tmp_path, models, name):
    write_single_file(tmp_path / "model.safetensors", models[name], dtype=np.float16)
    write_folder(tmp_path / "model", models[name], dtype=np.float16)
    write_single_file(tmp_path / "again.safetensors", open_checkpoint(tmp_path / "model"))
    write_folder(tmp_path / "back", open_checkpoint(tmp_path / "again.safetensors"))
    single = open_checkpoint(tmp_path / "model.safetensors")
    for other in (open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "back")):
        for component in NETWORKS:
            assert_same(single.tensors(component), other.tensors(component))
            assert_same_config(single.config(component), other.config(component))
    assert_same(read_tensors(tmp_path / "again.safetensors"), read_tensors(tmp_path / "model.safetensors"))


def test_one_tensor_of_several_dtypes_has_one_that_holds_them(tmp_path, models):
    """OpenCLIP's queries, keys and values are one tensor; of kernels in 8 bits and a LoRA's in 16 that is of 16."""
    model = models["sd2"]
    tensors = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in model.tensors("text_encoder").items()}
    query = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    mixed = tensors | {query: model.tensors("text_encoder")[query].astype(np.float16)}
    states = {**model.states, "text_encoder": (model.config("text_encoder"), mixed)}
    write_single_file(tmp_path / "model.safetensors", dataclasses.replace(model, states=states))
    found = open_checkpoint(tmp_path / "model.safetensors").tensors("text_encoder")
    assert_same({query: found[query]}, {query: mixed[query]})
    key = query.replace("q_proj", "k_proj")
    assert_same({key: found[key]}, {key: tensors[key]}, np.float16)
    other = key.replace("layers.1", "layers.0")
    assert_same({other: found[other]}, {other: tensors[other]})


def test_the_layout_is_ldms(ours):
    """The tables are one to one, and these are keys and shapes of the real files but for the widths."""
    shapes = {name: {key: value.shape for key, value in tensors.items()} for name, tensors in ours.items()}
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
    assert shapes["sd1"][f"{unet}input_blocks.1.1.proj_in.weight"] == (32, 32, 1, 1)
    assert shapes["sd2"][f"{unet}input_blocks.1.1.proj_in.weight"] == (64, 64)
    assert shapes["sd1"][f"{unet}input_blocks.2.0.op.weight"] == (32, 32, 3, 3)
    assert shapes["sd1"][f"{unet}output_blocks.1.1.conv.weight"] == (64, 64, 3, 3)
    assert shapes["sd1"][f"{vae}encoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
    assert shapes["sd1"][f"{vae}decoder.up.0.block.0.nin_shortcut.weight"] == (32, 64, 1, 1)
    assert shapes["sd1"][f"{text}transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"] == (64, 64)
    assert shapes["sd2"][f"{text}model.transformer.resblocks.1.attn.in_proj_weight"] == (192, 64)
    assert shapes["sd2"][f"{text}model.positional_embedding"] == (8, 64)


def test_a_network_keeps_its_hash_in_memory_in_a_file_and_beside_another_vae(tmp_path, models, foreign):
    model = models["sd2"]
    write_single_file(tmp_path / "one.safetensors", model)
    one = open_checkpoint(tmp_path / "one.safetensors")
    hashes = {component: one.sha256(component) for component in NETWORKS}
    assert hashes == {component: model.sha256(component) for component in NETWORKS}
    key = "first_stage_model.quant_conv.bias"
    other = foreign("sd2", {key: np.ones(8, np.float32)}, dict(other="metadata"))
    assert {name for name in NETWORKS if other.sha256(name) != hashes[name]} == {"vae"}


def test_one_tensor_at_a_time_is_in_memory(tmp_path, models, monkeypatch):
    alive, most = 0, 0

    def counted(tensor):
        def forget():
            nonlocal alive
            alive -= 1

        def read():
            nonlocal alive, most
            array = np.array(tensor)
            weakref.finalize(array, forget)
            alive += 1
            most = max(most, alive)
            return array

        return Tensor(tensor.shape, tensor.dtype, read)

    states = {
        component: (fields, {key: counted(tensor) for key, tensor in tensors.items()})
        for component, (fields, tensors) in models["sd2"].states.items()
    }
    path = tmp_path / "model.safetensors"
    write_single_file(path, MemoryCheckpoint(states), dtype=np.float16)
    assert alive == 0 and most == 1
    monkeypatch.setattr(np, "memmap", None)
    check_networks(path)  # reads none


# Files of others: the architecture from keys and shapes


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_architecture_is_recognised_from_keys_and_shapes(foreign, name, models):
    file = foreign(name, prediction_type="epsilon")
    assert (unet_config(file), vae_config(file), text_config(file)) == tuple(CONFIG[name].values())
    for component in NETWORKS:
        assert_same(file.tensors(component), models[name].tensors(component))


@pytest.mark.parametrize("model", ["sd15", "sd21"])
def test_the_real_architectures_are_recognised(model):
    """Full size: the shapes that LDM's keys would have give the published configs."""
    folder = goldens.GOLDENS / "configs" / model
    configs = {
        name: cls.from_json(json.loads((folder / name / "config.json").read_text())) for name, cls in CLASSES.items()
    }
    shapes = {}
    for name, config in configs.items():
        expected = expected_shapes(config)
        table = ldm_table(config)
        assert sorted(key for keys in table.values() for key in keys) == sorted(expected)
        assert len(table) == dict(unet=686, vae=248, text_encoder=196 if model == "sd15" else 280)[name]
        for key, keys in table.items():
            rows, *rest = expected[keys[0]]
            shapes[key] = ldm_shape(key, (rows * len(keys), *rest))
    width = 768 if model == "sd15" else 1024
    known = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    }
    clip, opened = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    if model == "sd15":
        known[f"{clip}embeddings.position_embedding.weight"] = (77, 768)
        known[f"{clip}encoder.layers.11.mlp.fc1.weight"] = (3072, 768)
    else:
        known[f"{opened}transformer.resblocks.22.attn.in_proj_bias"] = (3072,)
        known[f"{opened}ln_final.weight"] = (1024,)
        shapes |= {key.replace(".22.", ".23."): shape for key, shape in shapes.items() if ".resblocks.22." in key}
        assert len([key for key in shapes if key.startswith(opened)]) == 292  # the real file: and two more
    assert {key: shapes.get(key) for key in known} == known
    for name, config in configs.items():
        found = CLASSES[name].from_json(found_config(name, shapes, model))
        without_effect = dict(sample_size=0) if name != "text_encoder" else dict(eos_token_id=0)
        assert dataclasses.replace(found, **without_effect) == dataclasses.replace(config, **without_effect)


UNUSED = {
    "model_ema.decay": (),
    "model_ema.diffusion_modelout2weight": (4,),
    "alphas_cumprod": (1000,),
    "betas": (1000,),
    "sqrt_one_minus_alphas_cumprod": (1000,),
    "log_one_minus_alphas_cumprod": (1000,),
    "posterior_mean_coef1": (1000,),
    "logvar": (1000,),
    "lvlb_weights": (1000,),
    "global_step": (),
    "first_stage_model.loss.logvar": (),
    "embedding_manager.initial_embeddings.weight": (2, 64),
    "cond_stage_model.logit_scale": (),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 8),
    "cond_stage_model.transformer.text_projection.weight": (64, 64),
    "cond_stage_model.model.logit_scale": (),
    "cond_stage_model.model.text_projection": (64, 64),
    "cond_stage_model.model.attn_mask": (8, 8),
    "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": (64,),
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_what_no_network_needs_is_left_alone(foreign, models, name):
    file = foreign(name, {key: np.ones(shape, np.float32) for key, shape in UNUSED.items()}, prediction_type="epsilon")
    assert file.components == (*NETWORKS, "scheduler")
    for component in NETWORKS:
        assert_same(file.tensors(component), models[name].tensors(component))


@pytest.mark.parametrize(
    ("component", "spoilt"),
    [
        ("unet", "model.diffusion_model.output_blocks.0.0.in_layers.0.weight"),
        ("vae", "first_stage_model.decoder.mid.attn_1.k.bias"),
        ("text_encoder", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"),
    ],
)
def test_missing_surplus_and_misshapen_keys_are_named_as_the_file_has_them(foreign, ours, component, spoilt):
    array = ours["sd2"][spoilt]
    file = foreign("sd2", {spoilt: None, f"{spoilt}s": array}, prediction_type="epsilon")
    with pytest.raises(
        WeightsError, match=rf"^{file.path}: 1 missing \({spoilt}\); 1 surplus \({spoilt}s\); fetch the "
    ):
        file.tensors(component)
    file = foreign("sd2", {spoilt: array[1:]}, prediction_type="epsilon")
    with pytest.raises(WeightsError, match=rf"^{file.path}.*: 1 misshapen \(.*"):
        check_networks(file)


def test_keys_of_no_network_and_architectures_that_cannot_be_told_are_named(foreign):
    with pytest.raises(
        WeightsError, match=r"model\.safetensors: 1 surplus \(surprise\.weight\), of no network.*; take them out with"
    ):
        foreign("sd1", {"surprise.weight": np.ones(3, np.float32)})
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(WeightsError, match=rf"1 missing \({key}\), which tells the architecture; fetch the file again"):
        load_unet(foreign("sd1", {key: None}))
    with pytest.raises(
        WeightsError, match=r"1 misshapen \(model\.diffusion_model\.out\.2\.weight is \(4,\)\); fetch the file again"
    ):
        load_unet(foreign("sd1", {"model.diffusion_model.out.2.weight": np.ones(4, np.float32)}))
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    with pytest.raises(WeightsError, match="text encoder of width 40 could have any number of attention heads"):
        load_text_encoder(foreign("sd1", {key: np.ones((20, 40), np.float32)}))


@pytest.mark.parametrize("unet", ["sd1", "sd2"])
def test_a_text_encoder_of_2_must_say_its_activation(foreign, ours, unet):
    """In transformers' layout it would be read as 1's, with quick_gelu."""
    clip = "cond_stage_model.transformer.text_model."
    layer = f"{clip}encoder.layers.0"
    shapes = {
        f"{clip}embeddings.token_embedding.weight": (20, 1024),
        f"{clip}embeddings.position_embedding.weight": (8, 1024),
        f"{layer}.mlp.fc1.weight": (96, 1024),
        f"{layer}.layer_norm1.weight": (1024,),
    }
    others = {key: None for key in ours[unet] if key.startswith("cond_stage_model.")}
    file = foreign(unet, others | {key: np.ones(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(WeightsError, match="does not say its activation; convert the model from a diffusers folder"):
        file.config("text_encoder")


# Spellings


def as_linear(array):
    return array[:, :, 0, 0] if array.ndim == 4 else array


@pytest.mark.parametrize("spelling", ["to_q to_k to_v to_out.0", "query key value proj_attn", "q k v proj_out"])
@pytest.mark.parametrize("pixels", [True, False])
def test_all_spellings_of_the_vaes_attention_are_read(foreign, ours, models, spelling, pixels):
    changes: dict[str, Any] = {}
    for key, array in ours["sd1"].items():
        for old, new in zip(["q", "k", "v", "proj_out"], spelling.split(), strict=True):
            if f".attn_1.{old}." in key:
                changes[key] = None
                changes[key.replace(f".{old}.", f".{new}.")] = array if pixels else as_linear(array)
    assert len(changes) >= 16
    changes |= {key: changes[key] for key in changes if changes[key] is not None}
    assert_same(foreign("sd1", changes).tensors("vae"), models["sd1"].tensors("vae"))


def test_other_prefixes_are_read(foreign, ours, models):
    changes = dict.fromkeys(ours["sd1"])
    for key, array in ours["sd1"].items():
        changes["state_dict." + key.replace(".transformer.text_model.", ".transformer.")] = array
    file = foreign("sd1", changes)
    for component in NETWORKS:
        assert_same(file.tensors(component), models["sd1"].tensors(component))


def test_two_spellings_of_one_tensor_are_refused(foreign, ours):
    key = "first_stage_model.encoder.mid.attn_1.q.bias"
    with pytest.raises(WeightsError, match=rf"1 tensors \({key}\) twice, in two spellings; of one take them out"):
        foreign("sd1", {key.replace(".q.", ".to_q."): ours["sd1"][key]})
    averaged = {key: np.ones(3, np.float32) for key in ("model_ema.a", "state_dict.model_ema.a")}
    with pytest.raises(WeightsError, match=r"1 tensors \(model_ema\.a\) twice"):
        foreign("sd1", averaged, ema=True)


def test_two_spellings_of_what_no_network_needs_are_left_alone(foreign, models):
    model, ids = "cond_stage_model.transformer.", np.arange(8)[None]
    keys = (f"{model}embeddings.position_ids", f"{model}text_model.embeddings.position_ids")
    file = foreign("sd1", dict.fromkeys(keys, ids))
    assert_same(file.tensors("text_encoder"), models["sd1"].tensors("text_encoder"))


# Parts of a model


@pytest.mark.filterwarnings("ignore:.*nothing says what it predicts")
def test_the_moving_average_is_taken_when_asked_for(foreign, ours, models, tmp_path):
    ema = {
        ema_key(key): array * np.float32(2)
        for key, array in ours["sd1"].items()
        if key.startswith("model.diffusion_model.")
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema
    counters = {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(7)}
    assert_same(foreign("sd1", ema | counters).tensors("unet"), models["sd1"].tensors("unet"))
    averaged = foreign("sd1", ema | counters, ema=True)
    doubled = {key: np.asarray(tensor) * 2 for key, tensor in models["sd1"].tensors("unet").items()}
    assert_same(averaged.tensors("unet"), doubled)
    assert_same(averaged.tensors("vae"), models["sd1"].tensors("vae"))
    write_single_file(tmp_path / "pruned.safetensors", averaged)
    pruned = SingleFileCheckpoint(tmp_path / "pruned.safetensors")
    assert averaged.has_ema and not pruned.has_ema
    assert_same(pruned.tensors("unet"), doubled)
    del ema["model_ema.diffusion_modelout2bias"]
    with pytest.raises(WeightsError, match=r"1 missing \(model_ema\.diffusion_modelout2bias\); fetch the file again"):
        foreign("sd1", ema, ema=True).tensors("unet")
    with pytest.raises(WeightsError, match=r"has no moving average of its U-Net .*leave out ema"):
        foreign("sd1", ema=True).tensors("unet")


@pytest.mark.filterwarnings("ignore:.*nothing says what it predicts")
@pytest.mark.parametrize(
    ("prefixes", "components"),
    [
        (("model.", "cond_stage_model."), ("unet", "text_encoder", "scheduler")),
        (("model.",), ("unet", "scheduler")),
        (("first_stage_model.",), ("vae",)),
        (("cond_stage_model.",), ("text_encoder",)),
    ],
)
def test_files_without_some_networks_say_so(foreign, ours, models, tmp_path, prefixes, components):
    file = foreign("sd1", only(ours["sd1"], *prefixes))
    assert file.components == components
    write_single_file(tmp_path / "part.safetensors", file)
    part = open_checkpoint(tmp_path / "part.safetensors")
    assert part.components == components
    for name in {*components} & {*NETWORKS}:
        assert_same(part.tensors(name), models["sd1"].tensors(name))
    for name in {*NETWORKS} - {*components}:
        with pytest.raises(
            WeightsError, match=rf"part\.safetensors: has no {name}; it holds {', '.join(components)}; take"
        ):
            part.tensors(name)


def test_an_autoencoder_alone_is_read_without_its_prefix(tmp_path, ours, models):
    path, prefix = tmp_path / "vae.safetensors", "first_stage_model."
    tensors = {key.removeprefix(prefix): array for key, array in ours["sd1"].items() if key.startswith(prefix)}
    write_tensors(path, tensors | {"loss.logvar": np.ones((), np.float32)})
    file = open_checkpoint(path)
    assert file.components == ("vae",)
    assert_same(file.tensors("vae"), models["sd1"].tensors("vae"))


# Schedule and prediction type


@pytest.mark.parametrize(
    ("name", "marks", "metadata", "expected"),
    [
        ("sd1", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd1", {"v_pred": ()}, {}, "v_prediction"),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ("sd2", {"global_step": 875000}, {}, "epsilon"),
        ("sd2", {"global_step": 110000}, {}, "v_prediction"),
        ("sd2", {"global_step": 7}, {}, None),
        ("sd2", {"global_step": float("nan")}, {}, None),
        ("sd2", {"global_step": float("inf")}, {}, None),
        ("sd2", {}, {}, None),
    ],
)
def test_the_prediction_type_is_what_the_file_says(foreign, tmp_path, name, marks, metadata, expected):
    changes = {key: np.zeros(0, np.float32) if value == () else np.asarray(value) for key, value in marks.items()}
    file = foreign(name, changes, metadata)
    write_single_file(tmp_path / "written.safetensors", file)
    for opened in (file, open_checkpoint(tmp_path / "written.safetensors")):
        if expected is None:
            with pytest.raises(WeightsError, match=r"\.safetensors: a .* pass prediction_type='epsilon' .* or 'v_"):
                opened.config("scheduler")
        else:
            assert NoiseSchedule.from_json(opened.config("scheduler")) == NoiseSchedule(prediction_type=expected)
    given = foreign(name, changes, metadata, prediction_type="v_prediction")
    assert given.config("scheduler")["prediction_type"] == "v_prediction"


def test_what_nothing_says_is_warned_of(foreign):
    file = foreign("sd1")
    with pytest.warns(UserWarning, match=r"nothing says what it predicts.*prediction_type=v_prediction"):
        assert file.config("scheduler")["prediction_type"] == "epsilon"
    foreign("sd1", prediction_type="epsilon").config("scheduler")  # the user has said it


@pytest.mark.parametrize("given", [None, "", "sample"])
def test_a_config_that_leaves_the_prediction_type_open_means_epsilon(tmp_path, models, given):
    """As diffusers reads it. JSON's null may not get into a header, which holds text only."""
    path, expected = tmp_path / "model.safetensors", given or "epsilon"
    model = dataclasses.replace(models["sd1"], scheduler=SCHEDULER | dict(prediction_type=given))
    write_folder(tmp_path / "model", model)
    write_single_file(path, open_checkpoint(tmp_path / "model"))
    assert read_metadata(path)["modelspec.prediction_type"] == expected
    assert open_checkpoint(path).config("scheduler")["prediction_type"] == expected
    assert describe(open_checkpoint(tmp_path / "model"))["prediction_type"] == expected


def test_a_prediction_type_that_is_not_text_is_refused(tmp_path, models):
    model = dataclasses.replace(models["sd1"], scheduler=SCHEDULER | dict(prediction_type=["v"]))
    with pytest.raises(WeightsError, match=r"prediction_type is \['v'\]; make it 'epsilon' or 'v_prediction'"):
        write_single_file(tmp_path / "model.safetensors", model)
    assert not [*tmp_path.iterdir()]


def test_a_schedule_that_ends_in_pure_noise_is_known_and_refused(foreign):
    file = foreign("sd1", {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)})
    with pytest.raises(InputError, match="rescale_betas_zero_snr=True is not supported"):
        NoiseSchedule.from_json(file.config("scheduler"))


def test_a_scale_factor_in_the_file_is_the_vaes(foreign):
    assert vae_config(foreign("sd1", {"scale_factor": np.float32(0.25)})).scaling_factor == 0.25


# Metadata


@pytest.mark.filterwarnings("ignore:.*nothing says what it predicts")
def test_metadata_is_kept_and_extended(foreign, tmp_path):
    source = foreign(
        "sd1", metadata={"modelspec.title": "Fox", "modelspec.hash_sha256": "0x12", "ss_tags": "{}", "format": "tf"}
    )
    path = tmp_path / "written.safetensors"
    more = {"afa_jax.recipe": "{}", "ss_tags": "new", "format": "flax", "modelspec.hash_sha256": "0x34"}
    write_single_file(path, source, metadata=more)
    found = read_metadata(path)
    assert json.loads(found.pop(CONFIGS)).keys() == {*NETWORKS, "scheduler"}
    assert found == {
        "format": "pt",
        "modelspec.title": "Fox",
        "modelspec.prediction_type": "epsilon",
        "ss_tags": "new",
        "afa_jax.recipe": "{}",
    }
    model = MemoryCheckpoint({"vae": ({**source.config("vae"), "_name_or_path": "/home"}, source.tensors("vae"))})
    write_single_file(path, model, overwrite=True)
    assert "home" not in read_metadata(path)[CONFIGS]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("{", "its metadata afa_jax.configs is damaged"),
        ("[" * 10_000, "its metadata afa_jax.configs is damaged"),
        ("[]", "its metadata afa_jax.configs is damaged"),
        ('{"unet": []}', "its metadata afa_jax.configs is damaged"),
        ('{"unet": {}}', "unet, by its metadata afa_jax.configs"),
        (dict(layers_per_block=10**12), "layers_per_block=1000000000000 is not a value that this field can have"),
        (dict(layers_per_block=2), r"138 missing \(model\.diffusion_model\.input_blocks\.2\.0\.emb_layers"),
        (dict(layers_per_block="two"), "by its metadata afa_jax.configs"),
        (dict(block_out_channels=[32, 96]), "misshapen"),
        (dict(block_out_channels=[0, 0]), "by its metadata afa_jax.configs"),
        (
            dict(block_out_channels=[], down_block_types=[], up_block_types=[]),
            "is not a value that this field can have",
        ),
        (dict(block_out_channels="wide"), "by its metadata afa_jax.configs"),
        (dict(attention_head_dim=0), "by its metadata afa_jax.configs"),
    ],
)
def test_our_metadata_must_fit_the_tensors(foreign, configs, message):
    if isinstance(configs, dict):
        fields = dataclasses.asdict(UNET1) | configs
        configs = json.dumps(dict(unet=fields))
    file = foreign("sd1", metadata={CONFIGS: configs})
    with pytest.raises((WeightsError, ConfigError), match=rf"^{file.path}.*{message}") as caught:
        load_unet(file)
    assert "\n" not in str(caught.value)


# Refusals

IN9 = {MARK: np.zeros((32, 9, 3, 3), np.float32)}
IN8 = {MARK: np.zeros((32, 8, 3, 3), np.float32)}


@pytest.mark.parametrize(
    ("changes", "channels", "task"),
    [(IN9, 9, "inpainting"), (IN8, 8, "InstructPix2Pix")],
    ids=["inpainting", "pix2pix"],
)
def test_other_tasks_can_be_converted_but_not_fused(foreign, tmp_path, changes, channels, task):
    file = foreign("sd1", changes)
    write_single_file(tmp_path / "written.safetensors", file)
    config = unet_config(tmp_path / "written.safetensors")
    assert config.in_channels == channels
    (_, message), *rest = different_architectures([UNET1, config], ["base", "other"])
    assert not rest
    assert message.endswith(
        f"in_channels is 4 and {channels} (text to picture and {task}); only U-Nets of one task can be fused"
    )


UNET = "model.diffusion_model."
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("keys", "what", "advice"),
    [
        (["conditioner.embedders.1.model.ln_final.weight", MARK], "SDXL", "only Stable Diffusion 1.x and 2.x"),
        (["conditioner.embedders.0.model.ln_final.weight", MARK], "the SDXL refiner", "only"),
        ([MARK, f"{CONTEXT}:2048", f"{UNET}label_emb.0.0.weight"], "SDXL", "only"),
        ([MARK, f"{CONTEXT}:1024", f"{UNET}label_emb.0.0.weight"], "Stable Diffusion 2.1 unCLIP", "only"),
        (["add_embedding.linear_1.weight", "conv_in.weight"], "SDXL", "only"),
        ([f"{UNET}joint_blocks.0.context_block.attn.qkv.weight"], "SD3", "only"),
        (["joint_blocks.0.context_block.attn.qkv.weight"], "SD3", "only"),
        ([f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"], "Flux", "only"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux", "only"),
        (
            ["single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.norm1_context.linear.weight"],
            "Flux",
            "",
        ),
        (["clip_txt_mapper.weight"], "Stable Cascade", "only"),
        (["t_block.1.weight", "blocks.0.cross_attn.kv_linear.weight"], "PixArt", "only"),
        (["mlp_t5.0.weight"], "Hunyuan-DiT", "only"),
        (["conditioner.embedders.0.x", "model.diffusion_model.time_stack.a"], "Stable Video Diffusion", "only"),
        (
            ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
            "a LoRA",
            "convert MODEL --lora .* loras=",
        ),
        (
            ["unet.mid_block.attentions.0.proj_in.lora_A.weight"],
            "a LoRA",
            "convert MODEL --lora .* loras=",
        ),
        (["unet.up.0.attn1.processor.to_q_lora.down.weight"], "a LoRA", "bake it"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoHa", "merge it into a checkpoint"),
        (["lora_unet_mid_block_attentions_0_proj_in.lokr_w1"], "a LoKr", "merge it into a checkpoint"),
        (["emb_params"], "a textual inversion", "leave it out"),
        (["control_model.time_embed.0.weight"], "a ControlNet", "leave it out"),
        (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "a ControlNet", "leave it out"),
        (["decoder.conv_in.weight:16"], "an autoencoder of SD3 or Flux", "only"),
        (
            ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"],
            "an autoencoder in diff",
            "folder",
        ),
        (
            ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a U-Net in diffusers' layout",
            "diffusers folder",
        ),
        (["text_model.final_layer_norm.weight"], "a text encoder in diffusers' layout", "diffusers folder"),
        (["depth_model.model.x", MARK], "Stable Diffusion 2 depth-to-picture", "only"),
        ([MARK], "a latent diffusion model without text", "only"),
        (["head.weight", "tail.weight"], r"no model that is known here \(it has head\.weight, tail\.weight", "only"),
        ([], "a file without tensors", "fetch or write it again"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, keys, what, advice):
    path = tmp_path / "model.safetensors"
    tensors = {}
    for key in keys:
        name, _, width = key.partition(":")
        tensors[name] = np.zeros((2, int(width or 2)), np.float32)
    write_tensors(path, tensors)
    with pytest.raises(WeightsError, match=rf"^{path}: this is {what}.*: .*{advice}") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("changes", [{}, IN9, IN8], ids=["plain", "inpainting", "pix2pix"])
def test_the_families_that_are_read_have_names(ours, name, changes):
    shapes = {key: value.shape for key, value in (ours[name] | changes).items()}
    task = {4: "", 9: ", inpainting (9 input channels)", 8: ", InstructPix2Pix (8 input channels)"}
    family = family_of(shapes)
    assert family.supported
    assert family.name == f"Stable Diffusion {name[2]}.x{task[shapes[MARK][1]]}"


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("a.ckpt", b"x", {}, "pickled weights are refused"),
        ("a.CKPT", b"x", {}, "pickled weights are refused"),
        ("a.gguf", b"x", {}, "not a .safetensors file or a diffusers folder"),
        ("a.safetensors", b"", {}, "not a complete safetensors file"),
        ("a.safetensors", (2**60).to_bytes(8, "little") + b"{}", {}, "not a complete safetensors file"),
        ("a.safetensors", None, {}, "no such file or folder"),
        ("a.safetensors", b"x", dict(variant="fp16"), "variant='fp16' is for folders"),
        (".", None, dict(ema=True), "prediction_type and ema are for single files"),
        (".", None, dict(prediction_type="epsilon"), "prediction_type and ema are for single files"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, file, content, options, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"^{path}: {message}") as caught:
        open_checkpoint(path, **options)
    assert "\n" not in str(caught.value)


def test_a_prediction_type_that_is_none_is_refused(foreign):
    with pytest.raises(InputError, match="prediction_type='velocity'; choose epsilon or v_prediction"):
        foreign("sd1", prediction_type="velocity")


# Writing


def test_a_file_that_is_there_stays_unless_told(tmp_path, models):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match=rf"^{path} exists; choose another name, or --overwrite"):
        write_single_file(path, models["sd1"])
    assert path.read_bytes() == b"precious"
    write_single_file(path, models["sd1"], overwrite=True)
    check_networks(path)
    with pytest.raises(InputError, match=r"model\.ckpt: a single file's name ends in \.safetensors"):
        write_single_file(tmp_path / "model.ckpt", models["sd1"])
    write_single_file(tmp_path / "LOUD.SAFETENSORS", models["sd1"])
    assert (tmp_path / "LOUD.SAFETENSORS").read_bytes() == path.read_bytes()
    check_networks(tmp_path / "LOUD.SAFETENSORS")


@pytest.mark.parametrize("name", ["file/model.safetensors", f"{'long' * 60}.safetensors", "folder.safetensors"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, models, name):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.safetensors" / "sub").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / name
    with pytest.raises(InputError, match=rf"^{path} cannot be written \(.*\); choose another name or place$"):
        write_single_file(path, models["sd1"], overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_left_to_the_commands(tmp_path, models, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_single_file(tmp_path / "model.safetensors", models["sd1"])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("component", "spoil", "message"),
    [
        ("vae", lambda array: np.full_like(array, np.nan), "holds NaN or infinity"),
        ("vae", lambda array: np.full_like(array, 1e5), "too large for float16; choose bfloat16 or float32"),
        ("text_encoder", lambda array: array[1:], "misshapen"),
        ("unet", lambda array: None, "missing"),
    ],
)
def test_weights_that_cannot_be_written_are_named_and_leave_nothing(tmp_path, models, component, spoil, message):
    fields, tensors = models["sd2"].states[component]
    key = sorted(tensors)[0]
    spoilt = dict(tensors)
    array = spoil(np.asarray(spoilt.pop(key)))
    if array is not None:
        spoilt[key] = Tensor.of(array)
    model = MemoryCheckpoint(dict(models["sd2"].states) | {component: (fields, spoilt)})
    with pytest.raises(WeightsError, match=rf"^a model in memory \({component}\): .*{key}") as caught:
        write_single_file(tmp_path / "new.safetensors", model, dtype=np.float16)
    assert message in str(caught.value)
    assert not [*tmp_path.iterdir()]


# PyTorch diffusers' from_single_file


@pytest.mark.parametrize("case", ["single_sd15", "single_sd21"])
def test_latents_are_those_of_the_pipeline_that_diffusers_loads(case, tmp_path):
    """The golden was made from the file that is written here; make_torch.py compared its weights bit for bit."""
    record, reference = goldens.record(case), goldens.reference(case)
    inputs = record["inputs"]
    path = tmp_path / "model.safetensors"
    write_single_file(path, checkpoint(case), dtype=DTYPES[case])
    file = open_checkpoint(path)
    unet, encoder = load_unet(file), load_text_encoder(file)
    schedule = NoiseSchedule.from_json(file.config("scheduler"))

    @goldens.jit
    def sample(unet, encoder, ids, latents):
        states = encoder(ids)
        cond, uncond = (Conditioning(text=own[None, None]) for own in states)
        predict = guided(lambda x, t, own: unet(x, t, take(own, 0)), cond, uncond, inputs["guidance"])
        return states, tiny.ddim(predict, schedule, latents, steps=inputs["steps"])

    latents = jnp.moveaxis(jnp.asarray(random_input(**inputs["latents"])), 1, -1)
    states, result = sample(unet, encoder, jnp.asarray(inputs["input_ids"]), latents)
    goldens.assert_close(
        2e-5,
        {
            "conditional": (states[:1], reference["cond"]),
            "unconditional": (states[1:], reference["uncond"]),
            "latents": (result, reference["latents"]),
        },
    )
