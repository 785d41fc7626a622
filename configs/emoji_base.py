r"""The base model of the emoji default: all topics, all styles, one and two subjects.

It predicts v. Predicting the noise, 1,000 steps taught it to denoise and where subjects stand, and nothing of which
subject or style the prompt asks for: what the text can tell matters at high noise only, where the error of the noise is
a tenth of its mean over the timesteps.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m afa_jax.finetune --config configs/emoji_base.py \
    --workdir runs/emoji_base

The shipped base is the checkpoint of step 1,000 (the run was ended there: --resume --config.steps=1000); 21 minutes on
two cores shared with other work, loss 0.286 at the end. Early: layout and some colour, hardly a subject.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise KeyError("there are no variants")
    return ConfigDict(
        dict(
            name="emoji_base",
            seed=0,
            steps=3600,
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
            data=dict(seed=2, topics=None, mixed=True, single=0.3),
            optimizer=dict(lr=1e-3, schedule="cosine", warmup=100, weight_decay=0.01, clip=1.0, b2=0.99),
        )
    )  # fmt: skip
