"""The tensors that a network of a config has: their names in a checkpoint and their shapes, without building it.

They are those of the networks in models/, in the same order; a test compares them. So a file can be inspected, compared
and refused without JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.tensors import WeightsError, check_names, is_floating, listed

NetworkConfig = UNetConfig | VAEConfig | TextConfig
Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@functools.lru_cache(maxsize=16)
def expected_shapes(config: NetworkConfig) -> Mapping[str, Shape]:
    """Return the keys and shapes of a network of this architecture, as in a Checkpoint's state dict."""
    if isinstance(config, UNetConfig):
        return {key: shape for _, key, shape in _unet(config)}
    return dict(_vae(config) if isinstance(config, VAEConfig) else _text_encoder(config))


def unet_stages(config: UNetConfig) -> dict[str, str]:
    """Return each U-Net tensor's stage, or ``time_embedding``, by its key; in the stages' order."""
    return {key: stage for stage, key, _ in _unet(config)}


def check_tensors(wanted: Mapping[str, Shape], tensors: Mapping[str, Any], *, what: str) -> None:
    """Check the tensors' names, shapes and kinds against the wanted ones, without reading any.

    Raises:
        WeightsError: missing, surplus or misshapen keys, or a tensor that is not floating point.
    """
    check_names(wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys(), what)
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if tuple(tensors[name].shape) != shape
    ]
    if misshapen:
        raise WeightsError(f"{what}: " + listed("misshapen", misshapen))
    if wrong := [name for name in wanted if not is_floating(tensors[name].dtype)]:
        raise WeightsError(f"{what}: {listed('not floating point', wrong)}")


def _layer(name: str, *weight: int) -> Named:
    """Yield a linear layer, a convolution or a norm: a bias as long as the weight's first axis, and the weight."""
    yield f"{name}.bias", weight[:1]
    yield f"{name}.weight", weight


def _resnet(name: str, before: int, width: int, time: int | None = None) -> Named:
    yield from _layer(f"{name}.conv1", width, before, 3, 3)
    yield from _layer(f"{name}.conv2", width, width, 3, 3)
    if before != width:
        yield from _layer(f"{name}.conv_shortcut", width, before, 1, 1)
    yield from _layer(f"{name}.norm1", before)
    yield from _layer(f"{name}.norm2", width)
    if time is not None:
        yield from _layer(f"{name}.time_emb_proj", width, time)


def _transformer(name: str, width: int, context: int, layers: int, linear: bool) -> Named:
    projection = (width, width) if linear else (width, width, 1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", *projection)
    yield from _layer(f"{name}.proj_out", *projection)
    for block in (f"{name}.transformer_blocks.{i}" for i in range(layers)):
        for attention, source in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attention}.to_k.weight", (width, source)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_v.weight", (width, source)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)
        for i in (1, 2, 3):
            yield from _layer(f"{block}.norm{i}", width)


