"""The noise schedule against PyTorch diffusers."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from afa_jax.diffusion.schedule import PREDICTIONS, NoiseSchedule, ScheduleError
from tests.models.goldens import GOLDENS, given, record, reference

SCHEDULES = ("sd15", "linear")
CONFIGS = {case["name"]: case["config"] for case in record("ddim")["cases"]}


def schedule(name: str, prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_json(CONFIGS[f"{name}.{prediction}.leading.10.eta0.0"])


@pytest.fixture(scope="module")
def forward():
    """Clean latents, noise, timesteps."""
    spec = record("ddim")["inputs"]["forward"]
    return given(spec["sample"]), given(spec["noise"]), jnp.asarray(spec["timestep"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_equal_pytorch(name):
    ours, theirs = schedule(name).alphas_cumprod, reference("ddim")[f"{name}.alphas_cumprod"]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_and_velocity_equal_pytorch(name, forward):
    x0, noise, t = forward
    golden = reference("ddim")
    np.testing.assert_allclose(schedule(name).add_noise(x0, noise, t), golden[f"{name}.add_noise"], atol=2e-6)
    velocity = schedule(name, "v_prediction").target(x0, noise, t)
    np.testing.assert_allclose(velocity, golden[f"{name}.velocity"], atol=2e-6)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("eta0.0")])
def test_timesteps_equal_pytorch(name):
    case = next(case for case in record("ddim")["cases"] if case["name"] == name)
    t = NoiseSchedule.from_json(case["config"]).timesteps(case["steps"])
    assert t.dtype == np.int32
    assert t.tolist() == case["timesteps"]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_descend_and_stay_inside(spacing):
    for steps in (1, 2, 3, 7, 25, 300, 999):
        t = NoiseSchedule(timestep_spacing=spacing).timesteps(steps)
        assert t.shape == (steps,)
        assert (np.diff(t) < 0).all()
        assert 0 <= t[-1] <= t[0] <= 999
        assert t[0] == 999 or spacing == "leading" or steps == 1


def test_linspace_is_that_of_diffusers():
    expected = np.linspace(0, 999, 7).round()[::-1].astype(int)
    assert NoiseSchedule(timestep_spacing="linspace").timesteps(7).tolist() == expected.tolist()


@pytest.mark.parametrize("steps", [0, 1001, -1])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps; choose 1 to 1000"):
        NoiseSchedule().timesteps(steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_implies_what_it_was_made_of(prediction, forward):
    x0, noise, _ = forward
    t = jnp.asarray([1, 500, 900])
    of = schedule("sd15", prediction)
    alpha = jnp.asarray(of.alphas_cumprod)[t][:, None, None, None]
    answer = of.split(of.add_noise(x0, noise, t), of.target(x0, noise, t), jnp.sqrt(alpha), jnp.sqrt(1 - alpha))
    for ours, expected in zip(answer, (x0, noise), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)  # sigma is 0.04 at t = 1
    if prediction != "v_prediction":
        assert of.target(x0, noise, t) is (noise if prediction == "epsilon" else x0)


def test_min_snr_weights():
    """Hang et al. 2023, section 3.4: min(snr, gamma) for x_0, over snr for epsilon, over snr + 1 for v."""
    t = jnp.asarray([0, 300, 999])
    alpha = schedule("sd15").alphas_cumprod.astype(np.float64)[[0, 300, 999]]
    snr = alpha / (1 - alpha)
    assert (snr > 5).tolist() == [True, False, False]
    clipped = np.minimum(snr, 5)
    for prediction, divisor in (("sample", 1), ("epsilon", snr), ("v_prediction", snr + 1)):
        weights = schedule("sd15", prediction).min_snr_weights(t, 5.0)
        np.testing.assert_allclose(weights, clipped / divisor, rtol=1e-3)


@pytest.mark.parametrize(("name", "prediction"), [("sd15", "epsilon"), ("sd21", "v_prediction")])
def test_published_configs_are_read(name, prediction):
    data = json.loads((GOLDENS / "configs" / name / "scheduler" / "scheduler_config.json").read_text())
    ours = NoiseSchedule.from_json(data)
    assert ours == NoiseSchedule(prediction_type=prediction)
    assert NoiseSchedule.from_json(ours.to_json()) == ours


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_fields_survive(config):
    ours = NoiseSchedule.from_json(config)
    assert ours.to_json().items() >= (config.items() - {("_class_name", "DDIMScheduler")})


def test_a_silent_config_means_diffusers_defaults():
    expected = NoiseSchedule(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0, set_alpha_to_one=True
    )
    assert NoiseSchedule.from_json({}) == expected
    assert dataclasses.replace(expected) == schedule("linear")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_sample", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1, 0.2]),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "flow"),
        ("timestep_spacing", "karras"),
        ("beta_start", 0.0),
        ("beta_end", 0.99),
        ("beta_end", float("nan")),
        ("beta_start", None),
    ],
)
def test_foreign_schedules_are_refused(field, value):
    with pytest.raises(ScheduleError, match=f"^{field}"):
        NoiseSchedule.from_json({field: value})
