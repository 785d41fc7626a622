"""Training single models: the command, and what it and train_vae add: audible text and whitened latents."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from afa_jax import convert, finetune
from afa_jax.cli.commands import load_config, run
from afa_jax.data.loader import loading
from afa_jax.data.sources import BadExample, make_source
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.fusion.rivals.time_experts import TimeExperts, binary_tree_edges, uniform_edges
from afa_jax.mesh.parallel import make_mesh
from afa_jax.models.clip import TextEncoder
from afa_jax.models.unet import UNet
from afa_jax.training.finetune import make_text_audible
from afa_jax.training.losses import diffusion_loss
from afa_jax.training.model_step import init_state, make_model_step, rows_at
from afa_jax.training.pictures import encode_scenes
from afa_jax.training.vae import MAX_GAIN, whiten
from afa_jax.trees import flatten
from afa_jax.weights.load import load_text_encoder, load_unet
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.commands.conftest import TOKENIZER, says_nothing_of


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
        one, other = unet(x, jnp.array([500, 500]), text_encoder.encode(jnp.asarray(ids)))
        return float(jnp.abs(one - other).mean() / jnp.abs(one).mean())

    assert difference(True) > 1.5 * difference(False)


def test_pictures_of_any_size_are_cut_and_bad_ones_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(66):
        pixels = rng.integers(0, 256, (16 + i % 3, 20 + i, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("octopus")
    (tmp_path / "01.png").write_text("no picture")
    data = ConfigDict(dict(kind="folder", path=str(tmp_path), captions="", bad="skip", size=(16, 16)))
    source, crop = make_source(data), loading(data)["crop"]
    arguments = (tiny.vae(0), Tokenizer(TOKENIZER.parent), make_mesh(dict(data=-1)))
    made = encode_scenes(source, 64, *arguments, crop=crop, bad="skip")
    assert made["latents"].shape == (64, 4, 4, 4) and len(made["ids"]) == 64
    np.testing.assert_array_equal(
        encode_scenes(source, 64, *arguments, crop=crop, bad="skip")["latents"], made["latents"]
    )
    every = encode_scenes(source, 0, *arguments, crop=crop, bad="skip")  # all 65, one more than at once
    assert len(every["latents"]) == len(every["ids"]) == 65
    np.testing.assert_array_equal(every["latents"][:64], made["latents"])
    with pytest.raises(BadExample, match=r"01\.png"):
        encode_scenes(source, 64, *arguments, crop=crop)
    with pytest.raises(InputError, match="scenes=128, but of data only 65 pictures can be read"):
        encode_scenes(source, 128, *arguments, crop=crop, bad="skip")


CONFIGS = Path(__file__).parents[2] / "configs"


def test_timesteps_are_drawn_from_the_interval_and_all_of_it():
    schedule, latents = NoiseSchedule(), jnp.zeros((2048, 1, 1, 4))
    keys = jax.random.split(jax.random.key(0), len(latents))
    met: list[np.ndarray] = []

    def predict(x, t):
        met.append(np.asarray(t))
        return x

    def loss(timesteps=None, gamma=0.0):
        return float(diffusion_loss(predict, schedule, latents, keys, min_snr_gamma=gamma, timesteps=timesteps))

    loss((200, 300))
    assert set(met[-1]) == set(range(200, 300))
    counts = np.bincount(met[-1] - 200, minlength=100)
    assert np.square(counts - 20.48).sum() / 20.48 < 149  # chi-squared of 99 degrees of freedom, 99.9 %
    loss((999, 1000), gamma=5.0)
    assert set(met[-1]) == {999}
    # Without an interval the draws are what they were before there were intervals: all timesteps, from the same keys.
    everything = loss()
    expected = [jax.random.randint(jax.random.split(key)[0], (), 0, 1000) for key in keys[:16]]
    np.testing.assert_array_equal(met[-1][:16], expected)
    assert loss((0, 1000)) == everything and met[-1].min() < 10 and met[-1].max() > 990


def test_an_expert_of_an_interval_from_a_single_file(root, tmp_path, capsys):
    """It learns, resumes bit for bit and remembers its interval; what is wrong is refused before it is written."""
    single = tmp_path / "a.safetensors"
    assert run(convert.main, [f"{root}/a", "--out", str(single)]) == 0

    def train(workdir: str, *more: str) -> int:
        overrides = dict(init=single, vae=f"{root}/base", batch=8, scenes=64, save_every=1, log_every=1, steps=2)
        arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
        config = f"{CONFIGS / 'emoji_time.py'}:high"
        return run(finetune.main, ["--config", config, "--workdir", str(tmp_path / workdir), *arguments, *more])

    def parameters(path: Path) -> dict[str, jax.Array]:
        return flatten((load_unet(path), load_text_encoder(path)))

    assert train("whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "2")
    assert train("parts", "--resume") == 0
    whole, parts = (parameters(tmp_path / workdir / "model") for workdir in ("whole", "parts"))
    before = parameters(single)
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    assert any(float(jnp.abs(whole[name] - before[name]).max()) > 1e-4 for name in whole)
    assert open_checkpoint(tmp_path / "parts" / "model").metadata["timesteps"] == "750 <= t < 1000"
    assert says_nothing_of(str(tmp_path), tmp_path / "whole") > 5 and says_nothing_of(str(root), tmp_path / "whole")

    # Of another run it is neither continued nor, when finished, named anew.
    config_json = (tmp_path / "parts" / "config.json").read_text()
    for other in (f"--config.init={root}/b", "--config.data.seed=77", "--config.timesteps=(0, 250)"):
        capsys.readouterr()
        assert train("parts", "--resume", other) == 2
        field = other.split("=")[0].split(".")[1]
        assert f"was trained on other data ({field} changed)" in capsys.readouterr().err
    assert (tmp_path / "parts" / "config.json").read_text() == config_json
    assert open_checkpoint(tmp_path / "parts" / "model").metadata["timesteps"] == "750 <= t < 1000"
    for wrong in ("(500, 500)", "(-1, 500)", "(0, 1001)", "(0, 1, 2)", "(0.0, 0.5)"):
        capsys.readouterr()
        assert train("bad", f"--config.timesteps={wrong}") == 2
        assert f"timesteps={wrong}" in (said := capsys.readouterr().err) and (
            "low < high" in said or "2 values" in said
        )
        assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "bad").exists()


def test_memory_is_saved_and_nothing_else_changes():
    """Rematerialised or in parts it is the same step; each epoch takes every picture once, in an order of its own."""
    unet, text_encoder = tiny.unet(0, tiny.MICRO_UNET), tiny.text_encoder(1)
    rng = np.random.default_rng(0)
    batch = dict(
        latents=jnp.asarray(rng.standard_normal((4, 8, 8, 4)), jnp.float32),
        ids=jnp.asarray(rng.integers(1, 99, (4, 16)), jnp.int32),
    )
    shapes, optimizer = jax.eval_shape(lambda: (unet, text_encoder)), optax.sgd(1.0)

    def stepped(**options):
        step = make_model_step(
            shapes, optimizer, NoiseSchedule(), no_caption=jnp.zeros(16, jnp.int32), caption_dropout=0.5, **options
        )
        params = jax.tree.map(jnp.copy, flatten((unet, text_encoder)))  # the step takes their memory
        return step(init_state(params, optimizer, options.get("ema", 0.0)), batch, jax.random.key(0))

    state, metrics = stepped(ema=0.5)
    assert float(metrics["gradient_norm"]) > 0.1 and "average" in state
    other, measured = stepped(accumulate=2, remat="stage")
    assert float(measured["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert "average" not in other
    for name, array in state["params"].items():
        np.testing.assert_allclose(other["params"][name], array, rtol=1e-4, atol=2e-5, err_msg=name)

    rows = np.concatenate([rows_at(step, 8, 5, seed=3) for step in range(5)]).reshape(8, 5)
    assert (np.sort(rows, 1) == np.arange(5)).all() and len({tuple(row) for row in rows.tolist()}) > 4
    assert (rows_at(7, 4, 1, seed=0) == 0).all()


def test_a_few_pictures_are_enough_and_a_model_has_what_it_needs(root, tmp_path, capsys):
    """``init`` alone: VAE, tokenizer and schedule are its own; all pictures, fewer than a batch."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 64, 3), np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("octopus, noto style")
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict(dict(\n"
        f"        name='few', init={str(root / 'a')!r}, steps=1, batch=8, log_every=1, ema=0.5, remat='stage',\n"
        f"        data=dict(kind='folder', path={str(pictures)!r}, size=(32, 64)),\n    ))\n"
    )
    arguments = ["--config", f"{tmp_path}/config.py", "--workdir", str(tmp_path / "run")]
    assert run(finetune.main, [*arguments, "--config.accumulate=3"]) == 2
    assert "batch=8; choose a multiple of 24" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run(finetune.main, arguments) == 0
    made, start = open_checkpoint(tmp_path / "run" / "model"), open_checkpoint(root / "a")
    assert set(made.components) == set(start.components)
    assert made.sha256("vae") and made.sha256("unet") != start.sha256("unet")


def test_the_leaves_cover_the_time_axis_without_overlap():
    for names, edges in (
        (("low", "middle", "high"), binary_tree_edges()),
        (("uniform0", "uniform1", "uniform2"), uniform_edges(3)),
    ):
        intervals = [load_config(f"{CONFIGS / 'emoji_time.py'}:{name}").timesteps for name in names]
        denoiser = TimeExperts(experts=(), edges=edges, order=(0, 1, 2))
        t = np.arange(1000)
        within = np.array([(low <= t) & (t < high) for low, high in intervals])
        assert (within.sum(0) == 1).all()
        np.testing.assert_array_equal(within.argmax(0), denoiser.expert_at(jnp.asarray(t)))
