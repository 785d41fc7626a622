"""The example for reading is the method: its loss, gradient and picture are those of the production path."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.afa import FusedUNets, SABWConfig
from afa_jax.training.losses import diffusion_loss
from afa_jax.trees import flatten, stack, take, unflatten
from tests import tiny

FILE = Path(__file__).parents[1] / "examples" / "afa_from_scratch.py"
N, HIDDEN = 3, 8
SCHEDULE = NoiseSchedule(prediction_type="v_prediction")


def example() -> Any:
    spec = importlib.util.spec_from_file_location("afa_from_scratch", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_loss_gradient_and_picture_are_those_of_the_production_path() -> None:
    ours = example()
    unets = [tiny.unet(seed, tiny.MICRO_UNET) for seed in range(N)]
    config = SABWConfig(hidden=HIDDEN, transformer_layers=1, heads=4, norm_num_groups=HIDDEN // 4)
    production = tiny.trained(N, tiny.MICRO_UNET, config)
    plain = ours.make_aggregators(unets[0], N, HIDDEN)
    names = {f"sites.{name}": name for name in flatten(plain)}
    assert names.keys() == flatten(production).keys()
    plain = unflatten(plain, {names[name]: array for name, array in flatten(production).items()})
    latents, _, conditioning = tiny.inputs(2, N)
    texts, keys = [conditioning.text[n] for n in range(N)], jax.random.split(jax.random.key(3), 2)

    @jax.jit
    def of_production(aggregators: Any) -> Any:
        ensemble = FusedUNets(experts=stack(unets), aggregators=aggregators)
        return diffusion_loss(lambda x, t: ensemble(x, t, conditioning), SCHEDULE, latents, keys)

    @jax.jit
    def of_example(aggregators: Any) -> Any:
        def drawn(key: Any) -> Any:  # as diffusion_loss draws
            t_key, noise_key = jax.random.split(key)
            return jax.random.randint(t_key, (), 0, 1000), jax.random.normal(noise_key, latents.shape[1:])

        return ours.loss(aggregators, unets, latents, texts, *jax.vmap(drawn)(keys))

    (wanted, gradient), (value, own) = (
        jax.jit(jax.value_and_grad(function))(aggregators)
        for function, aggregators in ((of_production, production), (of_example, plain))
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    found = flatten(own)
    for name, array in flatten(gradient).items():
        scale = float(jnp.abs(array).max())
        np.testing.assert_allclose(found[names[name]], array, atol=1e-6 + 1e-4 * scale, err_msg=name)

    @jax.jit
    def picture(aggregators: Any) -> Any:
        ensemble = FusedUNets(experts=stack(unets), aggregators=aggregators)
        predict = guided(ensemble, conditioning, jax.tree.map(jnp.negative, conditioning), 3.0)
        return tiny.ddim(predict, SCHEDULE, latents, steps=4)

    theirs = jax.jit(lambda own: ours.sample(own, unets, texts, [-text for text in texts], latents, 4, 3.0))(plain)
    wanted = picture(production)
    np.testing.assert_allclose(theirs, wanted, atol=2e-4 * float(jnp.abs(wanted).max()))
    assert take(conditioning, 0).text.shape == texts[0].shape
