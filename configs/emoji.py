r"""The embedded default: AFA on the emoji experts that the repository carries. One CPU, a few minutes.

python -m afa_jax.train --config configs/emoji.py --workdir runs/emoji
python -m afa_jax.sample --config configs/emoji.py --workdir runs/emoji --out pictures \
    --prompt "octopus and pizza, noto style"

The whole comparison of docs/results.md: train what is trained (below), search, then

    python -m afa_jax.evaluate --config configs/emoji.py --workdir runs/emoji_full --out runs/comparison

Variants: "full", a long run with the cache and validation. The ablations of AFA (no_time, no_text, one_weight: one an
expert, site and picture; last_site; shared: one aggregator for all sites; and short,
what they are to be compared with) and its trained rivals (router, gate, mbw), each with

    python -m afa_jax.train --config configs/emoji.py:VARIANT --workdir runs/emoji_VARIANT

The other makers of what the comparison wants: configs/emoji_time.py, and

    python -m afa_jax.search --config configs/emoji.py --workdir runs/emoji_search --space curve --trials 60
    python -m afa_jax.export --config configs/emoji.py --workdir runs/emoji_full \
        --snapshot runs/emoji_snapshot.safetensors

A method whose part is missing is left out, and the report says so.
"""

from ml_collections import ConfigDict

TOPICS = ("animals", "food", "things")
ABLATIONS = dict(
    short={},
    no_time=dict(use_time=False),
    no_text=dict(use_text=False),
    one_weight=dict(per_pixel=False),
    last_site=dict(sites="last"),
    shared=dict(shared=True),
)
RIVALS = dict(
    ladder=dict(kind="ladder", block_out_channels=(48, 64, 64), heads=4, norm_num_groups=8),
    router=dict(kind="router", block_out_channels=(32, 64), layers_per_block=1, heads=4, norm_num_groups=8),
    gate=dict(kind="gate"),
    mbw=dict(kind="mbw"),
)


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "full", *ABLATIONS, *RIVALS):
        raise KeyError(f"choose one of full, {', '.join((*ABLATIONS, *RIVALS))}, or none")
    config = ConfigDict(
        dict(
            name="emoji",
            dtype="float32",
            mesh=dict(data=-1, fsdp=1, expert=1),
            base="models/emoji/base",
            experts=[dict(name=name, path=f"models/emoji/{name}") for name in TOPICS],
            sabw=dict(
                hidden=32,
                transformer_layers=1,
                heads=4,
                norm_num_groups=8,
                use_time=True,
                use_text=True,
                per_pixel=True,
                sites="all",
                shared=False,
            ),
            fusion=dict(kind="afa"),
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
            evaluation=evaluation(),
        )
    )
    if arg:
        config.data.length = 8192  # what the cache holds; scenes are drawn, so there could be any number
        config.train.update(steps=1000, log_every=10, save_every=100)
        config.cache.path = "runs/cache"
        config.validation.every = 100 if arg == "full" else 0
    if arg in ABLATIONS:
        config.train.steps = 200
        config.sabw.update(ABLATIONS[arg])
    if arg in RIVALS:
        config.fusion = ConfigDict(RIVALS[arg])
        config.train.steps = 300 if arg in ("router", "ladder") else 200  # these two have much to learn
        # The gate and the block weights are few numbers, far from where they start.
        lr = dict(ladder=1e-3, router=1e-3, gate=3e-3, mbw=2e-2)[arg]
        config.train.optimizer.update(dict(lr=lr, weight_decay=0.0))
        if arg == "mbw":
            config.cache.path = ""  # it merges the text encoders too, whose states the cache would hold
    return config


