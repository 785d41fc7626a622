r"""What an ensemble's quality costs: ladders, a router that runs first, and one distilled checkpoint.

Prompts, seeds, sampler and metrics are those of configs/emoji_equal.py. Each fusion has 1,000 steps of 16 out of the
same 8,192 scenes, by

    options="--config.train.steps=1000 --config.train.ema=0.99 --config.train.optimizer.schedule=cosine \
        --config.train.optimizer.warmup=20"
    python -m afa_jax.train --config configs/emoji.py:router $options --workdir runs/price_router
    python -m afa_jax.train --config configs/emoji.py:ladder $options --workdir runs/price_ladder
    python -m afa_jax.train --config configs/emoji.py:ladder $options --config.fusion.residual=True \
        --workdir runs/price_ladder_residual
    python -m afa_jax.train --config configs/emoji.py:ladder $options --config.fusion.features=False \
        --workdir runs/price_ladder_blind

and the distilled checkpoint 1,000 steps, from the average of the experts, with few trajectories:

    python -m afa_jax.distil --config configs/emoji_distil.py --teacher ladder,workdir=runs/price_ladder_residual \
        --config.train.steps=1000 --config.distil.trajectories.count=384 --workdir runs/price_distil

Then, with the aggregators that the repository carries for AFA (1,000 steps too, at a constant learning rate):

    python -m afa_jax.evaluate --config configs/emoji_price.py --workdir models/emoji/afa --out runs/price

The options of sparse execution were chosen on other prompts of the same kind. On two cores beside other work the
trainings took 36 minutes (router), 17 (ladder), 18 (with a correction) and 31 (without features, at a higher load),
the distilling 33, and 5 methods' pictures and costs 12. docs/price.md was made of these five: expert:things, router,
the ladder with a correction, the sparse router with half the path guided, and the distilled checkpoint.
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
    config.name = "emoji_price"
    config.evaluation.update(controls=False, methods=methods(), equal_time=())
    config.evaluation.curves = dict()
    return config


def methods() -> list[dict]:
    sparse = dict(kind="router", workdir="runs/price_router", threshold=0.5, unconditional="conditional", chunk=8)
    return [
        dict(kind="expert", expert="things"),
        dict(kind="afa"),
        dict(kind="router", workdir="runs/price_router"),
        dict(name="ladder", kind="ladder", workdir="runs/price_ladder"),
        dict(name="ladder, with a correction", kind="ladder", workdir="runs/price_ladder_residual"),
        dict(
            name="ladder, without features",
            kind="ladder",
            workdir="runs/price_ladder_blind",
            what="a small U-Net that sees neither features nor predictions of the experts",
        ),
        dict(name="sparse router", **sparse),
        dict(name="sparse router, half the path guided", guidance_interval=(0.0, 0.5), reuse=2, **sparse),
        dict(kind="distilled", workdir="runs/price_distil"),
    ]