def _unet(config: UNetConfig) -> Iterator[tuple[str, str, Shape]]:
    """Yield stage, key and shape of every tensor of a U-Net."""
    widths, time, last = config.block_out_channels, config.time_width, len(config.block_out_channels) - 1

    def transformer(name: str, level: int) -> Named:
        return _transformer(
            name, widths[level], config.cross_attention_dim, config.transformer_layers[level],
            config.use_linear_projection,
        )  # fmt: skip

    def of(stage: str, named: Named) -> Iterator[tuple[str, str, Shape]]:
        return ((stage, key, shape) for key, shape in named)

    yield from of("conv_in", _layer("conv_in", widths[0], config.in_channels, 3, 3))
    skips, channels = [widths[0]], widths[0]
    for level, layers in enumerate(config.layers_per_level):
        block = f"down_blocks.{level}"
        for i in range(layers):
            stage = f"{block}.layers.{i}"
            if config.down_attention[level]:
                yield from of(stage, transformer(f"{block}.attentions.{i}", level))
            yield from of(stage, _resnet(f"{block}.resnets.{i}", channels, widths[level], time))
            channels = widths[level]
            skips.append(channels)
        if level < last:
            yield from of(f"{block}.downsampler", _layer(f"{block}.downsamplers.0.conv", channels, channels, 3, 3))
            skips.append(channels)
    yield from of("mid_block", transformer("mid_block.attentions.0", last))
    for i in range(2):
        yield from of("mid_block", _resnet(f"mid_block.resnets.{i}", channels, channels, time))
    for number, level in enumerate(range(last, -1, -1)):
        block, layers = f"up_blocks.{number}", config.layers_per_level[level] + 1
        for i in range(layers):
            before, stage = channels + skips.pop(), f"{block}.layers.{i}"
            channels = widths[level]
            if not skips:
                stage = "conv_out"
                yield from of(stage, _layer("conv_norm_out", channels))
                yield from of(stage, _layer("conv_out", config.out_channels, channels, 3, 3))
            if config.up_attention[number]:
                yield from of(stage, transformer(f"{block}.attentions.{i}", level))
            yield from of(stage, _resnet(f"{block}.resnets.{i}", before, channels, time))
            if level > 0 and i == layers - 1:
                yield from of(stage, _layer(f"{block}.upsamplers.0.conv", channels, channels, 3, 3))
    yield from of("time_embedding", _layer("time_embedding.linear_1", time, widths[0]))
    yield from of("time_embedding", _layer("time_embedding.linear_2", time, time))


def _vae(config: VAEConfig) -> Named:
    widths, latent = config.block_out_channels, config.latent_channels

    def middle(part: str) -> Named:
        width, attention = widths[-1], f"{part}.mid_block.attentions.0"
        yield from _layer(f"{attention}.group_norm", width)
        for name in ("to_k", "to_out.0", "to_q", "to_v"):
            yield from _layer(f"{attention}.{name}", width, width)
        for i in range(2):
            yield from _resnet(f"{part}.mid_block.resnets.{i}", width, width)

    yield from _layer("decoder.conv_in", widths[-1], latent, 3, 3)
    yield from _layer("decoder.conv_norm_out", widths[0])
    yield from _layer("decoder.conv_out", config.out_channels, widths[0], 3, 3)
    yield from middle("decoder")
    before = widths[-1]
    for level, width in enumerate(reversed(widths)):
        block = f"decoder.up_blocks.{level}"
        for i in range(config.layers_per_block + 1):
            yield from _resnet(f"{block}.resnets.{i}", before, width)
            before = width
        if level < len(widths) - 1:
            yield from _layer(f"{block}.upsamplers.0.conv", width, width, 3, 3)
    yield from _layer("encoder.conv_in", widths[0], config.in_channels, 3, 3)
    yield from _layer("encoder.conv_norm_out", widths[-1])
    yield from _layer("encoder.conv_out", 2 * latent, widths[-1], 3, 3)
    before = widths[0]
    for level, width in enumerate(widths):
        block = f"encoder.down_blocks.{level}"
        if level < len(widths) - 1:
            yield from _layer(f"{block}.downsamplers.0.conv", width, width, 3, 3)
        for i in range(config.layers_per_block):
            yield from _resnet(f"{block}.resnets.{i}", before, width)
            before = width
    yield from middle("encoder")
    if config.use_post_quant_conv:
        yield from _layer("post_quant_conv", latent, latent, 1, 1)
    if config.use_quant_conv:
        yield from _layer("quant_conv", 2 * latent, 2 * latent, 1, 1)


def _text_encoder(config: TextConfig) -> Named:
    width = config.hidden_size
    yield "text_model.embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    yield "text_model.embeddings.token_embedding.weight", (config.vocab_size, width)
    for layer in (f"text_model.encoder.layers.{i}" for i in range(config.num_hidden_layers)):
        for i in (1, 2):
            yield from _layer(f"{layer}.layer_norm{i}", width)
        yield from _layer(f"{layer}.mlp.fc1", config.intermediate_size, width)
        yield from _layer(f"{layer}.mlp.fc2", width, config.intermediate_size)
        for name in ("k_proj", "out_proj", "q_proj", "v_proj"):
            yield from _layer(f"{layer}.self_attn.{name}", width, width)
    yield from _layer("text_model.final_layer_norm", width)
