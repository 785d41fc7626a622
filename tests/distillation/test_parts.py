"""Trajectories and the step of a distillation, on teachers that cost nothing."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.diffusion.samplers.sampler import image_noise
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distillation import trajectories
from afa_jax.distillation.few_steps import FewSteps
from afa_jax.distillation.step import Frozen, Setting, make_distil_step, path_rows, target_rows
from afa_jax.distillation.student import Student
from afa_jax.distillation.teacher import Teacher
from afa_jax.distillation.trajectories import Settings, make_trajectories
from afa_jax.errors import NotFinite
from afa_jax.fusion.single import SingleExpert
from afa_jax.models.conditioning import Conditioning, encode_prompts
from afa_jax.models.steering import Steering, SteeringConfig
from afa_jax.training.model_step import init_state
from afa_jax.trees import flatten, shapes_of, stack, unflatten
from tests import tiny

SCHEDULE = NoiseSchedule()
SIZE = (4, 4, 4)
IDS = np.random.default_rng(0).integers(1, 99, (7, 16)).astype(np.int32)
EMPTY = np.zeros(16, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A Denoiser: its prediction depends on latents, timestep and prompt."""

    weight: Any

    def __call__(self, latents: Any, t: Any, conditioning: Conditioning) -> Any:
        said = conditioning.text[0].mean((1, 2)) + t / 1000
        return self.weight * latents + said[:, None, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalling(Plain):
    """A Denoiser that is a PathDenoiser too, and adds what it remembers."""

    def start(self, latents: Any) -> Any:
        return jnp.zeros_like(latents)

    def guided(self, latents: Any, t: Any, conditional: Any, unconditional: Any, scale: Any, memory: Any) -> Any:
        mixed = guided(self, conditional, unconditional, scale)(latents, t) + memory
        return mixed, 0.1 * mixed


for _class in (Plain, Recalling):
    jax.tree_util.register_dataclass(_class, data_fields=["weight"], meta_fields=[])


def teacher_of(kind: Any, weight: float = 0.5) -> Teacher:
    return Teacher(denoiser=kind(weight=jnp.asarray(weight)), text_encoder=stack([tiny.text_encoder(0)]))


def settings_of(**changes: Any) -> Settings:
    common: dict[str, Any] = dict(
        teacher=dict(kind="plain"), vae="", schedule={}, count=len(IDS), steps=4, guidance=(1.5, 3.0), seed=2, size=SIZE
    )
    return Settings(**common | changes)


@pytest.mark.parametrize("kind", [Plain, Recalling])
def test_trajectories_are_the_guided_paths_of_the_teacher(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "SHARD", 4)
    teacher, settings = teacher_of(kind), settings_of()

    def make() -> Any:
        return make_trajectories(tmp_path, settings, teacher, SCHEDULE, IDS, EMPTY, batch=3, quiet=True)

    made = make()
    assert len(made) == 7 and [len(shard) for shard in made.states] == [4, 3]
    noise = image_noise(jax.random.key(2), jnp.arange(7), SIZE)
    conditional, unconditional = (
        encode_prompts(teacher.text_encoder, jnp.asarray(ids)) for ids in (IDS, np.tile(EMPTY, (7, 1)))
    )
    scales = jnp.asarray(made.scales)[:, None, None, None]
    assert 1.5 <= made.scales.min() < made.scales.max() <= 3

    def predict(x: Any, t: Any, memory: Any) -> Any:
        if kind is Plain:
            return guided(teacher.denoiser, conditional, unconditional, scales)(x, t), memory
        return teacher.denoiser.guided(x, t, conditional, unconditional, scales, memory)

    expected = tiny.ddim(predict, SCHEDULE, noise, steps=4, carry=jnp.zeros_like(noise))
    painted = made.painted(np.arange(7))
    np.testing.assert_allclose(painted, expected, rtol=2e-3, atol=5e-3)
    # What is kept of a step leads to the next one.
    sampler = DDIM(schedule=SCHEDULE)
    k = jax.tree.map(lambda values: values[1], sampler.constants(4))
    rows = made.rows(np.arange(7), np.full(7, 1))
    u, c = rows["path_predictions"][:, 0], rows["path_predictions"][:, 1]
    following, _ = trajectories.DDIM(schedule=SCHEDULE).step(
        k, rows["path"], u + np.asarray(scales) * (c - u), (), None
    )
    np.testing.assert_allclose(following, rows["path_next"], rtol=5e-3, atol=2e-2)
    assert rows["path_t"].tolist() == [int(k.t)] * 7 and (made.experts == -1).all()

    # A start that was killed makes what is missing, and nothing else.
    files = sorted(tmp_path.glob("*/*.npy"))
    times, kept = [file.stat().st_mtime_ns for file in files], [file.read_bytes() for file in files]
    next(tmp_path.glob("*/00001.experts.npy")).unlink()
    again = make()
    assert [file.read_bytes() for file in files] == kept
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)] == [True] * 3 + [
        False
    ] * 3
    np.testing.assert_array_equal(again.painted(np.arange(7)), painted)


def test_trajectories_of_other_facts_are_others():
    keys = [
        settings_of(**changes).key(ids)
        for changes, ids in (
            ({}, IDS), ({}, IDS + 1), (dict(seed=3), IDS), (dict(steps=5), IDS), (dict(guidance=(1.5, 4.0)), IDS),
            (dict(teacher=dict(kind="other")), IDS), (dict(vae="x"), IDS), (dict(schedule=dict(beta_start=1)), IDS),
        )
    ]  # fmt: skip
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(NotFinite, match=r"distil\.trajectories\.guidance"):
        make_trajectories(tmp_path, settings_of(), teacher_of(Plain, np.inf), SCHEDULE, IDS, EMPTY, batch=7, quiet=True)
    assert not list(tmp_path.glob("*/*.npy"))


