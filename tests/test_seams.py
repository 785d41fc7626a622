"""A new sampler, a new fusion, a new kind of conditioning: each is one file and one line, as here."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from afa_jax.diffusion.samplers.registry import SAMPLERS
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.files import load_fusion, save_fusion
from afa_jax.fusion.registry import FUSIONS, fusion_config, init_fusion
from afa_jax.fusion.rivals.blending import NoiseAverage
from afa_jax.fusion.single import ConstantMaps
from afa_jax.methods.options import SampleOptions
from afa_jax.models.conditioning import Conditioning
from afa_jax.sampling.generation import Request, generate
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten, stack
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.commands.conftest import TOKENIZER

N = 2
SCHEDULE = NoiseSchedule(set_alpha_to_one=True, steps_offset=0)  # the last step leaves no noise
REQUESTS = [Request(prompt="octopus, noto style", number=number) for number in range(2)]


def experts(**networks: Any) -> Experts:
    given = dict(
        unet=stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(N)]),
        text_encoder=stack([tiny.text_encoder(seed) for seed in range(N)]),
        vae=tiny.vae(0),
    )
    return Experts(
        names=("a", "b"), hashes=("", ""), vae_hash="", tokenizer=Tokenizer(TOKENIZER), schedule=SCHEDULE,
        **given | networks,
    )  # fmt: skip


def pictures(denoiser: Any, experts: Experts, **options: Any) -> np.ndarray:
    sampling = SampleOptions(size=(32, 32), batch=2, **options)
    return np.stack([made.pixels for made in generate(REQUESTS, denoiser, experts, seed=1, options=sampling)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    t: Any
    share: Any


jax.tree_util.register_dataclass(Constants, data_fields=["t", "share"], meta_fields=[])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averaging:
    """Goes to the mean of all clean latents that it was told, in two evaluations a step."""

    schedule: NoiseSchedule
    eta: float = 0.0
    adds_noise: ClassVar[bool] = False

    def constants(self, steps: int, strength: float = 1.0) -> Constants:
        t = np.repeat(self.schedule.timesteps(steps), 2)
        return Constants(t=jnp.asarray(t), share=1 / (1 + jnp.arange(len(t), dtype=jnp.float32)))

    def start(self, x: Any) -> Any:
        return jnp.zeros_like(x)

    def step(self, k: Constants, x: Any, prediction: Any, memory: Any, noise: Any) -> tuple[Any, Any]:
        clean = self.schedule.clean(x, prediction, jnp.broadcast_to(k.t, x.shape[:1]))
        memory = memory + k.share * (clean - memory)
        return memory, memory


def test_a_sampler_with_a_memory_and_two_evaluations_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "averaging", Averaging)
    denoiser = FusedUNets(experts=experts().unet, aggregators=ConstantMaps(weights=jnp.full(N, 0.5)))
    toy = pictures(denoiser, experts(), sampler="averaging", steps=2, guidance=2.0)
    assert toy.shape == (2, 32, 32, 3)
    assert (toy != pictures(denoiser, experts(), steps=2, guidance=2.0)).mean() > 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    scale: int = 1


class Toy(nnx.Module):
    """One logit an expert, the same at every site."""

    kind: ClassVar[str] = "toy"
    Config: ClassVar[type] = ToyConfig
    spreads: ClassVar[bool] = False
    rematerialises: ClassVar[bool] = True
    merges: ClassVar[bool] = False

    def __init__(self, config: ToyConfig, experts: int, stages: Any, unet: Any, *, rngs: Any):
        self.config, self.experts, self.at = config, experts, tuple(range(len(stages)))
        self.logits = nnx.Param(jnp.zeros(experts))

    def site_names(self, unet: Any) -> list[str]:
        return [stage.name for stage in unet.stages]

    def assemble(self, unet: Any, text_encoder: Any, schedule: Any, remat: Any = "none") -> tuple[Any, Any]:
        maps = ConstantMaps(weights=jax.nn.softmax(self.config.scale * self.logits[...]))
        return FusedUNets(experts=unet, aggregators=maps, remat=remat), text_encoder


def test_a_fusion_is_trained_and_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(FUSIONS, "toy", Toy)
    own = experts()
    fusion = init_fusion(fusion_config("toy", dict(scale=3)), own.unet, N, 0)
    frozen, optimizer = dict(unet=own.unet, text_encoder=own.text_encoder, vae=own.vae), optax.sgd(1.0)
    rng = np.random.default_rng(0)
    batch: Any = dict(
        image=rng.integers(0, 256, (2, 32, 32, 3), np.uint8), ids=own.tokenizer(["fox", "owl"]), position=np.arange(2)
    )
    step = make_train_step(
        fusion, frozen, optimizer, own.schedule, caption_dropout=0.0, no_caption=jnp.asarray(own.tokenizer([""])[0])
    )
    state, metrics = step(init_state(fusion, optimizer), batch, flatten(frozen), jax.random.key(0))
    assert np.abs(state["params"]["logits"]).max() > 0 and float(metrics["weight_0"]) == pytest.approx(0.5)
    fusion.logits[...] = state["params"]["logits"]
    save_fusion(tmp_path, fusion, dict(experts=[]))
    again = load_fusion(tmp_path, own.unet, N)
    assert again.config == ToyConfig(scale=3)
    np.testing.assert_array_equal(again.logits[...], fusion.logits[...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tinted(Conditioning):
    """Text states, and a colour for each row."""

    tint: Any


jax.tree_util.register_dataclass(Tinted, data_fields=["text", "temb", "tint"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class TintEncoder:
    colour: Any

    def encode(self, ids: Any) -> Tinted:
        rows = len(ids)
        return Tinted(text=jnp.zeros((rows, 1, 1)), tint=jnp.broadcast_to(self.colour, (rows, 4)))


@dataclasses.dataclass(frozen=True)
class Painter:
    """A network that hears the tint alone: its clean latents are that colour."""

    number: Any

    def __call__(self, latents: Any, t: Any, conditioning: Tinted) -> Any:
        alpha = jnp.asarray(SCHEDULE.alphas_cumprod)[t][:, None, None, None]
        colour = conditioning.tint[:, None, None, :]
        return (latents - jnp.sqrt(alpha) * colour) / jnp.sqrt(1 - alpha)


for cls, field in ((TintEncoder, "colour"), (Painter, "number")):
    jax.tree_util.register_dataclass(cls, data_fields=[field], meta_fields=[])


def test_a_kind_of_conditioning_reaches_its_network_and_nothing_between_knows_it() -> None:
    colours = np.asarray([[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 1.0, -0.5]], np.float32)
    own = experts(unet=Painter(jnp.zeros(N)), text_encoder=TintEncoder(jnp.asarray(colours)))
    denoiser = NoiseAverage(experts=own.unet, weights=jnp.asarray([0.25, 0.75]))
    found = pictures(denoiser, own, steps=3, guidance=2.0)
    latents = jnp.broadcast_to(jnp.asarray(0.25 * colours[0] + 0.75 * colours[1]), (1, 8, 8, 4))
    wanted = jax.jit(lambda vae, x: jnp.clip(vae.decode(x), -1, 1))(own.vae, latents)
    assert np.abs(found - (np.asarray(wanted) + 1) * 127.5).max() < 2
