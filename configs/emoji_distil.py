r"""One ordinary checkpoint distilled from the emoji experts, at the price of one of them.

    python -m afa_jax.distil --config configs/emoji_distil.py --workdir runs/distil
    python -m afa_jax.distil --config configs/emoji_distil.py --teacher afa,workdir=runs/emoji_full \
        --workdir runs/distil_afa
    python -m afa_jax.distil --config configs/emoji_distil.py --teacher data --workdir runs/distil_data

(the last one is the control: the same steps on the data, without a teacher), then

    python -m afa_jax.evaluate --config configs/emoji_equal.py --workdir runs/emoji_full \
        --method distilled:runs/distil --out runs/equal_distil

The default teacher is the output router of configs/emoji_equal.py. The pictures are AFA's 8,192 scenes; the teacher's
trajectories are made for the first 2,048 captions of them, once, into runs/trajectories.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise KeyError("there are none")
    spec = importlib.util.spec_from_file_location("emoji", Path(__file__).with_name("emoji.py"))
    emoji = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emoji)
    config = emoji.get_config()
    config.name = "emoji_distil"
    config.data.length = 8192
    config.train.update(steps=2000, batch=16, ema=0.99, log_every=10, save_every=100)
    config.train.optimizer.update(lr=7e-4, schedule="cosine", warmup=50, clip=1.0)
    config.validation.every = 200
    config.distil = ConfigDict(
        dict(
            teacher="router,workdir=runs/equal_router",
            student="average",
            scenes=0,
            features=0.0,
            trajectories=dict(path="runs/trajectories", count=2048, share=0.5, painted=0.1, steps=10),
        )
    )
    return config
