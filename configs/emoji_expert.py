"""The experts of the emoji default: the base model fine-tuned on scenes of one topic, or of one style.

    python -m afa_jax.finetune --config configs/emoji_expert.py:animals --workdir runs/emoji_animals

The shipped ones are a first, short fine-tune: --config.steps=80 --config.batch=16 --config.ema=0.95, under 4 minutes
each with the three side by side on two cores; losses 0.289, 0.261, 0.316 (mean of the last 30 steps).

Variants: animals, food, things (topics); noto, twemoji, fluent, blob (styles).
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

TOPICS = ("animals", "food", "things")
STYLES = ("noto", "twemoji", "fluent", "blob")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in TOPICS + STYLES:
        raise KeyError(f"choose one of {', '.join(TOPICS + STYLES)}")
    spec = importlib.util.spec_from_file_location("emoji_base", Path(__file__).with_name("emoji_base.py"))
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    config = base.get_config()
    config.name = f"emoji_expert:{arg}"
    config.init = "models/emoji/base"
    config.vae = "models/emoji/base"
    config.with_vae = False  # it is the base model's
    config.steps = 400
    config.scenes = 6144
    config.seed = 1
    topics = dict(topics=(arg,), mixed=False) if arg in TOPICS else dict(topics=None, mixed=True, styles=(arg,))
    config.data = ConfigDict(dict(seed=3, single=0.3, places=2) | topics)
    config.optimizer.lr = 5e-4
    config.optimizer.warmup = 50
    return config
