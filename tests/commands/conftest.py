"""Tiny experts on disk, and a config of them, for every test of the commands."""

from pathlib import Path

import pytest

from afa_jax.weights.formats.folders import save_folder
from tests import tiny

TOKENIZER = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji" / "tokenizer"
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict(dict(
        name="tiny", dtype="float32", base="{root}/base",
        experts=[dict(name=name, path="{root}/" + name) for name in ("a", "b", "c")],
        sabw=dict(
            hidden=8, transformer_layers=0, heads=2, norm_num_groups=4,
            use_time=True, use_text=True, per_pixel=True, sites="all",
        ),
        data=dict(kind="emoji", seed=0, length=64),
        train=dict(
            seed=0, steps=4, batch=2, caption_dropout=0.5, min_snr_gamma=0.0, log_every=1, save_every=2,
            keep=2, writers=(), accumulate=1, remat="none", ema=0.0,
            optimizer=dict(lr=1e-2, schedule="constant", warmup=0, weight_decay=0.01, clip=0.0, b2=0.999),
        ),
        cache=dict(path="", seed=0, crops=2, shard=32, batch=8),
        validation=dict(
            every=0, pairs=3, buckets=2, batch=2, seed=0, data=None, prompts=("octopus, noto style",), num_images=1
        ),
        sample=dict(size=(32, 64), steps=3, guidance=2.0, batch=4),
    ))
"""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and three experts in diffusers layout, and a config of them."""
    root = tmp_path_factory.mktemp("experts")
    schedule = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
    )
    for seed, name in enumerate(("base", "a", "b", "c")):
        save_folder(
            root / name,
            unet=tiny.unet(seed, tiny.MICRO_UNET),
            vae=tiny.vae(seed),
            text_encoder=tiny.text_encoder(seed),
            tokenizer=TOKENIZER,
            scheduler=schedule,
        )
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


def says_nothing_of(name: str, folder: Path) -> int:
    """How many files of a folder there are, none of which has the name in its bytes; checkpoints are not published."""
    files = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    for path in files:
        assert name.encode() not in path.read_bytes(), path
    return len(files)
