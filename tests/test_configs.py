"""Every config loads, and the run of record's training step has the shapes it should, without any weights."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from afa_jax.cli.commands import load_config
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.evaluation.metrics.table import METRICS, WEIGHTS
from afa_jax.experts.sources import parse_expert
from afa_jax.fusion.afa import SABWConfig
from afa_jax.fusion.registry import FUSIONS, init_fusion, kind_of
from afa_jax.methods.entries import entries_of
from afa_jax.methods.method import check_entry
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.training.model_step import init_state as init_model_state
from afa_jax.training.model_step import make_model_step
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.run import configured_fusion
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten, parameter_count

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "emoji": (
        *("", "full", "short", "no_time", "no_text", "one_weight", "last_site", "shared"),
        *("ladder", "router", "gate", "mbw"),
    ),
    "emoji_base": ("", "start", "words"),
    "emoji_distil": ("", "guided", "styles", "eight", "four", "two"),
    "emoji_equal": ("", "topics"),
    "emoji_expert": ("animals", "food", "things", "noto", "animals_words"),
    "emoji_price": ("",),
    "emoji_time": ("", "root", "low", "middle", "high", "uniform0", "uniform1", "uniform2"),
    "sd15_finetune": ("",),
    "sd15": ("", "group1", "group2", "256", "coco", "drawbench", "group2_coco", "router", "ladder", "gate", "mbw"),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_and_variant_loads_and_is_locked(path):
    for variant in VARIANTS.get(path.stem, ("",)):
        config = load_config(f"{path}:{variant}" if variant else str(path))
        assert config.is_locked
        if "fusion" in config:
            assert kind_of(configured_fusion(config)) == (variant if variant in FUSIONS else "afa")
    with pytest.raises(InputError, match="no variant 'nonsense'"):
        load_config(f"{path}:nonsense")
    with pytest.raises(InputError, match="no such field"):
        load_config(f"{path}:{VARIANTS.get(path.stem, ('',))[0]}", ["sed=1"])


def test_the_config_that_is_shown_is_one(tmp_path):
    blocks = (CONFIGS.parent / "docs" / "checkpoints.md").read_text().split("```python\n")[1:]
    (example,) = (block for each in blocks if "get_config" in (block := each.split("```")[0]))
    (tmp_path / "example.py").write_text(example)
    config = load_config(str(tmp_path / "example.py"))
    assert [expert.name for expert in map(parse_expert, config.experts)] == ["photo", "anime"]
    assert config.train.save_every and config.sabw.hidden == 128


def test_the_methods_of_every_comparison_have_options_that_exist():
    """Found before the first picture is made, and here."""
    emoji = entries_of(load_config(str(CONFIGS / "emoji.py")))
    for variant in ("", "coco", "group2_drawbench"):
        config = load_config(f"{CONFIGS / 'sd15.py'}:{variant}")
        entries = entries_of(config)
        assert {"average", "noise_average", "superdiff eta=1", "maxfusion", "afa", "uniform"} <= set(entries) & set(
            emoji
        )
        assert set(config.evaluation.weights) == set(WEIGHTS)  # so that each can be given on the command line
        assert set(METRICS) >= set(config.evaluation.metrics) and config.evaluation.main in config.evaluation.metrics


def test_the_papers_protocol():
    coco, drawbench = (load_config(f"{CONFIGS / 'sd15.py'}:{name}").evaluation for name in ("coco", "drawbench"))
    assert coco.size == (256, 256) and coco.metrics == ("fid", "is", "clip_i", "clip_t")
    assert drawbench.size == (512, 512) and len(drawbench.seeds) == 4 and len(drawbench.metrics) == 4
    for own in (coco, drawbench):
        assert (own.steps, own.guidance, own.eta) == (50, 7.5, 0.0)


@pytest.mark.parametrize("name", ["emoji", "emoji_equal", "sd15"])
def test_a_comparison_names_methods_that_there_are(name):
    """A misspelt option would be found hours into it."""
    config = load_config(str(CONFIGS / f"{name}.py"))
    for entry in config.evaluation.methods:
        check_entry(entry)


@pytest.mark.parametrize("name", ["emoji", "emoji_equal", "emoji_price"])
def test_what_emojis_comparisons_take_is_what_their_commands_write(name):
    """Each run in the list of methods is a variant's, or is written by a command that the configs say."""
    text = "".join((CONFIGS / f"{one}.py").read_text() for one in {name, "emoji", "emoji_time"})
    variants = {f"runs/emoji_{name}" for name in VARIANTS["emoji"]}
    variants |= {f"runs/emoji_time_{name}" for name in VARIANTS["emoji_time"]}
    documented = set(re.findall(r"(?:--workdir|--snapshot|--out) (runs/\S+)", text))
    documented |= {run.replace("$part", part) for run in documented for part in ("root", "low", "middle", "high")}
    for entry in load_config(str(CONFIGS / f"{name}.py")).evaluation.methods:
        for part in (entry, *(expert for expert in entry.get("experts", ()) if not isinstance(expert, str))):
            wanted = part.get("workdir") or part.get("path")
            folder = None if wanted is None else wanted.removesuffix("/model").removesuffix("/best.json")
            assert folder is None or folder in variants | documented, wanted


