"""Validation: fixed inputs, so that a difference is one of the parameters."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.experts.frozen import Experts
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.single import ConstantMaps
from afa_jax.methods.options import SampleOptions
from afa_jax.models.conditioning import Conditioning
from afa_jax.training.validation import Pairs, Validation, read_validation
from afa_jax.trees import flatten, stack
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny


class Words(Tokenizer):
    """Token ids from the number of letters."""

    def __init__(self):
        self.length = 16

    def __call__(self, prompts, quiet=False):
        return np.asarray([[len(caption)] * self.length for caption in prompts], np.int32)


@pytest.fixture(scope="module")
def experts():
    return Experts(
        names=("one", "two"),
        hashes=("", ""),
        vae_hash="",
        unet=stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in range(2)]),
        text_encoder=stack([tiny.text_encoder(seed) for seed in range(2)]),
        vae=tiny.vae(0),
        tokenizer=Words(),
        schedule=NoiseSchedule(),
    )


@pytest.fixture(scope="module")
def pairs(experts):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    return Pairs.encode(experts, images, ["a", "bb", "ccc"], batch=2)


def test_pairs_do_not_depend_on_the_batch(experts, pairs):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    together = Pairs.encode(experts, images, ["a", "bb", "ccc"], batch=3)
    np.testing.assert_allclose(pairs.latents, together.latents, atol=1e-5)
    np.testing.assert_allclose(pairs.states, together.states, atol=1e-5)
    assert pairs.states.shape[:2] == (3, 2)


def test_it_is_fixed_and_by_bucket(experts, pairs, tmp_path):
    aggregators = tiny.aggregators(2, tiny.MICRO_UNET, tiny.PLAIN_SABW)
    options = SampleOptions(size=(32, 32), steps=2, guidance=1.0, batch=2)
    validation = Validation(
        tmp_path, experts, aggregators, pairs, buckets=4, batch=2, prompts=("a", "b"), num_images=1, options=options
    )
    fresh = flatten(aggregators)
    first, second = validation(fresh, 10), validation(fresh, 20)
    scalars = {name for name, value in first.items() if np.ndim(value) == 0}
    assert {name: first[name] for name in scalars} == {name: second[name] for name in scalars}
    np.testing.assert_array_equal(first["samples"], second["samples"])
    assert {"val_loss_t0_250", "val_loss_t750_1000"} <= scalars
    np.testing.assert_allclose(
        np.mean([first[f"val_loss_t{t}_{t + 250}"] for t in range(0, 1000, 250)]), first["val_loss"]
    )
    # An untrained ensemble is even.
    even = [first["val_entropy"], first["val_weight_one"], first["val_weight_two"]]
    np.testing.assert_allclose(even, [1, 0.5, 0.5], rtol=1e-5)

    # Parameters that prefer an expert at one site are seen there and nowhere else.
    trained = dict(fresh)
    name = "sites.3.conv_out.kernel"
    trained[name] = jnp.asarray(np.random.default_rng(1).standard_normal(fresh[name].shape) * 9, jnp.float32)
    third = validation(trained, 20)
    assert third["val_loss"] != first["val_loss"]
    lines = read_validation(tmp_path)
    assert [line["step"] for line in lines] == [10, 20]  # measured again, 20 is there once
    site = experts.unet.stages[3].name
    for other, entropy in lines[1]["entropy"].items():
        assert (max(entropy) < 0.99) == (other == site)
        np.testing.assert_allclose(np.sum(lines[1]["weights"][other], 1), 1, atol=1e-3)
    assert len(lines[1]["weights"]) == 5 and len(lines[1]["weights"][site]) == 4
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_00000010.png", "step_00000020.png"]
    with Image.open(tmp_path / "samples" / "step_00000010.png") as picture:
        assert picture.size == (32, 32 * 2 + 4)

    # Samples that are not finite are said and left out; training goes on.
    trained[name] = jnp.full_like(fresh[name], jnp.nan)
    with pytest.warns(UserWarning, match="no samples at step 30: prompt 'a'"):
        assert "samples" not in validation(trained, 30)
    assert not (tmp_path / "samples" / "step_00000030.png").exists()


def test_its_loss_is_the_ensembles_mean_squared_error(experts, pairs, tmp_path):
    """With one bucket a pair, against the definition written out."""
    import jax

    aggregators = tiny.aggregators(2, tiny.MICRO_UNET, tiny.PLAIN_SABW)
    measured = Validation(tmp_path, experts, aggregators, pairs, buckets=1, batch=3, seed=5)(flatten(aggregators), 1)
    t = jnp.asarray((np.arange(3) + 0.5) / 3 * 1000).astype(jnp.int32)
    root = jax.random.key(5)
    noise = jnp.stack(
        [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(root, i), 0), pairs.latents.shape[1:])
            for i in range(3)
        ]
    )
    noisy = experts.schedule.add_noise(pairs.latents, noise, t)
    ensemble = FusedUNets(experts=experts.unet, aggregators=ConstantMaps(weights=jnp.full(2, 0.5)))
    predicted = ensemble(noisy, t, Conditioning(text=jnp.moveaxis(pairs.states, 1, 0)))
    np.testing.assert_allclose(measured["val_loss"], np.mean((predicted - noise) ** 2), rtol=1e-4)
