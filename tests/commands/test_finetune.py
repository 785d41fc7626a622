"""Training single models: the command, and what it and train_vae add: audible text and whitened latents."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afa_jax import finetune
from afa_jax.commands import run
from afa_jax.finetune import make_text_audible
from afa_jax.models.clip import TextEncoder
from afa_jax.models.unet import UNet
from afa_jax.train_vae import MAX_GAIN, whiten
from afa_jax.weights.keys import flatten
from afa_jax.weights.load import load_text_encoder, load_unet
from tests import tiny


def test_whitening_changes_the_latents_and_no_picture() -> None:
    vae = tiny.vae(0)
    pictures = jax.random.uniform(jax.random.key(0), (16, 16, 16, 3), minval=-1, maxval=1)
    pictures = pictures * jnp.linspace(0.1, 1, 16)[:, None, None, None]
    mean, logvar = vae.moments(pictures)
    before = vae.decode(vae.encode(pictures))
    vae.config = whiten(vae, np.asarray(mean), np.asarray(logvar))
    np.testing.assert_allclose(vae.decode(vae.encode(pictures)), before, atol=1e-4)
    latents = np.asarray(vae.encode(pictures), np.float64).reshape(-1, vae.config.latent_channels)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std(), 1, rtol=1e-3)
    covariance = np.cov(latents.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3 * covariance.max()
    # A direction gains MAX_GAIN over the strongest, or comes up to it.
    points = np.asarray(mean, np.float64).reshape(latents.shape)
    variances = np.linalg.eigvalsh(np.cov(points.T))
    expected = np.minimum(1, MAX_GAIN**2 * variances / variances[-1])
    np.testing.assert_allclose(np.sort(np.diag(covariance)), np.sort(expected) * covariance.max(), rtol=1e-2)


def test_posterior_variances_stay_in_proportion() -> None:
    """A direction that grows by some factor takes its noise along."""
    vae = tiny.vae(1)
    pictures = jax.random.uniform(jax.random.key(0), (8, 16, 16, 3), minval=-1, maxval=1)
    mean, logvar = map(np.asarray, vae.moments(pictures))
    whiten(vae, mean, logvar)
    whitened, new_logvar = map(np.asarray, vae.moments(pictures))
    # The noise in all directions together, each relative to the latents' spread, is what a rotation cannot change.
    inverse = np.linalg.inv(np.cov(mean.reshape(-1, mean.shape[-1]).T))
    noise = np.diag(np.exp(logvar).reshape(-1, mean.shape[-1]).mean(0))
    new_inverse = np.linalg.inv(np.cov(whitened.reshape(-1, mean.shape[-1]).T))
    new_noise = np.diag(np.exp(new_logvar).reshape(-1, mean.shape[-1]).mean(0))
    np.testing.assert_allclose(np.trace(new_inverse @ new_noise), np.trace(inverse @ noise), rtol=1e-2)


def test_a_new_model_hears_its_prompt() -> None:
    def difference(audible: bool) -> float:
        """How much two prompts' predictions differ, relative to the predictions."""
        key = jax.random.key(0)
        unet, text_encoder = UNet(tiny.SMALL_UNET, rngs=nnx.Rngs(0)), TextEncoder(tiny.TEXT, rngs=nnx.Rngs(1))
        if audible:
            make_text_audible(unet, text_encoder)
        # What starts at zero would hide the text altogether.
        unet = jax.tree.map(lambda w: w if w.ndim < 2 or w.any() else 0.1 * jax.random.normal(key, w.shape), unet)
        ids = np.random.default_rng(0).integers(1, 99, (2, 16)).astype(np.int32)
        ids[1, 2:] = ids[0, 2:]  # two words differ
        x = jnp.repeat(jax.random.normal(key, (1, 8, 8, unet.config.in_channels)), 2, axis=0)
        one, other = unet(x, jnp.array([500, 500]), text_encoder(jnp.asarray(ids)))
        return float(jnp.abs(one - other).mean() / jnp.abs(one).mean())

    assert difference(True) > 1.5 * difference(False)


def test_finetune_changes_the_model_and_resumes_bit_for_bit(root, tmp_path, capsys):
    config = str(Path(__file__).parents[2] / "configs" / "emoji_expert.py")

    def train(workdir: str, *more: str) -> int:
        overrides = dict(init=f"{root}/a", vae=f"{root}/base", batch=8, scenes=64, save_every=1, log_every=1)
        arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
        return run(
            finetune.main, ["--config", f"{config}:food", "--workdir", str(tmp_path / workdir), *arguments, *more]
        )

    assert train("whole", "--config.steps=2") == 0
    assert train("parts", "--config.steps=1") == 0
    assert train("parts", "--config.steps=2", "--resume") == 0
    whole, parts = (
        flatten((load_unet(tmp_path / run / "model"), load_text_encoder(tmp_path / run / "model")))
        for run in ("whole", "parts")
    )
    started = flatten((load_unet(f"{root}/a"), load_text_encoder(f"{root}/a")))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    assert any(float(jnp.abs(whole[name] - started[name]).max()) > 1e-4 for name in whole)
    capsys.readouterr()
    assert train("bad", "--config.steps=2", "--config.scenes=100") == 2
    assert "scenes=100; choose a multiple of 64" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
