"""SuperDiff against numpy, and its density estimator against densities that are known."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.rivals.superdiff import PathMemory, SuperDiff
from afa_jax.models.conditioning import Conditioning
from afa_jax.trees import stack
from tests import tiny
from tests.fusion.experts import as_text, echoes

SCHEDULE = NoiseSchedule()
step = jax.jit(lambda method, *inputs: method.guided(*inputs), static_argnums=5)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(0))
    return x / x.sum(0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_three_steps_are_what_numpy_says(kind):
    """The formulas as rivals.md has them, a picture and an expert at a time, in float64."""
    n, b, scale, temperature, logits = 3, 2, 4.0, 0.3, np.asarray([0.0, 1.0, -0.5])
    schedule = dataclasses.replace(SCHEDULE, prediction_type=kind)
    method = SuperDiff(experts=echoes(n), schedule=schedule, temperature=temperature, logits=jnp.asarray(logits))
    memory = method.start(jnp.zeros((b, 2, 2, 4)))
    log_q, before, weights = np.zeros((n, b)), None, np.zeros((n, b))
    for number, t in enumerate((901, 801, 701)):
        x, c, u = draw(b, 2, 2, 4, seed=number), draw(n, b, 2, 2, 4, seed=10 + number), draw(n, b, 2, 2, 4, seed=99)
        actual, memory = step(method, x, jnp.full(b, t), as_text(c), as_text(u), scale, memory)
        alpha = float(SCHEDULE.alphas_cumprod[t])
        signal, spread = np.sqrt(alpha), np.sqrt(1 - alpha)
        v = dict(epsilon=c, v_prediction=signal * c + spread * x, sample=(x - signal * c) / spread)[kind]
        z, sigma = x / signal, spread / signal
        if before is not None:
            old_z, old_sigma, old_v = before
            for i in range(n):
                for j in range(b):
                    dot = ((z[j] - old_z[j]) * old_v[i, j]).sum()
                    log_q[i, j] -= (dot + abs(sigma - old_sigma) * (old_v[i, j] ** 2).sum()) / old_sigma
        before = (z, sigma, v)
        weights = softmax(temperature * log_q + logits[:, None])
        expected = np.einsum("nb,nbhwc->bhwc", weights, u + scale * (c - u))
        np.testing.assert_allclose(memory.log_densities, log_q, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    assert 0.01 < weights.max() < 0.999  # neither uniform nor one-hot, or nothing was tested


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Experts that know their data: N(mean, std^2), the same in all pixels. They answer the text with nothing."""

    mean: Any
    std: Any

    def __call__(self, latents: Any, t: Any, text: Any) -> Any:
        z, sigma = coordinates(latents, t)
        return sigma * (z - self.mean) / (self.std**2 + sigma**2)

    def log_density(self, z: Any, sigma: Any) -> np.ndarray:
        """Of each point of a batch under each expert, ``[n, b]``."""
        variance = np.square(np.asarray(self.std, np.float64))[:, None, None] + np.square(sigma)[:, None]
        away = np.square(z.reshape(1, len(z), -1) - np.asarray(self.mean, np.float64)[:, None, None])
        return -(away / variance + np.log(variance)).sum(-1) / 2


jax.tree_util.register_dataclass(Gaussians, data_fields=["mean", "std"], meta_fields=[])


def coordinates(x, t):
    alpha = jnp.asarray(SCHEDULE.alphas_cumprod)[t][:, None, None, None]
    return x / jnp.sqrt(alpha), jnp.sqrt((1 - alpha) / alpha)


def error_along_a_path(experts: Gaussians, steps: int, eta: float, paths: int = 256) -> np.ndarray:
    """What the estimator makes of the log density ratio of expert 0 to 1, less the truth, for each path."""
    method = SuperDiff(experts=experts, schedule=SCHEDULE)
    text = Conditioning(text=jnp.zeros((2, paths, 1, 1)))

    def predict(x: Any, t: Any, memory: PathMemory) -> Any:
        prediction, memory = method.guided(x, t, text, text, 1.0, memory)
        return (prediction, memory), memory

    x = jax.random.normal(jax.random.key(0), (paths, 1, 1, 3))
    _, seen = jax.jit(
        lambda x: tiny.ddim(
            predict,
            SCHEDULE,
            x,
            steps=steps,
            eta=eta,
            noise_at=lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x.shape),
            has_aux=True,
            carry=method.start(x),
        )
    )(x)
    first, last = (jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k], np.float64), seen) for k in (0, -1))
    truth = experts.log_density(last.z, last.sigma) - experts.log_density(first.z, first.sigma)
    estimate = last.log_densities - first.log_densities
    return (estimate[0] - estimate[1]) - (truth[0] - truth[1])


