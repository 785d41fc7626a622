"""What the benchmarks run: the networks and inputs that the command line asks for."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from afa_jax.cli.commands import load_config
from afa_jax.data.sources import make_source
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts.frozen import load_experts
from afa_jax.fusion.afa import FusedUNets, SABWConfig
from afa_jax.fusion.registry import init_fusion
from afa_jax.models.conditioning import Conditioning, encode_prompts
from afa_jax.models.configs import UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.trees import axis_size, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """N experts with their aggregators, and one batch of inputs.

    Attributes:
        config: of the run that they are from.
        experts: a stack of U-Nets; where only shapes are asked for, a stack of shapes.
        aggregators: random, none of their parameters zero; or shapes.
        latents, target: ``[b, h, w, c]``; t: ``[b]``; states: ``[n, b, s, d]``.
    """

    config: ConfigDict
    experts: Any
    aggregators: Any
    schedule: NoiseSchedule
    latents: Any
    target: Any
    t: Any
    conditioning: Any

    @property
    def ensemble(self) -> FusedUNets:
        """The Denoiser, with the defaults."""
        return FusedUNets(experts=self.experts, aggregators=self.aggregators)

    def __str__(self) -> str:
        batch, height, width, _ = self.latents.shape
        channels = ", ".join(map(str, self.experts.config.block_out_channels))
        return (
            f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {axis_size(self.experts)} experts of {channels} "
            f"channels, {self.experts.dtype}, latents {height} x {width}, batch {batch}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``make_case`` reads."""
    parser.add_argument("--config", default="configs/emoji.py")
    parser.add_argument("--width", type=int, help="random experts of SD1.5's architecture, this wide (its own: 320)")
    parser.add_argument("--experts", type=int, default=3, help="how many of those")
    parser.add_argument("--latents", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--batch", type=int, default=8)


def make_case(options: argparse.Namespace, *, dtype: Any = jnp.float32, abstract: bool = False) -> Case:
    """Networks and inputs; the parameters are of the compute dtype. ``abstract``: shapes, with --width only."""
    config = load_config("configs/sd15.py" if options.width else options.config)
    states = None
    sabw = SABWConfig(**config.sabw)
    if options.width:
        unet = UNetConfig(block_out_channels=(options.width, 2 * options.width, 4 * options.width, 4 * options.width))

        def create(seed: int) -> Any:
            return UNet(unet, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=dtype)

        if abstract:
            experts = jax.eval_shape(lambda: stack([create(seed) for seed in range(options.experts)]))
        else:
            one = jax.jit(create)  # compiled once for all
            experts = stack([nonzero(one(seed), seed) for seed in range(options.experts)])
        schedule, size, length = NoiseSchedule(), options.latents or (64, 64), 77
    else:
        loaded = load_experts(config, dtype=dtype, param_dtype=dtype)
        experts, schedule, length = loaded.unet, loaded.schedule, loaded.tokenizer.length
        # Of real captions: on random states these networks are so rough that rounding alone moves a gradient.
        source = make_source(config.data)
        ids = loaded.tokenizer([source[i]["caption"] for i in range(options.batch)])
        states = jax.jit(encode_prompts)(loaded.text_encoder, ids).text.astype(jnp.float32)
        size = options.latents or [side // loaded.vae.config.factor for side in config.sample.size]
    count, unet = axis_size(experts), experts.config

    def inputs() -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(1), 4)
        shape = (options.batch, *size, unet.in_channels)
        return dict(
            aggregators=init_fusion(sabw, experts, count, 0),
            latents=jax.random.normal(keys[0], shape),
            target=jax.random.normal(keys[1], shape),
            t=jax.random.randint(keys[2], (options.batch,), 0, 1000),
            conditioning=Conditioning(
                text=jax.random.normal(keys[3], (count, options.batch, length, unet.cross_attention_dim))
            ),
        )

    made = jax.eval_shape(inputs) if abstract else inputs()
    if states is not None:
        made["conditioning"] = Conditioning(text=states)
    case = Case(config=config, experts=experts, schedule=schedule, **made)
    return case if abstract else dataclasses.replace(case, aggregators=nonzero(case.aggregators))


def nonzero(module: Any, seed: int = 0) -> Any:
    """Small random values for the parameters that start at zero: what is multiplied by them would be no test."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.Array) -> jax.Array:
        values = np.asarray(leaf)
        return leaf if values.any() else jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, module)
