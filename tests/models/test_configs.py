"""Architectures: the real ones have the right parameters, foreign ones are refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from afa_jax.models.clip import TextEncoder
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import ConfigError, TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.trees import flatten
from afa_jax.weights.keys import pytorch_name, shape_in_pytorch, text_key
from afa_jax.weights.networks import unet_keys
from tests.models.goldens import GOLDENS, abstract, record
from tests.reference.weights import random_input, random_weight, shapes_digest

MODELS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, VAE),
    "text_encoder": (TextConfig, TextEncoder),
}


def published_config(name: str) -> dict:
    return json.loads((GOLDENS / "configs" / name / "config.json").read_text())


@pytest.mark.parametrize("name", record("full")["models"])
def test_real_models_have_the_published_parameters(name):
    expected, component = record("full")["models"][name], name.partition("/")[2]
    config, module = MODELS[component]
    model = abstract(lambda rngs: module(config.from_json(published_config(name)), rngs=rngs))
    key = {"unet": unet_keys, "vae": lambda _: pytorch_name, "text_encoder": lambda _: text_key}[component](model)
    shapes = {key(path): shape_in_pytorch(path, leaf.shape) for path, leaf in flatten(model).items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == expected["parameter_count"]
    if component == "text_encoder":  # transformers 5 writes no prefix
        assert digest({key.removeprefix("text_model."): shape for key, shape in shapes.items()}) == expected["sha256"]
        positions = {"text_model.embeddings.position_ids": (1, 77)}
        assert digest(shapes | positions) == expected["sha256_published"]
    else:
        assert digest(shapes) == expected["sha256"]


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    assert len(shapes) > 100
    return shapes_digest(shapes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderKL"),
        ("act_fn", "gelu"),
        ("addition_embed_type", "text_time"),  # SDXL
        ("attention_type", "gated"),
        ("class_embed_type", "timestep"),
        ("conv_in_kernel", 1),
        ("cross_attention_dim", [768, 768, 768, 768]),
        ("cross_attention_norm", "layer_norm"),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("down_block_types", ["CrossAttnDownBlock2D"] * 3),
        ("dropout", 0.1),
        ("freq_shift", 160),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 1024),
        ("layers_per_block", [2, 2]),
        ("mid_block_scale_factor", 2),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("norm_num_groups", 48),
        ("num_class_embeds", 1000),  # the 4x upscaler
        ("only_cross_attention", [True, True, True, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_cond_proj_dim", 256),  # LCM
        ("time_embedding_type", "fourier"),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D"] * 4),
        ("attention_head_dim", 7),
        ("attention_head_dim", None),
        ("block_out_channels", None),
        ("block_out_channels", [320, None, 1280, 1280]),
    ],
)
def test_foreign_unets_are_refused(field, value):
    said = "7 attention heads" if value == 7 else field
    with pytest.raises(ConfigError, match=rf"^unet/config\.json: .*{said}"):
        UNetConfig.from_json(published_config("sd15/unet") | {field: value}, "unet/config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "VQModel"),
        ("act_fn", "relu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("latents_mean", [0.0] * 4),
        ("mid_block_add_attention", False),
        ("latent_channels", None),
        ("norm_num_groups", 48),
        ("scaling_factor", 0),
        ("scaling_factor", float("nan")),
        ("shift_factor", 0.1),
        ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
    ],
)
def test_foreign_vaes_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"^vae/config\.json: .*{field}"):
        VAEConfig.from_json(published_config("sd15/vae") | {field: value}, "vae/config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "t5"), ("hidden_act", "relu"), ("hidden_size", 100), ("num_attention_heads", None)],
)
def test_foreign_text_encoders_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"^text_encoder/config\.json: .*{field}"):
        TextConfig.from_json(published_config("sd15/text_encoder") | {field: value}, "text_encoder/config.json")


def test_null_is_the_default_where_diffusers_writes_it():
    unet = published_config("sd15/unet")
    assert UNetConfig.from_json(unet | dict(num_attention_heads=None, sample_size=None)) == UNetConfig.from_json(unet)
    assert UNetConfig.from_json(unet | dict(num_attention_heads=4, attention_head_dim=None)).heads == (4,) * 4


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("sd15/unet", "block_out_channels"),
        ("sd15/unet", "cross_attention_dim"),
        ("sd15/vae", "block_out_channels"),
        ("sd15/text_encoder", "vocab_size"),
    ],
)
def test_a_missing_field_is_named(name, field):
    data = published_config(name)
    del data[field]
    with pytest.raises(ConfigError, match=f"^the file: .*'{field}' is missing"):
        MODELS[name.partition("/")[2]][0].from_json(data, "the file")


def test_inpainting_unets_are_built():
    config = UNetConfig.from_json(record("unet_1layer")["config"] | {"in_channels": 9})
    model = abstract(lambda rngs: UNet(config, rngs=rngs))
    latents, t, text = (
        jax.ShapeDtypeStruct(*spec) for spec in (((1, 8, 8, 9), "f4"), ((1,), "i4"), ((1, 7, 16), "f4"))
    )
    arguments = (model, latents, t, Conditioning(text=text))
    assert jax.eval_shape(lambda model, *rest: model(*rest), *arguments).shape == (1, 8, 8, 4)


def test_flax_class_names_and_pairs_of_sizes_are_read():
    flax = json.loads((GOLDENS / "unet_flax_folder" / "config.json").read_text())
    assert flax["_class_name"] == "FlaxUNet2DConditionModel"
    assert UNetConfig.from_json(flax) == UNetConfig.from_json(record("unet_flax_folder")["config"])
    assert UNetConfig.from_json(flax | {"sample_size": [64, 96], "freq_shift": 1}).sample_size == 64


def test_heads_may_be_given_by_either_name():
    sd15, sd21 = (UNetConfig.from_json(published_config(f"{name}/unet")) for name in ("sd15", "sd21"))
    assert (sd15.heads, sd21.heads) == ((8, 8, 8, 8), (5, 10, 20, 20))
    data = published_config("sd15/unet") | {"attention_head_dim": 64, "num_attention_heads": [5, 10, 20, 20]}
    assert UNetConfig.from_json(data).heads == sd21.heads


def test_random_weights_are_those_that_the_goldens_were_made_with():
    for key, value in load_file(GOLDENS / "weights.safetensors").items():
        make = random_input if key == "check/input" else random_weight
        np.testing.assert_array_equal(make(key, value.shape), value)
