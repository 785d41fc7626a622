"""The text encoder against PyTorch transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from afa_jax.models.clip import TextEncoder
from tests import tiny
from tests.models.goldens import assert_close, deviation, jit, record, reference, text_encoder

# float32 rounding is 1.4e-6, the cheapest mistake 3e-5.
WITHIN = 1e-5


@jit
def encode(text: TextEncoder, ids: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    hidden = [text.embeddings(ids)]
    for layer in text.encoder.layers:
        hidden.append(layer(hidden[-1]))
    states = text(ids)
    return hidden, states, text.pool(ids, states)


@pytest.mark.parametrize("case", ["clip_sd15", "clip_sd15_eos99", "clip_sd15_faint", "clip_sd21"])
def test_states_equal_pytorch(case):
    golden, ids = reference(case), jnp.asarray(record(case)["inputs"]["input_ids"])
    hidden, states, pooled = encode(text_encoder(case), ids)
    pairs = {"last_hidden_state": (states, golden["last_hidden_state"]), "pooled": (pooled, golden["pooled"])}
    if "hidden.0" in golden:
        assert len(hidden) == sum(name.startswith("hidden.") for name in golden)
        pairs |= {f"hidden.{i}": (x, golden[f"hidden.{i}"]) for i, x in enumerate(hidden)}
    assert_close(WITHIN, pairs)
    assert [int(abs(row - own).sum(-1).argmin()) for row, own in zip(states, pooled, strict=True)] == record(case)[
        "pooled_at"
    ]


def test_bfloat16_computes_what_float32_does():
    exact, half = tiny.text_encoder(0), tiny.text_encoder(0)
    half.dtype = jnp.bfloat16
    ids = jnp.asarray([[672, 3, 4, 5, 673]])
    (_, want, _), (_, states, _) = encode(exact, ids), encode(half, ids)
    assert (want.dtype, states.dtype) == (jnp.float32, jnp.bfloat16)
    assert 1e-3 < deviation(states, want) < 0.05


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="17 tokens, the text encoder has 16 positions"):
        jax.eval_shape(tiny.text_encoder(0), jnp.zeros((1, 17), jnp.int32))
