"""The experts of the emoji default: the base model fine-tuned on one topic, or on one style.

    python -m afa_jax.finetune --config configs/emoji_expert.py:animals_words --workdir runs/emoji_animals_words
    python -m afa_jax.finetune --config configs/emoji_expert.py:animals --workdir runs/emoji_animals
    python -m afa_jax.finetune --config configs/emoji_expert.py:animals_more --workdir runs/emoji_animals_more

As for the base model, words come before scenes: pictures of one subject on one place, then what stands left and right.

Variants: animals, food, things (topics); noto, twemoji, fluent, blob (styles); each with _words for its first stage and
_more for its third.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

TOPICS = ("animals", "food", "things")
STYLES = ("noto", "twemoji", "fluent", "blob")


def get_config(arg: str = "") -> ConfigDict:
    domain, _, stage = arg.partition("_")
    if domain not in TOPICS + STYLES or stage not in ("", "words", "more"):
        raise KeyError(f"choose one of {', '.join(TOPICS + STYLES)}, or one of them with _words or _more")
    spec = importlib.util.spec_from_file_location("emoji_base", Path(__file__).with_name("emoji_base.py"))
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    config = base.get_config()
    config.name = f"emoji_expert:{arg}"
    config.vae = "models/emoji/base"
    config.with_vae = False  # it is the base model's
    config.seed = 1
    data = dict(topics=(domain,), mixed=False) if domain in TOPICS else dict(topics=None, mixed=True, styles=(domain,))
    if stage == "words":
        config.init = "models/emoji/base"
        config.steps = 1800
        config.scenes = 16384
        config.data = ConfigDict(data | dict(seed=3, single=1.0, places=1))
        config.optimizer.schedule = "constant"
    else:
        config.init = f"runs/emoji_{domain}{'' if stage else '_words'}/model"
        config.steps = 800 if stage else 1200
        config.scenes = 12288
        config.data = ConfigDict(data | dict(seed=5 if stage else 4, single=0.3, places=2))
        config.optimizer.lr = 7e-4
    config.optimizer.warmup = 50
    return config
