"""Write the models of the `single_file` case for make_torch.py, with this project. See README.md beside this file.

python -m tests.reference.write_single_files DIR

Of each model DIR gets a single file, `<case>.safetensors`, and a diffusers folder, `<case>/`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.expected import expected_shapes
from afa_jax.weights.formats.folders import write_folder
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.tensors import Tensor
from tests.reference.weights import random_state_dict

VAE = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[16, 32, 32, 32],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
)
TEXT = dict(
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    vocab_size=102,
    max_position_embeddings=16,
    bos_token_id=98,
    eos_token_id=99,
    pad_token_id=1,
)
UNET = dict(
    _class_name="UNet2DConditionModel", sample_size=8, cross_attention_dim=32, norm_num_groups=8, layers_per_block=2
)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
) | dict(set_alpha_to_one=False)
CASES: dict[str, dict[str, dict]] = {
    "single_sd15": dict(
        unet=UNET | dict(block_out_channels=[32, 64, 64, 64], attention_head_dim=8),
        vae=VAE,
        text_encoder=TEXT | dict(num_hidden_layers=3, hidden_act="quick_gelu"),
        scheduler=SCHEDULER | dict(prediction_type="epsilon"),
    ),
    "single_sd21": dict(
        unet=UNET
        | dict(
            block_out_channels=[16, 32, 32],
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            layers_per_block=1,
            attention_head_dim=[2, 4, 4],
            use_linear_projection=True,
        ),
        vae=VAE,
        text_encoder=TEXT | dict(num_hidden_layers=2, hidden_act="gelu"),
        scheduler=SCHEDULER | dict(prediction_type="v_prediction"),
    ),
}
DTYPES = {"single_sd15": np.float32, "single_sd21": np.float16}
CLASSES: dict[str, Any] = dict(unet=UNetConfig, vae=VAEConfig, text_encoder=TextConfig)


def checkpoint(case: str) -> MemoryCheckpoint:
    """The model of a case; a weight depends on case, component, key (in transformers 5's spelling) and shape."""
    states = {}
    for component, cls in CLASSES.items():
        fields = CASES[case][component]
        shapes = {
            key.removeprefix("text_model."): shape for key, shape in expected_shapes(cls.from_json(fields)).items()
        }
        prefix = "text_model." if component == "text_encoder" else ""
        weights = random_state_dict(f"{case}/{component}", shapes)
        states[component] = fields, {prefix + key: Tensor.of(array) for key, array in weights.items()}
    return MemoryCheckpoint(states, CASES[case]["scheduler"], path=Path(case))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case, dtype in DTYPES.items():
        write_single_file(folder / f"{case}.safetensors", checkpoint(case), dtype=dtype)
        write_folder(folder / case, checkpoint(case), dtype=dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
