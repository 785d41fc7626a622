"""AFA's training step: what it may change, and what it must not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.parallel import stack
from afa_jax.training.state import init_state, make_train_step
from afa_jax.weights.keys import flatten
from tests import tiny


def test_a_step_changes_every_site_and_nothing_frozen():
    frozen = dict(
        unet=stack([tiny.unet(seed) for seed in range(2)]),
        text_encoder=stack([tiny.text_encoder(seed) for seed in range(2)]),
        vae=tiny.vae(0),
    )
    aggregators, optimizer = tiny.aggregators(2), optax.adamw(1e-2, weight_decay=0.0)
    before = {name: np.array(array) for name, array in flatten(frozen).items()}
    arrays, state = flatten(frozen), init_state(aggregators, optimizer)
    assert state["params"].keys() == flatten(aggregators).keys()
    step = make_train_step(
        aggregators, frozen, optimizer, NoiseSchedule(), caption_dropout=0.1, no_caption=jnp.zeros(16, jnp.int32)
    )
    rng = np.random.default_rng(0)
    batch = dict(
        image=jnp.asarray(rng.integers(0, 256, (2, 32, 32, 3), np.uint8)),
        ids=jnp.asarray(rng.integers(0, 99, (2, 16)), jnp.int32),
        position=jnp.arange(2),
    )
    new, metrics = step(state, batch, arrays, jax.random.key(0))
    assert float(metrics["loss"]) > 0 and new["step"] == 1
    changed = {name for name, array in new["params"].items() if (array != state["params"][name]).any()}
    # conv_out starts at zero, so the first gradient reaches nothing before it.
    assert changed == {name for name in state["params"] if "conv_out" in name}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
