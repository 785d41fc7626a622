r"""The experts of the emoji default: the base model fine-tuned on one topic, or on one style.

    python -m afa_jax.finetune --config configs/emoji_expert.py:animals_words --workdir runs/emoji_animals_words
    python -m afa_jax.finetune --config configs/emoji_expert.py:animals --workdir runs/emoji_animals
    python -m afa_jax.finetune --config configs/emoji_expert.py:animals_more --workdir runs/emoji_animals_more

As for the base model, words come before scenes: pictures of one subject on one place, then what stands left and right.
The last folder's model becomes models/emoji/animals. Then each learnt on from there, food and things once with

    python -m afa_jax.finetune --config configs/emoji_expert.py:food_more --config.init=runs/emoji_food_more/model \
        --config.steps=1500 --config.data.seed=6 --config.seed=2 --config.optimizer.lr=1e-3 \
        --workdir runs/emoji_food_more2

(things 1,200 steps; these two side by side, a core each), then animals and things once with

    python -m afa_jax.finetune --config configs/emoji_expert.py:things_more --config.init=models/emoji/things \
        --config.steps=2500 --config.data.seed=7 --config.seed=3 --config.optimizer.lr=1e-3 \
        --workdir runs/emoji_things_more3

Minutes on two cores, most of the time beside other work; the loss is the mean of the last 50 steps:

             words, 1,800 steps   scenes, 1,200    more, 800        again            2,500 more
    animals  14 min, loss 0.338   16 min, 0.295    16 min, 0.280                     31 min, 0.256
    food     15 min, loss 0.280   15 min, 0.243    11 min, 0.231    29 min, 0.212
    things   12 min, loss 0.348   13 min, 0.299    13 min, 0.284    23 min, 0.263    19 min, 0.256

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
