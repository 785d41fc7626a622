"""A ladder: one small U-Net that runs beside the frozen experts and weights their predictions at each pixel.

If the data are a mixture of what the experts know, the best prediction is linear in theirs: at each pixel their mean,
weighted by the probability that this region is an expert's (Decentralized Diffusion Models, arXiv 2501.05450). So the
experts stay on their own trajectories, and the ladder estimates these probabilities. At each of its levels it reads the
experts' features of that level (a side network as in Ladder Side-Tuning, arXiv 2206.06522), which are computed anyway.
Without the experts' features it is a router that can run before them (``features=False``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.afa import Remat
from afa_jax.mesh.experts import Shared, contract_experts, map_experts, weighted_sum
from afa_jax.models.attention import Transformer2D
from afa_jax.models.conditioning import Conditioning, join_rows
from afa_jax.models.configs import UNetConfig
from afa_jax.models.layers import Conv, GroupNorm, Linear, timestep_embedding
from afa_jax.models.resnet import Downsample, ResnetBlock, Upsample
from afa_jax.models.unet import Stage, TimeEmbeddingMLP, UNet, size_at
from afa_jax.trees import axis_size
from afa_jax.types import Feature, Features, Latents, Maps, SiteMaps, Timesteps

Taps = Mapping[int, Any]
"""By a stage's index the experts' features after it, ``[n, b, h, w, c]`` of the stage's own size and width."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The ladder's architecture, and the parts that an ablation leaves out.

    Attributes:
        block_out_channels: width of each level; no more levels than the experts have.
        heads: of the attention, which all levels but the first have, and the middle.
        norm_num_groups: of the group norms.
        features: read the experts' features and predictions. Without, the ladder runs before the experts.
        previous: read the clean latents that the step before predicted (self-conditioning, Chen et al. 2022, arXiv
            2208.04202); in training, half of the rows read none.
        global_logits: add a logit for the whole picture, of prompt and timestep, to each pixel's own.
        residual: add a correction that the ladder itself predicts, which starts at zero, to the weighted mean.
        gates: mix the experts' features on the way up too, by gates a channel that start at zero.
        pseudo_weight: lambda, the weight of ``KL(p || maps)`` in the loss, where p is the experts' posterior at each
            pixel given the true noise: ``softmax(-error / (tau * mean error))``.
        pseudo_temperature: tau.
        pseudo_rows: lambda falls to zero linearly over so many rows of the run; 0 keeps it.
    """

    block_out_channels: tuple[int, ...] = (64, 128, 128)
    heads: int = 4
    norm_num_groups: int = 8
    features: bool = True
    previous: bool = True
    global_logits: bool = True
    residual: bool = False
    gates: bool = False
    pseudo_weight: float = 0.1
    pseudo_temperature: float = 0.2
    pseudo_rows: int = 0

    def check(self, expert: UNetConfig) -> None:
        """Raise InputError for more levels than the experts have, or fields that do not fit one another."""
        levels, most = len(self.block_out_channels), len(expert.block_out_channels)
        if not 1 <= levels <= most:
            raise InputError(f"fusion.block_out_channels has {levels} levels; choose 1 to {most}, as the experts have")
        for field in ("heads", "norm_num_groups"):
            if getattr(self, field) < 1:
                raise InputError(f"fusion.{field}={getattr(self, field)}; choose 1 or more")
            for width in self.block_out_channels:
                if width < 1 or width % getattr(self, field):
                    raise InputError(
                        f"fusion.{field}={getattr(self, field)} does not divide fusion.block_out_channels={width}"
                    )
        if self.gates and not self.features:
            raise InputError("fusion.gates: they mix the experts' features; choose features=True")
        if not self.pseudo_weight >= 0:
            raise InputError(f"fusion.pseudo_weight={self.pseudo_weight}; choose 0 or more")
        if not self.pseudo_temperature > 0:
            raise InputError(f"fusion.pseudo_temperature={self.pseudo_temperature}; choose more than 0")


@dataclasses.dataclass(frozen=True)
class Climb:
    """The ladder's state between two rungs: its feature, the skips that are left, and what every rung hears."""

    x: Any
    skips: tuple[Any, ...]
    temb: Any
    text: Any


