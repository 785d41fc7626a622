"""The models that come with the repository: the aggregators belong to these experts, and a clone stays small."""

from __future__ import annotations

from pathlib import Path

import pytest

from afa_jax.fusion.files import check_aggregators
from afa_jax.fusion.pair_record import read_record
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.opened import open_checkpoint

MODELS = Path(__file__).parents[1] / "models" / "emoji"
EXPERTS = ("animals", "food", "things")


def test_the_aggregators_are_those_of_the_experts():
    check_aggregators(MODELS / "afa")
    found = [
        dict(name=name, sha256=hash_components(open_checkpoint(MODELS / name), EXPERT_COMPONENTS)) for name in EXPERTS
    ]
    assert found == read_record(MODELS / "afa")["experts"]


@pytest.mark.parametrize("name", ["base", *EXPERTS])
def test_most_kernels_of_a_u_net_take_one_byte_and_the_outermost_layers_two(name):
    """scripts/shrink_emoji.py makes them so; all else of a clone of less than 55 MiB is small."""
    tensors = open_checkpoint(MODELS / name).tensors("unet")
    dtypes = {key: str(tensor.dtype) for key, tensor in tensors.items()}
    assert dtypes["mid_block.resnets.0.conv1.weight"] == "float8_e4m3fn"
    assert {dtypes[key] for key in ("conv_in.weight", "conv_out.weight", "conv_norm_out.weight")} == {"float16"}