def setting_of(student: Student, frozen: Frozen, **changes: Any) -> Setting:
    common: dict[str, Any] = dict(
        student=shapes_of(student), frozen=shapes_of(frozen), optimizer=optax.sgd(1.0), schedule=SCHEDULE,
        no_caption=jnp.asarray(EMPTY), caption_dropout=0.3,
    )  # fmt: skip
    return Setting(**common | changes)


def student_of(seed: int, *styles: str) -> Student:
    unet, encoder = tiny.unet(seed, tiny.MICRO_UNET), tiny.text_encoder(seed)
    config = SteeringConfig(width=8, time_width=unet.config.time_width, styles=styles)
    return Student(unet, encoder, tiny.randomised(Steering(config, rngs=nnx.Rngs(0)), seed) if styles else None)


def batch_of(rows: int, paths: int, teacher: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return dict(
        latents=drawn(rows, *SIZE), captions=np.resize(IDS, (rows + paths, 16)), path=drawn(paths, *SIZE),
        path_next=drawn(paths, *SIZE), path_t=np.arange(paths, dtype=np.int32) * 99,
        path_predictions=drawn(paths, 2, *SIZE), path_scale=np.full(paths, 2.0, np.float32),
        path_expert=np.arange(paths, dtype=np.int32) % 2, path_point=np.zeros(paths, np.int32),
        teacher=np.full(rows + paths, teacher, np.int32),
    )  # fmt: skip


def test_a_batch_in_parts_is_the_same_step():
    experts = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in (1, 2)])
    encoders = stack([tiny.text_encoder(seed) for seed in (1, 2)])
    teacher = Teacher(denoiser=SingleExpert(experts=experts, index=jnp.asarray(1)), text_encoder=encoders)
    student, frozen = student_of(0), Frozen(teacher)

    def stepped(**changes: Any) -> Any:
        setting = setting_of(student, frozen, **changes)
        state = init_state(jax.tree.map(jnp.copy, flatten(student)), setting.optimizer, 0.0)
        return make_distil_step(setting)(state, batch_of(2, 4), flatten(frozen), jax.random.key(0))

    state, metrics = stepped()
    other, measured = stepped(accumulate=2, remat=True)
    assert float(measured["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for name, array in state["params"].items():
        np.testing.assert_allclose(other["params"][name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_each_style_has_its_teacher_and_the_old_ones_the_earlier_model():
    experts = stack([tiny.unet(seed, tiny.MICRO_UNET) for seed in (1, 2)])
    encoders = stack([tiny.text_encoder(seed) for seed in (1, 2)])
    teacher = Teacher(denoiser=SingleExpert(experts=experts, index=jnp.asarray(0)), text_encoder=encoders)
    before, student = student_of(3, "old", "older"), student_of(4, "old", "older", "new")
    frozen = Frozen(teacher, before)
    setting = setting_of(student, frozen, styles=(-1, -1, 1))
    latents, noise = np.random.default_rng(0).standard_normal((2, 3, *SIZE)).astype(np.float32)
    ids, t = jnp.asarray(IDS[:3]), jnp.array([5, 500, 999])

    def target(number: int) -> Any:
        return target_rows(
            setting, frozen, jnp.asarray(number), jnp.asarray(latents), jnp.asarray(noise), t, ids, jnp.ones(3)
        )

    rows = target(1)
    wanted, _ = before.predict(rows.x, t, ids, None, jnp.tile(jnp.array([0.0, 1.0]), (3, 1)))
    np.testing.assert_allclose(rows.target, wanted, rtol=1e-4, atol=1e-5)
    rows = target(2)
    own = unflatten(experts, {name: leaf[1:] for name, leaf in flatten(experts).items()})
    wanted = SingleExpert(experts=own, index=0)(rows.x, t, encode_prompts(stack([tiny.text_encoder(2)]), ids))
    np.testing.assert_allclose(rows.target, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows.style, np.tile([0, 0, 1], (3, 1)))


def test_points_of_trajectories_have_the_target_that_the_student_is_for():
    student, frozen, batch = student_of(0), Frozen(teacher_of(Plain)), batch_of(0, 3)
    ids = jnp.asarray(np.stack([IDS[0], EMPTY, IDS[1]]))
    u, c = batch["path_predictions"][:, 0], batch["path_predictions"][:, 1]
    rows = path_rows(setting_of(student, frozen), batch, ids, None)
    np.testing.assert_array_equal(rows.target, np.stack([c[0], u[1], c[2]]))  # the second caption is dropped
    rows = path_rows(setting_of(student, frozen, guidance=(1.0, 3.0)), batch, ids, None)
    np.testing.assert_allclose(rows.target, u + 2 * (c - u), rtol=1e-6)
    schedule = dataclasses.replace(SCHEDULE, timestep_spacing="trailing")
    few = FewSteps(schedule=schedule, steps=2, teacher_steps=4)
    rows = path_rows(setting_of(student, frozen, guidance=(1.0, 3.0), few=few, schedule=schedule), batch, ids, None)
    made, _ = few.sampler.step(few.at(jnp.zeros(3, jnp.int32), 2), rows.x, rows.target, (), None)
    np.testing.assert_allclose(made, batch["path_next"], rtol=1e-3, atol=1e-3)
