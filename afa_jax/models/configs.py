"""Architectures as frozen data, read from the config.json files of a diffusers folder."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar

from afa_jax.errors import InputError

C = TypeVar("C")
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# A file's numbers are bounded, because a network is built from them before its weights are read.
_MOST: dict[str, int] = dict(layers_per_block=4, transformer_layers_per_block=10, num_hidden_layers=100)
_MOST_LEVELS, _WIDEST = 6, 2**20
_MAY_BE_NULL = ("sample_size", "eos_token_id")  # fields that do not affect the weights


class ConfigError(InputError):
    """A config.json that this project cannot build: the message names the field and the value."""


def _check_fixed(data: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    for field, allowed in fixed.items():
        if field in data and data[field] not in allowed:
            raise ConfigError(f"{what}: {field}={data[field]!r} is not supported (supported: {list(allowed)})")


def _check_class(data: Mapping[str, Any], expected: str, what: str) -> None:
    name = data.get("_class_name", expected)
    if name not in (expected, f"Flax{expected}"):
        raise ConfigError(f"{what}: expected _class_name {expected!r}, the file says {name!r}")


def _build(cls: type[C], values: Mapping[str, Any], what: str) -> C:
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name], _MOST.get(name, _WIDEST)):
            raise ConfigError(f"{what}: {name}={value!r} is not a value that this field can have")
    try:
        return cls(**{name: float(value) if hints[name] is float else value for name, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _stored(cls: type[Any], data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a class that a config gives, with lists as tuples.

    Raises:
        ConfigError: a field is null that may not be; neither diffusers nor transformers can build such a network.
    """
    values = {}
    for field in dataclasses.fields(cls):
        value = data.get(field.name)
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name in data and field.default and field.name not in _MAY_BE_NULL:
            raise ConfigError(
                f"{what}: {field.name} is null; write what the network has, or remove the line for a default"
            )
    return values


def _side(size: Any) -> Any:
    """Return the first of a size's sides, which only matters to the config in a new folder."""
    return size[0] if isinstance(size, list | tuple) and size else size