class Gate(nnx.Module):
    """A factor for each channel, which starts at zero."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Array) -> Array:
        return x * self.scale[...].astype(x.dtype)


class Rung(nnx.Module):
    """A level of the ladder: the experts' features of the level come in, then a residual block and attention.

    Attributes:
        at: index of the expert's stage whose output it reads.
        takes_skip, leaves_skip: as a Stage's.
        resample: halves or doubles what comes from the rung before; None leaves its size.
        gate: lets the mixed features in to the experts; None without gates.
    """

    def __init__(
        self,
        config: LadderConfig,
        stage: Stage,
        at: int,
        experts: int,
        channels: tuple[int, int, int],
        *,
        attention: bool,
        resample: Downsample | Upsample | None = None,
        gated: bool = False,
        leaves_skip: bool = False,
        widths: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        before, skip, after = channels
        self.at, self.level, self.takes_skip, self.leaves_skip = at, stage.level, skip > 0, leaves_skip
        self.resample = resample
        self.tap = Conv(experts * stage.channels, before + skip, 1, rngs=rngs) if config.features else None
        groups = config.norm_num_groups
        self.res_block = ResnetBlock(before + skip, after, widths[0], groups=groups, eps=1e-6, rngs=rngs)
        self.transformer = (
            Transformer2D(after, config.heads, widths[1], layers=1, groups=groups, zero=True, rngs=rngs)
            if attention
            else None
        )
        self.gate = Gate(stage.channels) if gated else None
        self.gate_logits = Conv(after, experts, 1, bias=False, zero=True, rngs=rngs) if gated else None

    def __call__(self, climb: Climb, features: Features | None, size: tuple[int, int]) -> Climb:
        """Return the state after this rung; ``features`` are the experts' at this rung's stage."""
        x, skips = climb.x, climb.skips
        if isinstance(self.resample, Upsample):
            x = self.resample(x, size)
        elif self.resample is not None:
            x = self.resample(x)
        if self.takes_skip:
            x, skips = jnp.concatenate([x, skips[-1]], -1), skips[:-1]
        if self.tap is not None and features is not None:
            x = x + _side_by_side(self.tap, _unit(features))
        x = self.res_block(x, climb.temb)
        if self.transformer is not None:
            x = self.transformer(x, climb.text)
        return dataclasses.replace(climb, x=x, skips=(*skips, x) if self.leaves_skip else skips)

    def mixed(self, climb: Climb, features: Features) -> Features:
        """Return the experts' features with their weighted mean let in through the gate."""
        if self.gate is None or self.gate_logits is None:
            return features
        logits = jnp.moveaxis(self.gate_logits(climb.x).astype(jnp.float32), -1, 0)
        mean = weighted_sum(jax.nn.softmax(logits, axis=0), features)
        return features + self.gate(mean - features)


def _side_by_side(conv: Conv, features: Features) -> Array:
    """Return a 1x1 convolution of the experts' concatenated channels."""
    assert conv.bias is not None
    return contract_experts(features, conv.kernel[...][0, 0]) + conv.bias[...]


def _unit(features: Features) -> Features:
    """Scale each pixel of each expert to a mean square of one, in float32: widths of features differ by site."""
    square = jnp.square(features.astype(jnp.float32)).mean(-1, keepdims=True)
    return (features * jax.lax.rsqrt(square + 1e-6)).astype(jnp.float32)


class Head(nnx.Module):
    """What ends the ladder: the experts' predictions come in, logits and a correction go out; both start at zero."""

    def __init__(self, config: LadderConfig, experts: int, unet: UNetConfig, *, width: int, time: int, rngs: nnx.Rngs):
        self.tap = Conv(experts * unet.out_channels, width, 1, rngs=rngs) if config.features else None
        self.res_block = ResnetBlock(width, width, time, groups=config.norm_num_groups, eps=1e-6, rngs=rngs)
        self.norm = GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.logits = Conv(width, experts, 1, zero=True, rngs=rngs)
        self.residual = Conv(width, unet.out_channels, zero=True, rngs=rngs) if config.residual else None

    def __call__(self, climb: Climb, predictions: Features | None) -> tuple[Maps, Feature | None]:
        """Return the logits ``[n, b, h, w]`` and the correction of the prediction, both float32."""
        x = climb.x
        if self.tap is not None and predictions is not None:
            x = x + _side_by_side(self.tap, predictions.astype(jnp.float32))
        x = jax.nn.silu(self.norm(self.res_block(x, climb.temb)))
        return jnp.moveaxis(self.logits(x), -1, 0), None if self.residual is None else self.residual(x)


class GlobalLogits(nnx.Module):
    """A logit an expert for the whole picture, of timestep and mean text state; it starts at zero."""

    def __init__(self, experts: int, time: int, text: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(time + text, time, rngs=rngs)
        self.linear_2 = Linear(time, experts, zero=True, rngs=rngs)

    def __call__(self, temb: Array, text: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(jnp.concatenate([temb, text.mean(1)], -1))))


