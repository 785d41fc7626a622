"""The autoencoder of the emoji default: factor 4, 8 latent channels.

The shipped one was made in two runs::

    python -m afa_jax.train_vae --config configs/emoji_vae.py --workdir runs/emoji_vae
    python -m afa_jax.train_vae --config configs/emoji_vae.py:more --workdir runs/emoji_vae_more

17 and 31 minutes on two cores shared with other work; PSNR on 256 unseen scenes 24.48 dB after the first, 27.17 dB
after the second. train_vae whitens the latents at the end of a run; then it did not, and this did:

    python -m afa_jax.train_vae --config configs/emoji_vae.py:more --config.init=MODEL --config.steps=0 --workdir DIR
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=1100,
            batch=8,
            kl=1e-5,
            ema=0.995,
            log_every=10,
            save_every=250,
            init="",
            vae=dict(
                block_out_channels=(24, 48, 96),
                layers_per_block=1,
                latent_channels=8,
                norm_num_groups=8,
                sample_size=64,
                scaling_factor=1.0,
            ),
            data=dict(seed=1),
            optimizer=dict(lr=2e-3, schedule="cosine", warmup=50, weight_decay=0.0, clip=1.0, b2=0.99),
        )
    )
    if arg:
        more = {"more": dict(init="runs/emoji_vae/model", steps=1900, seed=1, kl=1e-6, data=dict(seed=11, single=0.0))}
        config.update(more[arg])
    return config
