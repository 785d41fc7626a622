"""SABW against a reference assembled from PyTorch diffusers' own modules, and its exchange with PyTorch state dicts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from afa_jax.fusion.afa import SABW, SABWConfig
from afa_jax.fusion.files import aggregator_key, load_aggregators, save_fusion
from afa_jax.weights.keys import pytorch_name
from afa_jax.weights.state_dicts import load_state_dict, state_dict
from afa_jax.weights.tensors import WeightsError, read_tensors, write_tensors
from tests import tiny
from tests.reference.weights import random_input, random_state_dict


@pytest.mark.parametrize("case", ["sabw", "sabw_faint"])
def test_parity_with_pytorch(case, request):
    goldens = request.config.rootpath / "tests" / "goldens"
    facts = json.loads((goldens / f"{case}.json").read_text())
    expected = load_file(goldens / f"{case}.safetensors")
    tensors = random_state_dict(case, facts["parameters"], facts["weight_scale"])
    experts, channels = facts["config"]["experts"], facts["config"]["channels"]
    config = SABWConfig(transformer_layers=facts["config"]["layers"])
    sabw = load_state_dict(
        jax.eval_shape(lambda: SABW(config, experts, channels, time_width=1280, text_width=768, rngs=nnx.Rngs(0))),
        tensors,
        pytorch_name,
        what=case,
    )
    for name, spec in facts["inputs"].items():
        features, temb, text = (jnp.asarray(random_input(**spec[k])) for k in ("features", "temb", "text"))
        features = jnp.moveaxis(features, 2, -1)
        fused, maps = jax.jit(lambda sabw, *a: sabw(*a))(sabw, features, temb, text)
        for actual, reference in (
            (sabw.logits(features, temb, text), expected[f"{name}.logits"]),
            (maps, expected[f"{name}.maps"]),
            (np.moveaxis(np.asarray(fused), -1, 1), expected[f"{name}.fused"]),
        ):
            np.testing.assert_allclose(actual, reference, atol=1e-4 * np.abs(reference).max())


def test_a_pytorch_state_dict_goes_in_and_comes_back(tmp_path):
    aggregators = tiny.trained(3, seed=1)
    unet = tiny.unet(0)
    save_fusion(tmp_path, aggregators, dict(experts=[]))
    tensors = read_tensors(tmp_path / "aggregators.safetensors")
    assert tensors["aggregators.0.conv_in.weight"].shape == (8, 24, 1, 1)
    assert tensors["aggregators.8.conv_out.weight"].shape == (3, 8, 1, 1)
    assert "aggregators.2.transformer.transformer_blocks.0.attn1.to_out.0.weight" in tensors
    assert "aggregators.2.res_block.time_emb_proj.bias" in tensors
    again = load_aggregators(tmp_path, unet, 3)
    for a, b in zip(jax.tree.leaves(aggregators), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    written = state_dict(again, aggregator_key)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)


def test_aggregators_of_other_experts_are_refused_by_name(tmp_path):
    save_fusion(tmp_path, tiny.aggregators(3), dict(experts=[]))
    with pytest.raises(
        WeightsError, match=r"aggregators\.safetensors.*aggregators\.0\.conv_in\.weight is \(8, 24, 1, 1\)"
    ):
        load_aggregators(tmp_path, tiny.unet(0), 2)
    tensors = read_tensors(tmp_path / "aggregators.safetensors")
    lost = tensors.pop("aggregators.3.conv_out.weight")
    write_tensors(tmp_path / "aggregators.safetensors", tensors | {"aggregators.99.odd": lost})
    with pytest.raises(
        WeightsError, match=r"1 missing \(aggregators\.3\.conv_out\.weight\).*surplus \(aggregators\.99\.odd\)"
    ):
        load_aggregators(tmp_path, tiny.unet(0), 3)
    with pytest.raises(WeightsError, match=r"no ensemble\.json"):
        load_aggregators(tmp_path / "nowhere", tiny.unet(0), 3)