class Ladder(nnx.Module):
    """The trainable part (a TrainedFusion, fusion/registry.py): untrained, it averages the predictions.

    Attributes:
        at: index of the one stage whose outputs are weighted: the last.
        rungs: down, middle and up, in the order in which the experts' stages come.
    """

    kind: ClassVar[str] = "ladder"
    Config: ClassVar[type] = LadderConfig
    spreads: ClassVar[bool] = False
    rematerialises: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def __init__(
        self, config: LadderConfig, experts: int, stages: Sequence[Stage], unet: UNetConfig, *, rngs: nnx.Rngs
    ):
        config.check(unet)
        self.config, self.experts, self.at = config, experts, (len(stages) - 1,)
        widths = config.block_out_channels
        time, text = 4 * widths[0], unet.cross_attention_dim
        self.width, self.channels = widths[0], unet.in_channels
        self.time_embedding = TimeEmbeddingMLP(widths[0], time, rngs=rngs)
        self.text = Conv(experts * text, text, 1, rngs=rngs)
        self.conv_in = Conv(unet.in_channels * (2 if config.previous else 1), widths[0], rngs=rngs)
        self.rungs = nnx.List(_rungs(config, experts, stages, time, text, rngs))
        self.head = Head(config, experts, unet, width=widths[0], time=time, rngs=rngs)
        self.globally = GlobalLogits(experts, time, text, rngs=rngs) if config.global_logits else None

    def start(self, latents: Latents, previous: Latents, t: Timesteps, conditioning: Conditioning) -> Climb:
        """Return the state before the first rung."""
        temb = self.time_embedding(timestep_embedding(t, self.width))
        # The experts' text states side by side, as SABW's conv_in has their features.
        states = conditioning.text.astype(jnp.float32)[:, :, :, None]
        text = _side_by_side(self.text, states)[:, :, 0]
        x = jnp.concatenate([latents, previous], -1) if self.config.previous else latents
        return Climb(self.conv_in(x.astype(jnp.float32)), (), temb, text)

    def finish(self, climb: Climb, predictions: Features | None) -> tuple[Maps, Feature | None]:
        """Return the maps and the correction of the prediction (None without one)."""
        logits, residual = self.head(climb, predictions)
        if self.globally is not None:
            logits = logits + self.globally(climb.temb, climb.text).T[:, :, None, None]
        return jax.nn.softmax(logits, axis=0), residual

    def weigh(self, latents: Latents, t: Timesteps, conditioning: Conditioning, previous: Latents) -> Maps:
        """Return the maps before the experts run, as sparse execution asks for them."""
        climb = self.start(latents, previous, t, conditioning)
        for rung in self.rungs:
            climb = rung(climb, None, size_at(latents.shape[1:3], rung.level))
        return self.finish(climb, None)[0]

    def site_names(self, unet: UNet) -> list[str]:
        """Return the name of the last stage, whose output is the prediction."""
        return [unet.stages[-1].name]

    def assemble(
        self, unet: UNet, text_encoder: Any, schedule: NoiseSchedule, remat: Remat = "none"
    ) -> tuple[LadderEnsemble, Any]:
        """Return the Denoiser of this ladder and N experts, and the text encoders whose states it takes."""
        kind = RecallingLadder if self.config.previous else LadderEnsemble
        return kind(experts=unet, ladder=self, schedule=schedule), text_encoder