UNLIKE = Gaussians(mean=jnp.asarray([-1.0, 0.5]), std=jnp.asarray([0.5, 1.5]))
ALIKE = Gaussians(mean=jnp.asarray([-1.0, 0.5]), std=jnp.asarray([0.7, 0.7]))


def test_along_the_sde_the_log_density_ratio_tends_to_the_true_one():
    errors = {steps: np.sqrt(np.square(error_along_a_path(UNLIKE, steps, eta=1.0)).mean()) for steps in (50, 1000)}
    assert errors[1000] < 0.35 * errors[50]
    assert errors[1000] < 0.3


def test_on_a_deterministic_path_the_ratio_lacks_the_curvatures():
    """It is right for densities of one curvature; else it lacks d/2 log((s^2 + sigma_0^2) / (s^2 + sigma_1^2))."""
    assert np.abs(error_along_a_path(ALIKE, 1000, eta=0.0)).max() < 0.1
    _, (most, least) = coordinates(jnp.zeros((2, 1, 1, 3)), jnp.asarray([SCHEDULE.timesteps(1000)[0], 1]))
    variance = np.square(np.asarray(UNLIKE.std))
    lacking = 1.5 * np.log((variance + float(most.item()) ** 2) / (variance + float(least.item()) ** 2))
    expected = -(lacking[0] - lacking[1])
    assert expected < -3  # in favour of the broader
    np.testing.assert_allclose(error_along_a_path(UNLIKE, 1000, eta=0.0), expected, atol=0.1)


def test_equal_experts_give_that_expert_and_one_alone_is_itself():
    x, c, u = draw(2, 2, 2, 4), draw(1, 2, 2, 2, 4, seed=1), draw(1, 2, 2, 2, 4, seed=2)
    for n in (1, 3):
        method = SuperDiff(experts=echoes(n), schedule=SCHEDULE)
        memory = method.start(jnp.asarray(x))
        for t in (900, 600):
            texts = [as_text(np.repeat(p, n, axis=0)) for p in (c, u)]
            fused, memory = step(method, x, jnp.full(2, t), *texts, 3.0, memory)
            np.testing.assert_allclose(fused, (u + 3 * (c - u))[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(method.weights(memory), 1 / n, rtol=1e-5)


def test_logits_remove_an_expert_and_no_temperature_leaves_the_average():
    x, c, u = draw(2, 2, 2, 4), draw(3, 2, 2, 2, 4, seed=1), draw(3, 2, 2, 2, 4, seed=2)
    own = u + 3 * (c - u)
    inputs = (x, jnp.full(2, 900), as_text(c), as_text(u), 3.0)
    only = SuperDiff(experts=echoes(3), schedule=SCHEDULE, logits=jnp.asarray([-jnp.inf, 0, -jnp.inf]))
    even = SuperDiff(experts=echoes(3), schedule=SCHEDULE, temperature=0.0)
    for method, expected in ((only, own[1]), (even, own.mean(0))):
        memory = method.start(jnp.asarray(x))
        for _ in range(2):
            fused, memory = step(method, *inputs, memory)
            np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch_mates():
    c, u = draw(2, 3, 2, 2, 4, seed=1), draw(2, 3, 2, 2, 4, seed=2)
    method = SuperDiff(experts=echoes(2), schedule=SCHEDULE)

    def run(rows: slice) -> Any:
        memory, fused = None, None
        for t in (900, 850, 800):
            x = draw(3, 2, 2, 4, seed=t)[rows]
            memory = method.start(jnp.asarray(x)) if memory is None else memory
            texts = as_text(c[:, rows]), as_text(u[:, rows])
            fused, memory = step(method, x, jnp.full(len(x), t), *texts, 3.0, memory)
        return fused

    together = run(slice(0, 3))
    for b in range(3):
        np.testing.assert_allclose(together[b : b + 1], run(slice(b, b + 1)), rtol=1e-4, atol=1e-4)


def test_unets_in_bfloat16_keep_float32_outside():
    nets = [tiny.unet(seed, tiny.MICRO_UNET) for seed in range(2)]
    for net in nets:
        net.dtype = jnp.bfloat16
    method = SuperDiff(experts=stack(nets), schedule=SCHEDULE)
    x, _, text = tiny.inputs(2, 2)

    def predict(x: Any, t: Any, memory: PathMemory) -> Any:
        prediction, memory = method.guided(x, t, text, jax.tree.map(jnp.negative, text), 3.0, memory)
        return (prediction, method.weights(memory)), memory

    made, weights = jax.jit(lambda x: tiny.ddim(predict, SCHEDULE, x, steps=4, has_aux=True, carry=method.start(x)))(x)
    assert made.dtype == weights.dtype == jnp.float32
    assert np.isfinite(made).all()
    np.testing.assert_array_equal(weights[0], 0.5)  # nothing is known before the first step
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.abs(weights[1:] - 0.5) > 1e-3).any()