def _fits(value: Any, hint: Any, most: int) -> bool:
    """Return whether a value from a file has a field's type and, if it is a number, a possible range."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option, most) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and 0 < len(value) <= _MOST_LEVELS and all(_fits(v, item, most) for v in value)
    if hint is int:
        return type(value) is int and 0 < value <= most
    if hint is float:
        return type(value) in (int, float) and 0 <= value < 2**53
    return type(value) is hint


def _tuple(value: Any, length: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * length


def task_of(in_channels: int, out_channels: int) -> str:
    """Return the task of a U-Net with these channels; for inpainting, its input has more latents and a mask."""
    tasks = {
        0: "text to picture",
        out_channels: "InstructPix2Pix",
        out_channels + 1: "inpainting",
        1: "depth to picture",
    }
    return tasks.get(in_channels - out_channels, "another task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of a UNet2DConditionModel's config.json that vary in the Stable Diffusion 1.x and 2.x families."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    # diffusers' historical naming: this field holds the *number* of heads, per level if it is a tuple.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False  # it asks for float32 logits, which ours always are
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any], what: str = "U-Net config") -> UNetConfig:
        """Read a config.json, already parsed. ``what`` names it in errors.

        Raises:
            ConfigError: another class, or a field with a value that the Stable Diffusion 1.x/2.x families do not use.
        """
        _check_class(data, "UNet2DConditionModel", what)
        no = (None, False)
        fixed: dict[str, tuple[Any, ...]] = dict.fromkeys(
            (
                "addition_embed_type", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
                "dual_cross_attention", "only_cross_attention", "num_class_embeds", "time_cond_proj_dim",
                "time_embedding_act_fn", "timestep_post_act", "resnet_skip_time_act", "cross_attention_norm",
                "center_input_sample", "time_embedding_dim", "class_embeddings_concat",
                "mid_block_only_cross_attention", "reverse_transformer_layers_per_block",
            ),
            no,
        )  # fmt: skip
        fixed |= dict(
            act_fn=("silu", "swish"),
            attention_type=("default",),
            conv_in_kernel=(3,),
            conv_out_kernel=(3,),
            downsample_padding=(1,),
            mid_block_scale_factor=(1,),
            mid_block_type=("UNetMidBlock2DCrossAttn",),
            resnet_out_scale_factor=(1,),
            resnet_time_scale_shift=("default",),
            time_embedding_type=("positional",),
            dropout=(0,),
        )
        _check_fixed(data, fixed, what)
        if data.get("num_attention_heads") is not None and data.get("attention_head_dim") is None:
            data = {name: value for name, value in data.items() if name != "attention_head_dim"}  # the other counts
        values = _stored(cls, data, what)
        values["sample_size"] = _side(values.get("sample_size", cls.sample_size))
        for field in ("block_out_channels", "cross_attention_dim"):
            if field not in values:
                raise ConfigError(f"{what}: the field {field!r} is missing")
        if not isinstance(values["cross_attention_dim"], int):
            raise ConfigError(f"{what}: cross_attention_dim={values['cross_attention_dim']!r} must be one number")
        return _build(cls, values, what)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for field, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, field)
            if len(types) != levels:
                raise ConfigError(f"{field} has {len(types)} entries, block_out_channels has {levels}")
            if unknown := [name for name in types if name not in known]:
                raise ConfigError(f"{field}: {unknown[0]!r} is not supported (supported: {sorted(known)})")
        for field in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block", "num_attention_heads"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != levels:
                raise ConfigError(f"{field} has {len(value)} entries, block_out_channels has {levels}")
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.heads, strict=True)):
            if width % self.norm_num_groups:
                raise ConfigError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels[{level}]")
            if width % heads:
                raise ConfigError(f"{heads} attention heads do not divide block_out_channels[{level}]={width}")
        if self.freq_shift >= self.block_out_channels[0] // 2:  # sinusoids are divided by the difference
            raise ConfigError(f"freq_shift={self.freq_shift} is not below half of block_out_channels[0]")

    @property
    def task(self) -> str:
        """Return the U-Net's task, see ``task_of``."""
        return task_of(self.in_channels, self.out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Return the number of attention heads on each level."""
        value = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return _tuple(value, len(self.block_out_channels))

    @property
    def layers_per_level(self) -> tuple[int, ...]:
        """Return the number of down layers on each level; the up side has one more."""
        return _tuple(self.layers_per_block, len(self.block_out_channels))

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Return the number of transformer blocks in each spatial transformer, by level."""
        return _tuple(self.transformer_layers_per_block, len(self.block_out_channels))

    @property
    def down_attention(self) -> tuple[bool, ...]:
        """Return for each down block whether its layers have a transformer."""
        return tuple(_DOWN[name] for name in self.down_block_types)

    @property
    def up_attention(self) -> tuple[bool, ...]:
        """Return for each up block whether its layers have a transformer, lowest resolution first."""
        return tuple(_UP[name] for name in self.up_block_types)

    @property
    def time_width(self) -> int:
        """Return the width of the time embedding."""
        return 4 * self.block_out_channels[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The fields of an AutoencoderKL's config.json that vary."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any], what: str = "VAE config") -> VAEConfig:
        """Read a config.json, already parsed.

        Raises:
            ConfigError: another class, or an unsupported field value.
        """
        _check_class(data, "AutoencoderKL", what)
        fixed: dict[str, tuple[Any, ...]] = dict(
            act_fn=("silu", "swish"),
            shift_factor=(None, 0.0),
            latents_mean=(None,),
            latents_std=(None,),
            mid_block_add_attention=(True,),
        )
        _check_fixed(data, fixed, what)
        for field, expected in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = data.get(field, ())
            if wrong := [name for name in types if name != expected] if isinstance(types, list | tuple) else [types]:
                raise ConfigError(f"{what}: {field}: {wrong[0]!r} is not supported (supported: {expected})")
        values = _stored(cls, data, what)
        if "block_out_channels" not in values:
            raise ConfigError(f"{what}: the field 'block_out_channels' is missing")
        values["sample_size"] = _side(values.get("sample_size", cls.sample_size))
        return _build(cls, values, what)

    def __post_init__(self) -> None:
        for level, width in enumerate(self.block_out_channels):
            if width % self.norm_num_groups:
                raise ConfigError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels[{level}]")
        if not 1e-6 <= self.scaling_factor <= 1e6:
            raise ConfigError(f"scaling_factor={self.scaling_factor} is not between 1e-6 and 1e6")

    @property
    def factor(self) -> int:
        """Return the pixels per latent, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise InputError for pictures whose rows or columns, in pixels, are no multiples of the factor."""
        factor = self.factor
        if any(side < factor or side % factor for side in size):
            near = "x".join(str(max(factor, round(side / factor) * factor)) for side in size)
            raise InputError(f"size {size[0]}x{size[1]}: both sides must be multiples of {factor}, such as {near}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The fields of a CLIPTextModel's config.json that shape the network."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_json(cls, data: Mapping[str, Any], what: str = "text encoder config") -> TextConfig:
        """Read a config.json, already parsed.

        Raises:
            ConfigError: another model, or an unsupported activation.
        """
        if data.get("model_type", "clip_text_model") != "clip_text_model":
            raise ConfigError(
                f"{what}: model_type={data['model_type']!r} is not supported (supported: clip_text_model)"
            )
        values = _stored(cls, data, what)
        for field in ("vocab_size", "hidden_size"):
            if field not in values:
                raise ConfigError(f"{what}: the field {field!r} is missing")
        return _build(cls, values, what)

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ConfigError(f"hidden_act={self.hidden_act!r} is not supported (supported: quick_gelu, gelu)")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
