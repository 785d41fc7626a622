"""A fine-tune of Stable Diffusion 1.5 on pictures of your own, however few: an expert for an ensemble.

    python -m afa_jax.finetune --config configs/sd15_finetune.py --workdir runs/mine --config.data.path=PICTURES
    python -m afa_jax.convert --inspect runs/mine/model

PICTURES is a folder with captions (a .txt beside each picture, captions.jsonl or .csv). The result, runs/mine/model, is
a diffusers folder in float16 with its VAE: name it in EXPERTS of configs/sd15.py, or make a single file of it with
afa_jax.convert. All of the U-Net and of the text encoder is trained.

The start, ``init``, is a diffusers folder, a single file or an id on the Hugging Face hub; VAE, tokenizer and noise
schedule are its own. A single file has no tokenizer: --config.tokenizer=openai/clip-vit-large-patch14, or a folder.

``steps`` is for about 40 pictures, 80 times each; of hundreds take more. ``scenes=0`` takes all pictures: their latents
are computed once, each picture cut to ``data.size`` in one way, and kept in memory. Fewer pictures than a batch are in
it several times, with another noise each.

Memory: parameters, gradient and Adam's moments are float32, 16 bytes for each of 983 million parameters, 15.7 GB; what
the gradient needs of the forward pass comes on top. What makes that small is here: ``dtype="bfloat16"`` computes in
half the bytes, ``remat="stage"`` keeps the outputs of the U-Net's stages only and computes their inside again, exactly.
``accumulate`` works at a batch in so many parts, for 4 bytes more a parameter; ``ema`` above 0 keeps an average of the
parameters, also 4 bytes. Sizes that are smaller, --config.data.size="(384, 384)", need less again.

Not run by us: no pretrained Stable Diffusion weights can be had where this project is built. The step is traced at full
size in the tests, and run there on small networks.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise KeyError("there are no variants")
    return ConfigDict(
        dict(
            name="sd15_finetune",
            seed=0,
            init="stable-diffusion-v1-5/stable-diffusion-v1-5",
            vae="",  # init's own
            with_vae=True,
            dtype="bfloat16",
            remat="stage",
            steps=800,
            batch=4,
            accumulate=1,
            scenes=0,
            caption_dropout=0.1,
            min_snr_gamma=0.0,
            ema=0.0,
            log_every=10,
            save_every=200,
            data=dict(
                kind="folder",
                path="data/pictures",
                captions="",
                verify=True,
                skip_unreadable=False,
                size=(512, 512),
                flip=False,
                bad="error",
            ),
            optimizer=dict(lr=1e-5, schedule="constant", warmup=50, weight_decay=0.01, clip=1.0, b2=0.999),
        )
    )
