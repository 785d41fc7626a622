r"""The base model of the emoji default: all topics, all styles.

It predicts v. Predicting the noise, 1,000 steps taught it to denoise and where subjects stand, and nothing of which
subject or style the prompt asks for: what the text can tell matters at high noise only, where the error of the noise is
a tenth of its mean over the timesteps. Two subjects side by side teach words slowly, too; so words are learnt from
pictures of one subject on one place first, and then what stands left and right.

python -m afa_jax.finetune --config configs/emoji_base.py:start --workdir runs/emoji_start
python -m afa_jax.finetune --config configs/emoji_base.py:words --workdir runs/emoji_words
python -m afa_jax.finetune --config configs/emoji_base.py --workdir runs/emoji_base

The shipped base came from these three on two cores that did other work too, with GLIBC_TUNABLES as in
docs/architecture.md: 750 steps of :start (of a run planned for 3,600, so at almost the full learning rate; 11 minutes,
loss 0.46), 6,000 of :words (43 minutes, loss 0.38), 450 of scenes (6 minutes, loss 0.36). The autoencoder was there
before: configs/emoji_vae.py.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "start": dict(init="", steps=750),
    "words": dict(
        init="runs/emoji_start/model",
        steps=6000,
        data=dict(single=1.0, places=1),
        optimizer=dict(schedule="constant", warmup=50),
    ),
    "": dict(init="runs/emoji_words/model", steps=450, scenes=8192),
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise KeyError(f"choose one of {', '.join(filter(None, VARIANTS))}, or none of them")
    config = ConfigDict(
        dict(
            name=f"emoji_base:{arg}" if arg else "emoji_base",
            seed=0,
            steps=0,
            batch=32,
            scenes=20480,  # encoded once, then trained on in turn
            caption_dropout=0.1,
            min_snr_gamma=0.0,
            ema=0.995,
            log_every=10,
            save_every=250,
            init="",
            with_vae=True,
            vae="models/emoji/base",
            tokenizer="afa_jax/data/emoji",
            unet=dict(
                sample_size=16,
                in_channels=8,
                out_channels=8,
                block_out_channels=(48, 80, 112),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=4,
                cross_attention_dim=128,
                norm_num_groups=16,
            ),
            text_encoder=dict(
                vocab_size=674, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=16, eos_token_id=673,
            ),
            schedule=dict(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                steps_offset=1, set_alpha_to_one=False, clip_sample=False,
            ),
            data=dict(seed=2, topics=None, mixed=True, single=0.3, places=2),
            optimizer=dict(lr=1e-3, schedule="cosine", warmup=100, weight_decay=0.01, clip=1.0, b2=0.99),
        )
    )  # fmt: skip
    config.update(VARIANTS[arg])
    return config