def _rungs(
    config: LadderConfig, experts: int, stages: Sequence[Stage], time: int, text: int, rngs: nnx.Rngs
) -> list[Rung]:
    """Return the rungs: down each level, the middle, up each level."""
    widths = config.block_out_channels
    last = len(widths) - 1

    def last_of(level: int, *, up: bool) -> int:
        """Return the index of the last stage of a level with features of its own on the way down or up."""
        found = [
            index
            for index, stage in enumerate(stages[:-1])
            if stage.level == level
            and (stage.takes_skip if up else stage.leaves_skip and not hasattr(stage, "downsampler"))
        ]
        return found[-1]

    def rung(at: int, channels: tuple[int, int, int], *, attention: bool = True, **more: Any) -> Rung:
        own: dict[str, Any] = dict(attention=attention, widths=(time, text), rngs=rngs)
        return Rung(config, stages[at], at, experts, channels, **own, **more)

    middle = next(index for index, stage in enumerate(stages) if not stage.takes_skip and not stage.leaves_skip)
    rungs = []
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        halve = Downsample(before, rngs=rngs) if level else None
        at = last_of(level, up=False)
        rungs.append(rung(at, (before, 0, width), attention=level > 0, resample=halve, leaves_skip=True))
    if stages[middle].level == last:
        rungs.append(rung(middle, (widths[last], 0, widths[last]), gated=config.gates))
    for level in range(last, -1, -1):
        before = widths[min(level + 1, last)]
        double = Upsample(before, rngs=rngs) if level < last else None
        channels = (before, widths[level], widths[level])
        at = last_of(level, up=True)
        rungs.append(rung(at, channels, attention=level > 0, resample=double, gated=config.gates))
    return rungs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderEnsemble:
    """A Denoiser: N experts that run apart, with a Ladder beside them.

    Attributes:
        experts: a stack of N U-Nets.
        ladder: a Ladder.
        schedule: the experts' noise schedule.
    """

    experts: Any
    ladder: Any
    schedule: NoiseSchedule

    def __call__(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Latents:
        """Return the fused prediction, float32."""
        return self.with_maps(latents, t, conditioning)[0]

    def with_maps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> tuple[Latents, SiteMaps]:
        """Return the fused prediction and the one site's maps.

        Raises:
            ValueError: the numbers of text states and experts differ.
        """
        prediction, maps, _ = self.predict(latents, t, conditioning, jnp.zeros_like(latents))
        return prediction, (maps,)

    def predict(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, previous: Latents
    ) -> tuple[Latents, Maps, Features]:
        """Return the fused prediction, the maps and each expert's own prediction, float32.

        Args:
            previous: the clean latents that the step before predicted; zeros where there was none.
        """
        if self.ladder.config.gates:
            return self._climb_together(latents, t, conditioning, previous)
        return self._fuse(self._taps(latents, t, conditioning), latents, t, conditioning, previous)

    def _taps(self, latents: Latents, t: Timesteps, conditioning: Conditioning) -> Taps:
        """Return the experts' features at the stages that the ladder reads, and their predictions."""
        wanted = {*(rung.at for rung in self.ladder.rungs if self.ladder.config.features), *self.ladder.at}
        return {
            index: features for index, features in _by_stage(self.experts, latents, t, conditioning) if index in wanted
        }

    def _fuse(
        self,
        taps: Taps,
        latents: Latents,
        t: Timesteps,
        conditioning: Conditioning,
        previous: Latents,
    ) -> tuple[Latents, Maps, Features]:
        ladder, predictions = self.ladder, taps[self.ladder.at[0]].astype(jnp.float32)
        climb = ladder.start(latents, previous, t, conditioning)
        for rung in ladder.rungs:
            climb = rung(climb, taps.get(rung.at), size_at(latents.shape[1:3], rung.level))
        return self._mix(climb, predictions)

    def _climb_together(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, previous: Latents
    ) -> tuple[Latents, Maps, Features]:
        """Do as ``_fuse`` while the experts run, whose next stages get what the gates let in."""
        climb = self.ladder.start(latents, previous, t, conditioning)
        rungs = {rung.at: rung for rung in self.ladder.rungs}
        stages = _by_stage(self.experts, latents, t, conditioning)
        index, features = next(stages)
        while index != self.ladder.at[0]:
            if index in rungs:
                climb = rungs[index](climb, features, size_at(latents.shape[1:3], rungs[index].level))
                features = rungs[index].mixed(climb, features)
            index, features = stages.send(features)
        return self._mix(climb, features.astype(jnp.float32))

    def _mix(self, climb: Climb, predictions: Features) -> tuple[Latents, Maps, Features]:
        maps, residual = self.ladder.finish(climb, predictions)
        fused = weighted_sum(maps, predictions)
        return fused if residual is None else fused + residual, maps, predictions

    def training_pass(
        self, latents: Latents, t: Timesteps, conditioning: Conditioning, keys: Array
    ) -> tuple[Latents, tuple[SiteMaps, Any]]:
        """Return the fused prediction, the maps, and what ``penalty`` needs.

        Half of the rows read the clean latents of a first pass, whose gradient is not taken.

        Args:
            keys: ``[b]``, a key for each row.
        """
        previous = jnp.zeros_like(latents)
        if not self.ladder.config.previous:
            prediction, maps, predictions = self.predict(latents, t, conditioning, previous)
            return prediction, ((maps,), predictions)
        taps = None if self.ladder.config.gates else self._taps(latents, t, conditioning)

        def once(previous: Latents) -> tuple[Latents, Maps, Features]:
            if taps is None:
                return self.predict(latents, t, conditioning, previous)
            return self._fuse(taps, latents, t, conditioning, previous)

        guess = jax.lax.stop_gradient(self.schedule.clean(latents, once(previous)[0], t))
        reads = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
        prediction, maps, predictions = once(jnp.where(reads, guess, previous))
        return prediction, ((maps,), predictions)

    def penalty(self, maps: SiteMaps, predictions: Features, target: Latents, position: Array) -> Array:
        """Return ``lambda KL(p || maps)`` of each row ``[b]``; p is the experts' posterior given the target.

        Args:
            target: the true noise, or what the schedule's prediction type has in its place.
            position: of the rows in the run.
        """
        config = self.ladder.config
        errors = jnp.square(predictions - target).mean(-1)
        scale = config.pseudo_temperature * errors.mean(0, keepdims=True) + 1e-12
        posterior = jax.lax.stop_gradient(jax.nn.softmax(-errors / scale, axis=0))
        divergence = (posterior * (jnp.log(posterior + 1e-12) - jnp.log(maps[0] + 1e-12))).sum(0).mean((1, 2))
        left = jnp.maximum(0.0, 1 - position / config.pseudo_rows) if config.pseudo_rows else 1.0
        return config.pseudo_weight * left * divergence

    @property
    def sites(self) -> list[str]:
        """Return the name of the one site, the prediction."""
        return [self.experts.stages[-1].name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallingLadder(LadderEnsemble):
    """A LadderEnsemble that is a PathDenoiser too: its memory is the clean latents that the last step predicted."""

    def start(self, latents: Latents) -> Array:
        """Return the memory before the first step, zeros ``[2b, h, w, c]``, unconditional rows first."""
        return jnp.zeros((2 * latents.shape[0], *latents.shape[1:]))

    def guided(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Array,
    ) -> tuple[Latents, Array]:
        """Return the guided prediction, and the clean latents that each half predicted without guidance."""
        (prediction, _), memory = self.guided_with_maps(latents, t, conditional, unconditional, scale, memory)
        return prediction, memory

    def guided_with_maps(
        self,
        latents: Latents,
        t: Timesteps,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: Any,
        memory: Array,
    ) -> tuple[tuple[Latents, SiteMaps], Array]:
        """Return the guided prediction with the conditional half's maps, and the memory."""
        rows = latents.shape[0]
        if isinstance(scale, int | float) and scale == 1:
            prediction, maps, _ = self.predict(latents, t, conditional, memory[rows:])
            clean = self.schedule.clean(latents, prediction, t)
            return (prediction, (maps,)), jnp.concatenate([memory[:rows], clean])
        both, twice = jnp.concatenate([latents, latents]), jnp.concatenate([t, t])
        predictions, maps, _ = self.predict(both, twice, join_rows(unconditional, conditional), memory)
        u, c = jnp.split(predictions, 2)
        return (u + scale * (c - u), (maps[:, rows:],)), self.schedule.clean(both, predictions, twice)


for _cls in (LadderEnsemble, RecallingLadder):
    jax.tree_util.register_dataclass(_cls, data_fields=["experts", "ladder"], meta_fields=["schedule"])


def _by_stage(
    experts: Any, latents: Latents, t: Timesteps, conditioning: Conditioning
) -> Generator[tuple[int, Any], Any, None]:
    """Yield each stage's index and the experts' features after it; what is sent back goes on in their place.

    Raises:
        ValueError: the numbers of text states and experts differ.
    """
    if axis_size(conditioning) != axis_size(experts):
        raise ValueError(f"text states of {axis_size(conditioning)} experts for a stack of {axis_size(experts)}")
    temb = map_experts(lambda unet, own, t: unet.embed(t, own), experts, conditioning, Shared(t))
    context = conditioning.text.astype(experts.dtype)
    x: Any = Shared(latents.astype(experts.dtype))
    skips: list[Any] = []
    for index, stage in enumerate(experts.stages):
        skip = skips.pop() if stage.takes_skip else Shared(None)
        size = size_at(latents.shape[1:3], stage.level)

        def of_one(stage: Any, x: Array, temb: Array, context: Array, skip: Array | None, size: Any = size) -> Array:
            return stage(x, temb, context, skip, size)

        features = map_experts(of_one, stage, x, temb, context, skip)
        sent = yield index, features
        x = features if sent is None else sent
        if stage.leaves_skip:
            skips.append(x)
