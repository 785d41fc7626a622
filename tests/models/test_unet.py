"""The U-Net against PyTorch diffusers and against diffusers 0.39's Flax class."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afa_jax.models.conditioning import Conditioning
from afa_jax.models.unet import ConvOut, UNet, size_at
from afa_jax.trees import flatten, take
from tests import tiny
from tests.models.goldens import assert_close, deviation, jit, record, reference, unet, unet_inputs

# float32 rounding is 4e-6, the cheapest mistake that a case is there for 4.5e-4 (tests/reference/README.md).
WITHIN = 2e-5
CASES = ("unet_sd15", "unet_sd15_faint", "unet_sd21", "unet_3level", "unet_1layer", "unet_flax_folder")
STAGES = [(case, record(case)["stages_of"]) for case in CASES if record(case)["stages_of"]]
# Where the stages are compared, so is the last one, the output.
OUTPUTS = [(case, which) for case in CASES for which in record(case)["inputs"] if (case, which) not in STAGES]


@jit
def all_features(
    unet: UNet, latents: jax.Array, t: jax.Array, conditioning: Conditioning
) -> tuple[list[jax.Array], jax.Array]:
    """The stages' outputs, and that of the last up layer, which is inside the last stage."""
    outputs = [output for _, output in unet.features(latents, t, conditioning)]
    last = unet.stages[-1]
    assert isinstance(last, ConvOut)
    return outputs, last.layer(outputs[-2], unet.embed(t, conditioning), conditioning.text, outputs[0])


@jit
def predict(unet: UNet, latents: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
    return unet(latents, t, conditioning)


@functools.cache
def output(case: str, which: str) -> np.ndarray:
    inputs = unet_inputs(case, which)
    if (case, which) in STAGES:
        return np.asarray(features(case, which)[0][-1])
    return np.asarray(predict(unet(case), *inputs))


@functools.cache
def features(case: str, which: str) -> Any:
    return all_features(unet(case), *unet_inputs(case, which))


@pytest.mark.parametrize(("case", "which"), STAGES)
def test_every_stage_equals_pytorch(case, which):
    golden, names, sites = reference(case), record(case)["stages"], record(case)["sites"]
    outputs, unfused = features(case, which)
    stages = list(unet(case).stages)
    assert [stage.name for stage in stages] == [our_name(names[site]) for site in sites]
    expected = [golden[f"{which}.stage.{site}"] for site in sites[:-1]] + [golden[f"{which}.output"]]
    pairs = {stage.name: (ours, theirs) for stage, ours, theirs in zip(stages, outputs, expected, strict=True)}
    hidden = sites[-1] - 1
    assert hidden not in sites
    pairs[names[hidden]] = (unfused, golden[f"{which}.stage.{hidden}"])
    assert_close(WITHIN, pairs)
    # What the stages say about themselves, SABW is built from.
    rows, columns = unet_inputs(case, which)[0].shape[1:3]
    assert [output.shape[1:] for output in outputs] == [
        (*size_at((rows, columns), stage.level), stage.channels) for stage in stages
    ]


def our_name(name: str) -> str:
    name = re.sub(r"(up|down)\.(\d)\.layer\.", r"\1_blocks.\2.layers.", name)
    return re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsampler", name).replace("mid", "mid_block")


@pytest.mark.parametrize(("case", "which"), OUTPUTS)
def test_output_equals_pytorch(case, which):
    assert_close(WITHIN, {f"{case}.{which}": (output(case, which), reference(case)[f"{which}.output"])})


def test_stable_diffusion_has_25_sites():
    assert [len(unet(case).stages) for case in ("unet_sd15", "unet_sd21")] == [25, 25]


@pytest.mark.parametrize(
    "name", [key.removesuffix("_as_pytorch") for key in reference("unet_flax039") if "as_py" in key]
)
def test_flax_of_diffusers_039(name):
    """Equal but for the deviations of that class, whose size is on record."""
    case, which, _ = name.split(".")
    golden, ours = reference("unet_flax039"), output(case, which)
    assert deviation(ours, golden[f"{name}_as_pytorch"]) <= WITHIN
    recorded = record("unet_flax039")["relative_difference_from_pytorch"][name]
    assert recorded > 20 * WITHIN
    assert deviation(golden[name], ours) == pytest.approx(recorded, rel=0.05)


def test_bfloat16_computes_what_float32_does():
    small, (latents, t, context) = tiny.unet(0), tiny.inputs(2, 1)
    half = tiny.unet(0)
    half.dtype = jnp.bfloat16
    dtypes = jax.eval_shape(lambda unet: [y for _, y in unet.features(latents, t, take(context, 0))], half)
    assert {y.dtype for y in dtypes} == {jnp.dtype(jnp.bfloat16)}
    exact, rounded = (predict(unet, latents, t, take(context, 0)) for unet in (small, half))
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.float32)
    # Of rms, not of the worst of 512 elements: that one moves by a quarter between two exact GELUs.
    error = np.sqrt(np.mean(np.square(rounded - exact)) / np.mean(np.square(exact)))
    assert 1e-3 < error < 0.015


@pytest.mark.parametrize("size", [(1, 1), (7, 10), (64, 64), (75, 127)])
def test_features_of_any_size_are_halved_rounding_up_and_come_back(size):
    """As PyTorch's numbers say for ``odd`` of unet_1layer; here SD1.5's four levels, by shapes alone."""
    small = jax.eval_shape(lambda: tiny.unet(0, tiny.UNET))
    outputs = jax.eval_shape(
        lambda unet, x, t, c: [y for _, y in unet.features(x, t, take(c, 0))], small, *tiny.inputs(1, 1, size)
    )
    rows, columns = size
    halved = [size]
    for _ in range(3):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
        halved.append((rows, columns))
    levels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert [y.shape[1:3] for y in outputs] == [halved[level] for level in levels]


def test_residual_branches_and_the_prediction_start_at_zero():
    last = re.compile(r"\.(conv2|proj_out|conv_out)\.kernel")

    @jit
    def last_kernels():  # of the others nothing is computed
        leaves = flatten(UNet(tiny.SMALL_UNET, rngs=nnx.Rngs(0)))
        return {path: leaf for path, leaf in leaves.items() if last.search(path)}

    kernels = last_kernels()
    assert {last.findall(path)[0] for path in kernels} == {"conv2", "proj_out", "conv_out"}
    assert [path for path, kernel in kernels.items() if np.asarray(kernel).any()] == []
