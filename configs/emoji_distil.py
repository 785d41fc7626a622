r"""One ordinary checkpoint distilled from the emoji experts, at the price of one of them.

    python -m afa_jax.distil --config configs/emoji_distil.py --workdir runs/distil
    python -m afa_jax.distil --config configs/emoji_distil.py --teacher afa,workdir=runs/emoji_full \
        --workdir runs/distil_afa
    python -m afa_jax.distil --config configs/emoji_distil.py --teacher data --workdir runs/distil_data

(the last one is the control: the same steps on the data, without a teacher), then

    python -m afa_jax.evaluate --config configs/emoji_equal.py --workdir runs/emoji_full \
        --method distilled:runs/distil --out runs/equal_distil

With guidance folded in, and from there in few steps, each with the model of the line before as teacher and start:

    python -m afa_jax.distil --config configs/emoji_distil.py:guided --workdir runs/distil_guided
    python -m afa_jax.distil --config configs/emoji_distil.py:eight --workdir runs/distil_8
    python -m afa_jax.distil --config configs/emoji_distil.py:four --workdir runs/distil_4
    python -m afa_jax.distil --config configs/emoji_distil.py:two --workdir runs/distil_2

DMM, the experts as three teachers of one student:

    python -m afa_jax.distil --config configs/emoji_distil.py:styles --workdir runs/dmm

The default teacher is the output router of configs/emoji_equal.py. The pictures are AFA's 8,192 scenes; the teacher's
trajectories are made for the first 2,048 captions of them, once, into runs/trajectories.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

GUIDANCE = (1.0, 5.0)
FEW = dict(eight=("guided", 8, 40), four=("8", 4, 8), two=("4", 2, 4))
"""By variant: the run that it starts from, and the steps of student and teacher."""


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "guided", "styles", *FEW):
        raise KeyError(f"choose one of guided, styles, {', '.join(FEW)}, or none")
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
    if arg == "styles":
        config.distil.update(teacher="experts", features=1e-3)
    elif arg:
        config.distil.guidance = GUIDANCE
    if arg in FEW:
        before, steps, teacher_steps = FEW[arg]
        run = f"distilled,workdir=runs/distil_{before}"
        config.distil.update(teacher=run, student=run, few=dict(steps=steps, teacher_steps=teacher_steps))
        config.train.update(steps=1000)
        config.train.optimizer.update(lr=3e-4)
    if arg:
        config.name = f"emoji_distil:{arg}"
    return config
