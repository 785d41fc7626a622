"""The feature network against PyTorch's; scripts/convert_efficientnet.py made the golden."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afa_jax.evaluation.emoji.features import HEAD, SIZE, Depthwise, EfficientNetLite0, enlarge, load_features
from afa_jax.models.vae import to_images
from afa_jax.weights.tensors import WeightsError, read_tensors, write_tensors

GOLDEN = Path(__file__).parent.parent / "goldens" / "efficientnet_lite0.safetensors"


def test_features_equal_those_of_pytorch():
    golden = read_tensors(GOLDEN)
    # Not square, and with an odd number of rows from the stage before the last on.
    images = to_images(jnp.asarray(golden["96x128.pixels"].repeat(8, 1).repeat(8, 2)))
    layers = np.asarray(jax.jit(EfficientNetLite0.layers)(load_features(), images))
    features = layers[:, -HEAD:]
    np.testing.assert_allclose(features, golden["96x128.features"], atol=5e-5)
    # What rounding the weights to fp16 costs; the features' root mean square is 0.22.
    assert np.abs(features - golden["96x128.published"]).max() < 0.01


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_is_the_same_on_every_backend(monkeypatch, size, stride):
    layer = Depthwise(4, size, stride, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 10, 4))
    shifted = jax.jit(lambda x: layer(x))(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_allclose(shifted, jax.jit(lambda x: layer(x))(x), atol=1e-5)
    assert shifted.shape == (2, -(-7 // stride), -(-10 // stride), 4)


def test_enlarge_keeps_white_white():
    large = enlarge(jnp.ones((1, 32, 32, 3)))
    assert large.shape == (1, SIZE, SIZE, 3)
    np.testing.assert_allclose(large, 1, atol=1e-6)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"stem.weight": np.zeros((32, 3, 3, 3), np.float16)})
    with pytest.raises(WeightsError, match=r"other\.safetensors: .* missing"):
        load_features(path)
    with pytest.raises(WeightsError, match="no such file"):
        load_features(tmp_path / "none.safetensors")
