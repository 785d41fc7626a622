r"""A second comparison on the emoji default, of fewer methods, after equal training and with searched weights.

Each trained method has 1,000 steps of 16 out of the same 8,192 scenes:

    python -m afa_jax.train --config configs/emoji.py:full --workdir runs/emoji_full
    python -m afa_jax.train --config configs/emoji.py:router --config.train.steps=1000 --workdir runs/equal_router
    python -m afa_jax.train --config configs/emoji.py:last_site --config.train.steps=1000 --workdir runs/equal_last_site
    python -m afa_jax.merge --config configs/emoji.py --method average --out runs/emoji_average
    python -m afa_jax.finetune --config configs/emoji_time.py:root --config.scenes=8192 --workdir runs/equal_start
    for part in root low middle high; do
        python -m afa_jax.finetune --config configs/emoji_time.py:$part --config.init=runs/equal_start/model \
            --config.steps=600 --config.scenes=8192 --workdir runs/equal_$part
    done

(400 steps of the averaged experts as one U-Net; then 600 more of it, or of each of eDiff-I's three leaves, which makes
2,200 in all for these. They are averaged over the steps, as fine-tunes are, with a decay of 0.99.) The weights of the
merge of whole experts:

    python -m afa_jax.search --config configs/emoji.py --space experts --trials 60 --workdir runs/equal_weights

And then, on the prompts of two topics of configs/emoji.py, and on prompts that one expert alone was fine-tuned on:

    python -m afa_jax.evaluate --config configs/emoji_equal.py --workdir runs/emoji_full --out runs/equal
    python -m afa_jax.evaluate --config configs/emoji_equal.py:topics --workdir runs/emoji_full --out runs/topics

Sampler and metrics are those of configs/emoji.py; the prompts of one topic are fewer, and have two seeds.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "topics"):
        raise KeyError("choose topics, or none")
    spec = importlib.util.spec_from_file_location("emoji", Path(__file__).with_name("emoji.py"))
    emoji = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emoji)
    config = emoji.get_config()
    config.name = f"emoji_equal:{arg}" if arg else "emoji_equal"
    # That an expert inside the ensemble is that expert, what permuted maps make, and curves: in the long comparison.
    config.evaluation.update(controls=False, methods=methods(emoji.TOPICS), equal_time=("router",))
    config.evaluation.curves = dict()
    if arg == "topics":
        config.evaluation.prompts = dict(kind="emoji", seed=11, groups=dict.fromkeys(emoji.TOPICS, 24))
        config.evaluation.update(seeds=(0, 1), equal_time=())
    return config


def methods(topics: tuple[str, ...]) -> list[dict]:
    leaves = [dict(name=leaf, path=f"runs/equal_{leaf}/model") for leaf in ("low", "middle", "high")]
    return [
        *(dict(kind="expert", expert=name) for name in topics),
        dict(kind="uniform"),
        dict(kind="average"),
        dict(name="average, weights searched", kind="autombw", path="runs/equal_weights/best.json"),
        dict(name="mbw GRAD_V of things", kind="mbw", preset="GRAD_V", of="things"),
        dict(kind="add_difference", a="things", b="food", alpha=0.3),
        dict(
            name="average, fine-tuned",
            kind="checkpoint",
            path="runs/equal_root/model",
            what="the averaged experts, trained on as one U-Net on AFA's data",
        ),
        dict(kind="magicfusion", general="base"),
        dict(kind="router", workdir="runs/equal_router"),
        dict(
            name="eDiff-I",
            kind="time",
            scheme="tree",
            experts=leaves,
            what="three fine-tunes of the averaged experts on a binary tree's leaves",
        ),
        dict(name="afa, last site only", kind="afa", workdir="runs/equal_last_site", family="ablation"),
        dict(kind="afa"),
    ]
