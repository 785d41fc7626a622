"""The run of record: Stable Diffusion 1.5, three fine-tunes, 512 px (Wang et al. 2025, section 4).

    python -m afa_jax.train --config configs/sd15.py --workdir runs/sd15 --config.data.path=PICTURES
    python -m afa_jax.sample --config configs/sd15.py --workdir runs/sd15 --prompt "a lighthouse at dawn" --out pictures

Experts are single files (as CivitAI publishes them), diffusers folders or ids on the Hugging Face hub; edit EXPERTS, or
give them with --expert NAME=PATH. Look at them first: python -m afa_jax.convert --inspect FILES, then python -m
afa_jax.screen --config configs/sd15.py. The paper used 10,000 JourneyDB pairs for 10 epochs with a batch of 8 (12,500
steps); PICTURES is a folder with captions. For JourneyDB itself see afa_jax/prepare.py: its kind "tfds" has other
fields, so copy this file and edit data.
Not run by us: no pretrained Stable Diffusion weights can be had where this project is built. The training step is
traced at full size in the tests; benchmarks/sd15.py executed it with random weights, 256 px and batch 1, on a CPU, and
compiled it at full size for a TPU, where it takes 8.6 GiB of one chip (docs/architecture.md).

Variants, joined by "_" (group2_coco): "group1", the default (epiCRealism, majicMIX realistic, Realistic Vision),
"group2" (AbsoluteReality, CyberRealistic, RealCartoon-Realistic); "256" (at 256 px); AFA's trained rivals: "router",
"ladder", "gate", "mbw" (learned block weights). And what a comparison asks for:

    python -m afa_jax.evaluate --config configs/sd15.py:coco --workdir runs/sd15
    python -m afa_jax.evaluate --config configs/sd15.py:drawbench --workdir runs/sd15

"coco", the paper's COCO 2017 at 256 px: annotations/captions_val2017.json and val2017 of cocodataset.org, below
data/coco. "drawbench", four pictures of each of DrawBench's 200 prompts: its table with the columns Prompts and
Category as data/drawbench.csv. Without either, the prompts of data/prompts.txt, one a line. Other places by
--config.evaluation.prompts.path=FILE and the like. The metrics want requirements-metrics.txt and their weights; what is
absent is left out, and the report says so. So are the rivals that are trained, until there is their run:

    python -m afa_jax.train --config configs/sd15.py:router --workdir runs/sd15_router      (and ladder, gate, mbw)
    python -m afa_jax.train --config configs/sd15.py --workdir runs/sd15_no_time --config.sabw.use_time=False

(no_text: sabw.use_text=False; one_weight: sabw.per_pixel=False; last_site: sabw.sites=last; shared: sabw.shared=True).
Experts that were fine-tuned on intervals of timesteps, of this or another architecture, go into a method of kind
"time" as in configs/emoji.py.
"""

from ml_collections import ConfigDict

# Diffusers-format copies on the hub, of what CivitAI has as single files. Check what you download.
EXPERTS = {
    "group1": (
        ("epicrealism", "emilianJR/epiCRealism"),
        ("majicmix", "digiplay/majicMIX_realistic_v7"),
        ("realisticvision", "SG161222/Realistic_Vision_V5.1_noVAE"),
    ),
    "group2": (
        ("absolutereality", "digiplay/AbsoluteReality_v1.8.1"),
        ("cyberrealistic", "models/sd15/cyberrealistic"),
        ("realcartoon", "models/sd15/realcartoon-realistic"),
    ),
}


RIVALS = dict(
    router=dict(kind="router", block_out_channels=(64, 128), layers_per_block=1, heads=4, norm_num_groups=8),
    ladder=dict(kind="ladder", block_out_channels=(64, 128, 128, 128), heads=4, norm_num_groups=8),
    gate=dict(kind="gate", hidden=64),
    mbw=dict(kind="mbw"),
)
WEIGHTS = (
    "inception",
    "clip",
    "aesthetic",
    "pickscore",
    "pickscore_tokenizer",
    "hpsv2",
    "image_reward",
    "bert_tokenizer",
)
CHOICES = (tuple(EXPERTS), ("256",), ("coco", "drawbench"), tuple(RIVALS))


def get_config(arg: str = "") -> ConfigDict:
    parts = arg.split("_") if arg else []
    chosen = [[part for part in parts if part in choice] for choice in CHOICES]
    if sum(map(len, chosen)) < len(parts) or any(len(own) > 1 for own in chosen):
        raise KeyError(
            "choose group1 or group2, 256, coco or drawbench, router, ladder, gate or mbw, joined by _, or none"
        )
    size = 256 if chosen[1] else 512
    group = chosen[0][0] if chosen[0] else "group1"
    names = [name for name, _ in EXPERTS[group]]
    config = ConfigDict(
        dict(
            name="sd15",
            dtype="bfloat16",
            mesh=dict(data=-1, fsdp=1, expert=1),
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            experts=[dict(name=name, path=path) for name, path in EXPERTS[group]],
            sabw=dict(
                hidden=128,
                transformer_layers=2,
                heads=8,
                norm_num_groups=32,
                use_time=True,
                use_text=True,
                per_pixel=True,
                sites="all",
                shared=False,
            ),
            fusion=dict(kind="afa"),
            data=dict(
                kind="folder",
                path="data/journeydb",
                captions="",
                verify=True,
                skip_unreadable=False,
                size=(size, size),
                flip=False,
                bad="error",
                workers=4,
            ),
            train=dict(
                seed=0,
                steps=12_500,
                batch=8,
                accumulate=1,
                remat="fused",
                ema=0.0,
                caption_dropout=0.1,
                min_snr_gamma=0.0,
                log_every=1,
                save_every=500,
                keep=3,
                writers=("tensorboard",),
                optimizer=dict(lr=1e-4, schedule="constant", warmup=0, weight_decay=0.01, clip=0.0, b2=0.999),
            ),
            cache=dict(path="cache", seed=0, crops=1, shard=256, batch=8),
            validation=dict(
                every=250,
                pairs=64,
                buckets=4,
                batch=8,
                seed=0,
                data=None,  # held out of the training pairs
                prompts=(
                    "a lighthouse on a cliff at dawn, oil painting",
                    "portrait of an old fisherman, 85mm photograph",
                    "a red bicycle leaning on a blue wall",
                    "a bowl of ramen, studio light",
                ),
                num_images=2,
            ),
            sample=dict(size=(size, size), steps=50, guidance=7.5, batch=4),
            evaluation=evaluation(names, size, *chosen[2]),
        )
    )
    if chosen[3]:
        config.fusion = ConfigDict(RIVALS[chosen[3][0]])
    if chosen[3] in (["router"], ["ladder"]):
        config.train.remat = "none"  # its gradient does not go through the experts
    if chosen[3] == ["mbw"]:
        config.cache.path = ""  # it merges the text encoders too, whose states the cache would hold
    return config