def test_the_run_of_record_has_a_training_step():
    """SD1.5, N = 3, batch 8, 512 px, bfloat16 experts: traced, nothing allocated."""
    config = load_config(str(CONFIGS / "sd15.py"))
    count, dtype, batch = len(config.experts), jnp.dtype(config.dtype), config.train.batch
    assert (count, batch, config.train.optimizer.lr) == (3, 8, 1e-4)

    def experts(create):
        one = jax.eval_shape(create)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), dtype), one)

    frozen = dict(
        unet=experts(lambda: UNet(UNetConfig(), rngs=nnx.Rngs(0), dtype=dtype)),
        vae=jax.eval_shape(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)),
    )
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    aggregators = jax.eval_shape(lambda: init_fusion(SABWConfig(**config.sabw), frozen["unet"], count, 0))
    state = jax.eval_shape(lambda aggregators: init_state(aggregators, optimizer), aggregators)
    assert parameter_count(state["params"]) == 45_132_416
    step = make_train_step(
        aggregators,
        dict(unet=frozen["unet"]),
        optimizer,
        NoiseSchedule(),
        caption_dropout=config.train.caption_dropout,
        no_caption=jnp.zeros((count, 77, 768), dtype),
        accumulate=config.train.accumulate,
        remat=config.train.remat,
        vae=frozen["vae"],
    )
    assert config.cache.path
    latents = jax.ShapeDtypeStruct((batch, *(side // 8 for side in config.data.size), 4), dtype)
    inputs = dict(
        mean=latents,
        std=latents,
        states=jax.ShapeDtypeStruct((batch, count, 77, 768), dtype),
        position=jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    new, metrics = jax.eval_shape(step, state, inputs, flatten(dict(unet=frozen["unet"])), jax.random.key(0))
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new["params"]))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new)
    assert all(jax.tree.leaves(same))


def test_the_fine_tune_at_stable_diffusions_size_has_a_training_step():
    """SD1.5's U-Net and text encoder, 512 px, in bfloat16 with rematerialisation, a batch in parts: traced only."""
    config = load_config(str(CONFIGS / "sd15_finetune.py"))
    dtype = jnp.dtype(config.dtype)
    shapes = jax.eval_shape(
        lambda: (
            UNet(UNetConfig(), rngs=nnx.Rngs(0), dtype=dtype),
            TextEncoder(TextConfig(), rngs=nnx.Rngs(0), dtype=dtype),
        )
    )
    params = flatten(shapes)
    assert sum(leaf.size for leaf in params.values()) == 982_581_444
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_model_step(
        shapes,
        optimizer,
        NoiseSchedule(),
        no_caption=jnp.zeros(77, jnp.int32),
        caption_dropout=config.caption_dropout,
        ema=config.ema,
        accumulate=2,
        remat=config.remat,
    )
    state = jax.eval_shape(lambda params: init_model_state(params, optimizer, config.ema), params)
    assert "average" not in state
    batch = dict(
        latents=jax.ShapeDtypeStruct((config.batch, *(side // 8 for side in config.data.size), 4), jnp.float32),
        ids=jax.ShapeDtypeStruct((config.batch, 77), jnp.int32),
    )
    new, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in new["params"].values())
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new)
    assert all(jax.tree.leaves(same))
