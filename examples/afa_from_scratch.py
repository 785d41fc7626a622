"""Adaptive Feature Aggregation (Wang et al., ICLR 2025, arXiv 2405.17082) in one file, for reading.

    python examples/afa_from_scratch.py

Three frozen U-Nets run side by side. After every stage a small trainable module, SABW, looks at their features and says
for each pixel whom to trust; all three go on with the weighted sum. Here are the module, the ensemble, its loss and its
sampler, in plain loops over the experts. What afa_jax adds is devices, memory and formats, and not a different method:
tests/test_from_scratch.py holds the loss, the gradient and the picture of this file to its own.

It trains for 20 steps, two minutes on a CPU, which is enough to see the loss; the shipped aggregators had 1,000.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from afa_jax.data.emoji.scenes import SceneSource
from afa_jax.models.attention import Transformer2D
from afa_jax.models.conditioning import Conditioning
from afa_jax.models.layers import Conv
from afa_jax.models.resnet import ResnetBlock
from afa_jax.models.unet import UNet, size_at
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

MODELS = Path(__file__).parents[1] / "models" / "emoji"
EXPERTS = ("animals", "food", "things")
# The noise schedule of Stable Diffusion: x_t = signal x_0 + sigma noise, with signal^2 + sigma^2 = 1.
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGNAL, SIGMA = jnp.asarray(ALPHAS**0.5, jnp.float32), jnp.asarray((1 - ALPHAS) ** 0.5, jnp.float32)


class SABW(nnx.Module):
    """The Spatial-Aware Block-Wise aggregator of one stage (section 3.2); untrained it averages."""

    def __init__(self, experts: int, channels: int, time_width: int, text_width: int, hidden: int, rngs: nnx.Rngs):
        self.conv_in = Conv(experts * channels, hidden, 1, rngs=rngs)
        self.res_block = ResnetBlock(hidden, hidden, time_width, groups=hidden // 4, eps=1e-6, rngs=rngs)
        self.transformer = Transformer2D(hidden, 4, text_width, layers=1, groups=hidden // 4, rngs=rngs)
        self.conv_out = Conv(hidden, experts, 1, bias=False, zero=True, rngs=rngs)

    def __call__(self, features: list[jax.Array], temb: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the fused feature ``[b, h, w, c]``, and the experts' maps ``[n, b, h, w]``."""
        x = self.conv_in(jnp.concatenate(features, axis=-1))
        x = self.transformer(self.res_block(x, temb), text)
        maps = jax.nn.softmax(self.conv_out(x), axis=-1)
        fused = sum(maps[..., n, None] * feature for n, feature in enumerate(features))
        return jnp.asarray(fused), jnp.moveaxis(maps, -1, 0)


def make_aggregators(unet: UNet, experts: int, hidden: int = 32, seed: int = 0) -> nnx.List:
    """Return one SABW for each stage of a U-Net."""
    config, rngs = unet.config, nnx.Rngs(seed)
    widths = (config.time_width, config.cross_attention_dim)
    return nnx.List([SABW(experts, stage.channels, *widths, hidden, rngs) for stage in unet.stages])


