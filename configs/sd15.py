"""The run of record: Stable Diffusion 1.5, three fine-tunes, 512 px (Wang et al. 2025, section 4).

    python -m afa_jax.train --config configs/sd15.py --workdir runs/sd15 --config.data.path=PICTURES
    python -m afa_jax.sample --config configs/sd15.py --workdir runs/sd15 --prompt "a lighthouse at dawn" --out pictures

Experts are single files (as CivitAI publishes them), diffusers folders or ids on the Hugging Face hub; edit EXPERTS, or
give them with --expert NAME=PATH. Look at them first: python -m afa_jax.convert --inspect FILES, then python -m
afa_jax.screen --config configs/sd15.py. The paper used 10,000 JourneyDB pairs for 10 epochs with a batch of 8 (12,500
steps); PICTURES is a folder with captions. For JourneyDB itself see afa_jax/data/prepare.py: its kind "tfds" has other
fields, so copy this file and edit data.
Not run by us: no pretrained Stable Diffusion weights can be had where this project is built. The training step is
traced at full size in the tests; benchmarks/sd15.py executed it with random weights, 256 px and batch 1, on a CPU, and
compiled it at full size for a TPU, where it takes 8.6 GiB of one chip (docs/architecture.md).

Variants: "" and "group1" (epiCRealism, majicMIX realistic, Realistic Vision), "group2" (AbsoluteReality,
CyberRealistic, RealCartoon-Realistic), "256" (group1 at 256 px).
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


def get_config(arg: str = "") -> ConfigDict:
    size = 256 if arg == "256" else 512
    group = {"": "group1", "256": "group1"}.get(arg, arg)
    return ConfigDict(
        dict(
            name="sd15",
            dtype="bfloat16",
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
            ),
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
        )
    )