def evaluation(names: list[str], size: int, protocol: str = "") -> dict:
    """A comparison of the experts of these names; ``protocol`` is one of the paper's (section 4)."""
    own = dict(
        prompts=dict(kind="file", path="data/prompts.txt", count=0, seed=0),
        metrics=("clip_t", "aesthetic", "pickscore", "hpsv2", "image_reward"),
        main="image_reward",
        seeds=(0, 1),
        size=(size, size),
    )
    if protocol == "coco":
        own = dict(
            prompts=dict(
                kind="coco",
                annotations="data/coco/annotations/captions_val2017.json",
                pictures="data/coco/val2017",
                count=0,  # all 5,000
                seed=0,
            ),
            metrics=("fid", "is", "clip_i", "clip_t"),
            main="clip_t",
            seeds=(0,),
            size=(256, 256),
        )
    elif protocol == "drawbench":
        own |= dict(
            prompts=dict(kind="file", path="data/drawbench.csv", count=0, seed=0),
            metrics=("aesthetic", "pickscore", "hpsv2", "image_reward"),
            seeds=(0, 1, 2, 3),
        )
    return own | dict(
        steps=50,
        guidance=7.5,
        eta=0.0,
        batch=4,
        stand_out=own["metrics"],
        resamples=2000,
        weights=dict.fromkeys(WEIGHTS, ""),  # local files in place of the hub's, as evaluation/metrics/table.py says
        noise=dict(pairs=0),
        methods=methods(names),
        equal_time=("afa", "uniform", "noise_average"),
        curves=dict(
            methods=("afa", "uniform", f"expert:{names[0]}"),
            steps=(5, 10, 20, 30, 50),
            prompts=1000 if protocol == "coco" else 100,  # FID of fewer pictures says little
            seeds=(0,),
        ),
        examples=8,
    )


def methods(names: list[str]) -> list[dict]:
    """In the order of the table: controls, then rivals, AFA, and what its maps are worth."""
    first, second, *_ = names
    return [
        *(dict(kind="expert", expert=name) for name in names),
        *(dict(kind="inside", expert=name) for name in names),
        dict(kind="base"),
        dict(kind="uniform"),
        dict(kind="average"),
        dict(kind="add_difference", a=first, b=second, alpha=1.0),
        dict(name=f"mbw GRAD_V of {first}", kind="mbw", preset="GRAD_V", of=first),
        dict(kind="task_arithmetic", scale=0.4),
        dict(kind="ties", density=0.2),
        dict(kind="dare", p=0.9),
        dict(name=f"slerp of {first} and {second}", kind="slerp", a=first, b=second),
        dict(kind="model_stock"),
        dict(kind="autombw", path="runs/sd15_search/best.json"),
        dict(kind="learned_mbw", workdir="runs/sd15_mbw"),
        dict(kind="noise_average"),
        dict(name="magicfusion of 2", kind="magicfusion", general=first, experts=(second,)),
        dict(name=f"magicfusion of {len(names)}", kind="magicfusion", general=first),
        dict(name="superdiff eta=1", kind="superdiff", temperature=1.0, eta=1.0),
        dict(kind="router", workdir="runs/sd15_router"),
        dict(kind="maxfusion"),
        dict(name="in turns", kind="time", scheme="alternate", what="the experts in turns, step by step"),
        dict(
            name="one after the other", kind="time", what="the first of them paints the end, the last one the beginning"
        ),
        dict(
            name=f"{second}, refined by {first}",
            kind="time",
            scheme="refiner",
            experts=(first, second),
            what="a hand-over at t = 200, as from SDXL's base to its refiner",
        ),
        dict(kind="gate", workdir="runs/sd15_gate"),
        dict(kind="afa"),
        dict(name="afa, experts permuted", kind="afa", order=(*names[1:], first), family="control"),
        dict(name="afa, temperature 0.5", kind="afa", temperature=0.5, family="ablation"),
        dict(name="afa, top 1", kind="afa", top=1, family="ablation"),
        *(
            dict(name=f"afa, {what}", kind="afa", workdir=f"runs/sd15_{name}", family="ablation")
            for name, what in (
                ("no_time", "no time"),
                ("no_text", "no text"),
                ("one_weight", "one weight an expert"),
                ("last_site", "last site only"),
                ("shared", "one shared aggregator"),
            )
        ),
    ]
