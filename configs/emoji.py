r"""The embedded default: AFA on the emoji experts that the repository carries. One CPU, a few minutes.

python -m afa_jax.train --config configs/emoji.py --workdir runs/emoji
python -m afa_jax.sample --config configs/emoji.py --workdir runs/emoji --out pictures \
    --prompt "octopus and pizza, noto style"

Variants: "full", a long run with the cache and validation; "base", the base model as the only expert, to compare the
experts with it by afa_jax.evaluate.
"""

from ml_collections import ConfigDict

TOPICS = ("animals", "food", "things")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "full", "base"):
        raise KeyError("choose full or base, or none")
    names = ("base",) if arg == "base" else TOPICS
    config = ConfigDict(
        dict(
            name="emoji",
            dtype="float32",
            base="models/emoji/base",
            experts=[dict(name=name, path=f"models/emoji/{name}") for name in names],
            sabw=dict(
                hidden=32,
                transformer_layers=1,
                heads=4,
                norm_num_groups=8,
                use_time=True,
                use_text=True,
                per_pixel=True,
                sites="all",
            ),
            data=dict(kind="emoji", seed=5, topics=None, mixed=True, single=0.1),
            train=dict(
                seed=0,
                steps=200,
                batch=16,
                accumulate=1,
                remat="none",
                ema=0.0,
                caption_dropout=0.1,
                min_snr_gamma=0.0,
                log_every=1,
                save_every=100,
                keep=2,
                writers=(),
                optimizer=dict(lr=1e-3, schedule="constant", warmup=0, weight_decay=0.01, clip=0.0, b2=0.999),
            ),
            cache=dict(path="", seed=0, crops=1, shard=512, batch=16),
            validation=dict(
                every=0,
                pairs=64,
                buckets=4,
                batch=16,
                seed=0,
                data=dict(kind="emoji", seed=10_000_019, single=0.1),  # scenes that nothing trains on
                prompts=("octopus and pizza, noto style", "hamburger and guitar, fluent style"),
                num_images=2,
            ),
            sample=dict(size=(32, 64), steps=25, guidance=3.0, batch=8),
        )
    )
    if arg == "full":
        config.data.length = 8192  # what the cache holds; scenes are drawn, so there could be any number
        config.train.update(steps=1000, log_every=10, save_every=100)
        config.cache.path = "runs/cache"
        config.validation.every = 100
    return config