def predict(
    aggregators: nnx.List, unets: list[UNet], latents: jax.Array, t: jax.Array, texts: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the ensemble's prediction for noisy latents ``[b, h, w, c]``, and the maps of each stage.

    Args:
        t: timesteps ``[b]``.
        texts: each expert's own text states of the prompts, ``[b, s, d]``.
    """
    tembs = [unet.embed(t, Conditioning(text=text)) for unet, text in zip(unets, texts, strict=True)]
    mean_temb, mean_text = sum(tembs) / len(unets), sum(texts) / len(unets)
    x, skips, all_maps = latents, [], []
    for index, aggregate in enumerate(aggregators):
        stages = [unet.stages[index] for unet in unets]
        size = size_at(latents.shape[1:3], stages[0].level)
        skip = skips.pop() if stages[0].takes_skip else None
        features = [stage(x, temb, text, skip, size) for stage, temb, text in zip(stages, tembs, texts, strict=True)]
        x, maps = aggregate(features, mean_temb, mean_text)
        all_maps.append(maps)
        if stages[0].leaves_skip:
            skips.append(x)
    return x, all_maps


def loss(
    aggregators: nnx.List,
    unets: list[UNet],
    latents: jax.Array,
    texts: list[jax.Array],
    t: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Return the mean squared error of the predicted velocity (Salimans and Ho 2022); only aggregators learn."""
    signal, sigma = (scale[t][:, None, None, None] for scale in (SIGNAL, SIGMA))
    prediction, _ = predict(aggregators, unets, signal * latents + sigma * noise, t, texts)
    return jnp.square(prediction - (signal * noise - sigma * latents)).mean()


def sample(
    aggregators: nnx.List,
    unets: list[UNet],
    texts: list[jax.Array],
    no_texts: list[jax.Array],
    noise: jax.Array,
    steps: int,
    guidance: float,
) -> jax.Array:
    """Return clean latents, by DDIM (Song et al. 2021) with classifier-free guidance (Ho and Salimans 2022)."""
    both = [jnp.concatenate(pair) for pair in zip(no_texts, texts, strict=True)]
    network, x = jax.jit(predict), noise
    for step in range(steps):
        now = (steps - 1 - step) * (1000 // steps) + 1
        then = max(now - 1000 // steps, 0)
        t = jnp.full(2 * len(x), now)
        without, given = jnp.split(network(aggregators, unets, jnp.concatenate([x, x]), t, both)[0], 2)
        velocity = without + guidance * (given - without)
        clean = SIGNAL[now] * x - SIGMA[now] * velocity
        noise = SIGMA[now] * x + SIGNAL[now] * velocity
        x = SIGNAL[then] * clean + SIGMA[then] * noise
    return x


def main() -> None:
    """Train for 20 steps and make a picture."""
    unets = [load_unet(MODELS / name) for name in EXPERTS]
    text_encoders = [load_text_encoder(MODELS / name) for name in EXPERTS]
    vae, tokenizer = load_vae(MODELS / "base"), Tokenizer(MODELS / "base", text_encoders[0].config)
    scenes = SceneSource(seed=0, mixed=True)

    @jax.jit
    def encode(networks: Any, pixels: jax.Array, ids: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        text_encoders, vae = networks
        latents = vae.encode(pixels / 127.5 - 1)
        return latents, [text_encoder(ids) for text_encoder in text_encoders]

    def batch_of(step: int, size: int = 8) -> tuple[Any, ...]:
        examples = [scenes[step * size + i] for i in range(size)]
        pixels = np.stack([example["image"] for example in examples]).astype(np.float32)
        latents, texts = encode((text_encoders, vae), pixels, tokenizer([example["caption"] for example in examples]))
        t_key, noise_key = jax.random.split(jax.random.key(step))
        t = jax.random.randint(t_key, (size,), 0, 1000)
        return latents, texts, t, jax.random.normal(noise_key, latents.shape)

    aggregators = make_aggregators(unets[0], len(unets))
    optimizer = optax.adam(1e-3)
    state = optimizer.init(aggregators)

    @jax.jit
    def update(aggregators: Any, state: Any, unets: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(aggregators, unets, *batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(aggregators, updates), state, value

    for step in range(20):
        aggregators, state, value = update(aggregators, state, unets, batch_of(step))
        print(f"step {step + 1}: loss {float(value):.4f}", flush=True)

    latents = batch_of(0)[0]
    texts, no_texts = (
        [jax.jit(lambda encoder, ids: encoder(ids))(encoder, tokenizer([prompt])) for encoder in text_encoders]
        for prompt in ("octopus and pizza, noto style", "")
    )
    noise = jax.random.normal(jax.random.key(0), (1, *latents.shape[1:]))
    clean = sample(aggregators, unets, texts, no_texts, noise, steps=10, guidance=3.0)
    pixels = np.asarray(jax.jit(lambda vae, latents: vae.decode(latents))(vae, clean))[0]
    out = Path("afa_from_scratch.png")
    Image.fromarray(np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)).save(out)
    print(out)


if __name__ == "__main__":
    main()
