r"""Experts along the time axis for the emoji default: a merge of its experts, fine-tuned by noise level.

All of it starts from the uniform merge of the three experts and learns on the scenes that AFA learns on, of all topics.
The root learns all timesteps; each leaf goes on from the root on its own interval, so a step costs one U-Net.

    python -m afa_jax.merge --config configs/emoji.py --method average --out runs/emoji_average
    python -m afa_jax.finetune --config configs/emoji_time.py:root --workdir runs/emoji_time_root
    for leaf in low middle high uniform0 uniform1 uniform2; do
        python -m afa_jax.finetune --config configs/emoji_time.py:$leaf --workdir runs/emoji_time_$leaf
    done

The models are runs/emoji_time_LEAF/model. The root alone is a rival too: the merge, healed by as much training.

Variants: root; low, middle, high (eDiff-I's leaves of a binary tree: the least noise, all between, the most noise);
uniform0, uniform1, uniform2 (ERNIE-ViLG 2.0's equal intervals, from the least noise to the most).
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from afa_jax.fusion.rivals.time_experts import binary_tree_edges, uniform_edges

TREE, UNIFORM = binary_tree_edges(), uniform_edges(3)
INTERVALS = {
    "root": None,
    **dict(zip(("low", "middle", "high"), zip((0, *TREE), (*TREE, 1000), strict=True), strict=True)),
    **{f"uniform{i}": interval for i, interval in enumerate(zip((0, *UNIFORM), (*UNIFORM, 1000), strict=True))},
}


def get_config(arg: str = "root") -> ConfigDict:
    leaf = arg or "root"
    if leaf not in INTERVALS:
        raise KeyError(f"choose one of {', '.join(INTERVALS)}")
    spec = importlib.util.spec_from_file_location("emoji_base", Path(__file__).with_name("emoji_base.py"))
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    config = base.get_config()
    config.update(
        name=f"emoji_time:{leaf}",
        seed=1,
        vae="models/emoji/base",
        with_vae=False,  # it is the base model's
        batch=16,
        ema=0.99,
        optimizer=dict(lr=5e-4, schedule="constant", warmup=20),
    )
    config.data = ConfigDict(dict(seed=5, topics=None, mixed=True, single=0.1, places=2))
    config.timesteps = INTERVALS[leaf]
    if leaf == "root":
        config.update(init="runs/emoji_average", steps=400, scenes=6400)
    else:
        config.update(init="runs/emoji_time_root/model", steps=100, scenes=1600)
    return config