def evaluation() -> dict:
    """The comparison: 200 prompts that no single expert was trained on, three seeds."""
    return dict(
        prompts=dict(kind="emoji", seed=11, groups={"two topics": 104, "unseen pairs": 48, "unseen combinations": 48}),
        seeds=(0, 1, 2),
        steps=10,
        guidance=3.0,
        eta=0.0,
        batch=16,
        one_by_one=False,  # a third faster on a CPU; a picture's last bits may depend on its place in the batch
        metrics=("emoji",),
        main="subject",
        stand_out=("subject", "style", "kid"),
        resamples=2000,
        noise=dict(pairs=32),
        methods=methods(),
        equal_time=("afa", "uniform"),
        curves=dict(
            methods=("afa", "uniform", "expert:things"),
            steps=(5, 10, 20, 40),
            prompts=32,
            seeds=(0,),
        ),
        examples=8,
    )


def methods() -> list[dict]:
    """In the order of the table: controls, then rivals, AFA, and AFA's ablations."""
    parts = [dict(name=part, path=f"runs/emoji_time_{part}/model") for part in ("low", "middle", "high")]
    uniform = [dict(name=f"part{i}", path=f"runs/emoji_time_uniform{i}/model") for i in range(3)]
    return [
        *(dict(kind="expert", expert=name) for name in TOPICS),
        *(dict(kind="inside", expert=name) for name in TOPICS),
        dict(kind="base"),
        dict(kind="uniform"),
        # What one U-Net does with the time that AFA takes for 10 steps.
        dict(name="expert:things, 40 steps", kind="expert", expert="things", steps=40, family="control"),
        dict(name="average, 40 steps", kind="average", steps=40, family="control"),
        dict(kind="average"),
        dict(kind="add_difference", a="animals", b="food", alpha=1.0),
        dict(name="mbw GRAD_V of things", kind="mbw", preset="GRAD_V", of="things"),
        dict(name="autombw", kind="autombw", path="runs/emoji_search/best.json"),
        dict(kind="learned_mbw", workdir="runs/emoji_mbw"),
        # The papers' defaults, and what had the lowest noise MSE of a few tried on unseen scenes.
        dict(kind="task_arithmetic", scale=0.4),
        dict(kind="task_arithmetic", scale=0.2),
        dict(kind="ties", density=0.2),
        dict(kind="ties", density=0.2, scale=0.3),
        dict(kind="dare", p=0.9),
        dict(kind="dare", p=0.1, scale=0.2),
        dict(name="slerp of animals and food", kind="slerp", a="animals", b="food"),
        dict(kind="model_stock"),
        dict(name="snapshot of AFA", kind="checkpoint", path="runs/emoji_snapshot.safetensors"),
        dict(
            name="average, fine-tuned",
            kind="checkpoint",
            path="runs/emoji_time_root/model",
            what="the averaged experts, trained on as one U-Net on AFA's data",
        ),
        dict(kind="noise_average"),
        dict(name="magicfusion of 2", kind="magicfusion", general="animals", experts=("things",)),
        dict(name="magicfusion of 3", kind="magicfusion", general="food"),
        dict(name="superdiff eta=1", kind="superdiff", temperature=1.0, eta=1.0),
        dict(kind="superdiff", temperature=0.01),
        dict(kind="router", workdir="runs/emoji_router"),
        dict(kind="maxfusion"),
        dict(name="in turns", kind="time", scheme="alternate", what="the experts in turns, step by step"),
        dict(
            name="eDiff-I", kind="time", scheme="tree", experts=parts, what="three fine-tunes on a binary tree's leaves"
        ),
        dict(name="uniform intervals", kind="time", experts=uniform, what="three fine-tunes on equal intervals"),
        dict(kind="gate", workdir="runs/emoji_gate"),
        dict(kind="afa"),
        dict(name="afa, experts permuted", kind="afa", order=("food", "things", "animals"), family="control"),
        dict(name="afa, temperature 0.5", kind="afa", temperature=0.5, family="ablation"),
        dict(name="afa, top 1", kind="afa", top=1, family="ablation"),
        *(
            dict(name=f"afa, {what}, 200 steps", kind="afa", workdir=f"runs/emoji_{name}", family="ablation")
            for name, what in (
                ("short", "all of it"),
                ("no_time", "no time"),
                ("no_text", "no text"),
                ("one_weight", "one weight an expert"),
                ("last_site", "last site only"),
                ("shared", "one shared aggregator"),
            )
        ),
    ]
