r"""What the trained methods can do after equal training: 1,000 steps of 16 of the same 8,192 scenes for each.

    python -m afa_jax.train --config configs/emoji.py:full --workdir runs/emoji_full
    python -m afa_jax.train --config configs/emoji.py:router --config.train.steps=1000 --workdir runs/equal_router
    python -m afa_jax.train --config configs/emoji.py:last_site --config.train.steps=1000 --workdir runs/equal_last_site
    python -m afa_jax.merge --config configs/emoji.py --method average --out runs/emoji_average
    python -m afa_jax.finetune --config configs/emoji_time.py:root --config.steps=1000 --config.scenes=8192 \
        --workdir runs/equal_root
    python -m afa_jax.finetune --config configs/emoji_time.py:root --workdir runs/emoji_time_root
    for leaf in low middle high; do
        python -m afa_jax.finetune --config configs/emoji_time.py:$leaf --config.steps=600 --config.scenes=8192 \
            --workdir runs/equal_$leaf
    done

(eDiff-I's leaves have 400 steps in common, the root's, and 600 of their own), and then

    python -m afa_jax.evaluate --config configs/emoji_equal.py --workdir runs/emoji_full --out runs/equal

Prompts, seeds, sampler and metrics are those of configs/emoji.py, whose long table has these methods after fewer steps.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise KeyError("there are no variants")
    spec = importlib.util.spec_from_file_location("emoji", Path(__file__).with_name("emoji.py"))
    emoji = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emoji)
    config = emoji.get_config()
    config.name = "emoji_equal"
    leaves = [dict(name=leaf, path=f"runs/equal_{leaf}/model") for leaf in ("low", "middle", "high")]
    config.evaluation.update(
        methods=[
            *(dict(kind="expert", expert=name) for name in emoji.TOPICS),
            dict(kind="average"),
            dict(kind="uniform"),
            dict(
                name="average, fine-tuned",
                kind="checkpoint",
                path="runs/equal_root/model",
                what="the averaged experts, trained on as one U-Net on AFA's data",
            ),
            dict(
                name="eDiff-I",
                kind="time",
                scheme="tree",
                experts=leaves,
                what="three fine-tunes of that average on a binary tree's leaves",
            ),
            dict(kind="router", workdir="runs/equal_router"),
            dict(name="afa, last site only", kind="afa", workdir="runs/equal_last_site", family="ablation"),
            dict(kind="afa"),
        ],
        equal_time=(),
        curves=dict(
            methods=("average, fine-tuned", "eDiff-I", "router", "afa"), steps=(5, 10, 20, 40), prompts=32, seeds=(0,)
        ),
    )
    return config
