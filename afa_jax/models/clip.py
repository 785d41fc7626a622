"""The CLIP text encoder of Stable Diffusion (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from afa_jax.models.attention import attend
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.configs import TextConfig
from afa_jax.models.layers import Embedding, LayerNorm, Linear, gelu
from afa_jax.types import TextStates, TokenIds


class TextEmbeddings(nnx.Module):
    """Sum of a token's and its position's vector."""

    def __init__(self, config: TextConfig, **kwargs: Any):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, **kwargs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, **kwargs)

    def __call__(self, ids: Array) -> Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class SelfAttention(nnx.Module):
    """Causal multi-head attention."""

    def __init__(self, config: TextConfig, **kwargs: Any):
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj = Linear(width, width, **kwargs)
        self.k_proj = Linear(width, width, **kwargs)
        self.v_proj = Linear(width, width, **kwargs)
        self.out_proj = Linear(width, width, **kwargs)

    def __call__(self, x: Array) -> Array:
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(attend(query, key, value, causal=True).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers; quick_gelu is ``x * sigmoid(1.702 x)``."""

    def __init__(self, config: TextConfig, **kwargs: Any):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kwargs)

    def __call__(self, x: Array) -> Array:
        x = self.fc1(x)
        x = x * jax.nn.sigmoid(1.702 * x) if self.activation == "quick_gelu" else gelu(x)
        return self.fc2(x)


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TextConfig, **kwargs: Any):
        norm = dict(eps=config.layer_norm_eps, param_dtype=kwargs["param_dtype"])
        self.layer_norm1 = LayerNorm(config.hidden_size, **norm)
        self.self_attn = SelfAttention(config, **kwargs)
        self.layer_norm2 = LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kwargs)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: TextConfig, **kwargs: Any):
        self.layers = nnx.List([EncoderLayer(config, **kwargs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEncoder(nnx.Module):
    """Token ids ``[b, s]`` -> last hidden states ``[b, s, hidden_size]`` after the final layer norm."""

    def __init__(
        self,
        config: TextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        kwargs: dict[str, Any] = dict(rngs=rngs, param_dtype=param_dtype)
        self.embeddings = TextEmbeddings(config, **kwargs)
        self.encoder = Encoder(config, **kwargs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, param_dtype=param_dtype)

    def __call__(self, ids: TokenIds) -> TextStates:
        """Encode at most ``max_position_embeddings`` tokens for each prompt.

        Raises:
            ValueError: more tokens than positions.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens, the text encoder has {self.config.max_position_embeddings} positions"
            )
        return self.final_layer_norm(self.encoder(self.embeddings(ids).astype(self.dtype)))

    def encode(self, ids: TokenIds) -> Conditioning:
        """Return the conditioning that a U-Net gets for these prompts."""
        return Conditioning(text=self(ids))

    def pool(self, ids: TokenIds, states: TextStates) -> Array:
        """Return the state at each prompt's end-of-text token, ``[b, hidden_size]``.

        Configs from before 2023 carry ``eos_token_id`` 2 by mistake. Then, as in transformers, the largest id marks the
        end of the text.
        """
        if self.config.eos_token_id == 2:
            position = ids.argmax(-1)
        else:
            position = (ids == self.config.eos_token_id).argmax(-1)
        return states[jnp.arange(ids.shape[0]), position]
