"""Makes the shipped models/emoji as small as it is: most kernels of the U-Nets in 8 bits, the aggregators in 16.

    git worktree add DIR a2d8784  # any commit whose U-Nets are float16, as they were trained
    python scripts/shrink_emoji.py DIR/models/emoji OUT

OUT becomes a copy of the folder. Kernels of the U-Nets are float8_e4m3fn there, a dtype of safetensors that other
Stable Diffusion programs read, too. The layers next to the picture and the shortcuts stay float16: 9 % of the weights,
and nearly all that the rounding of everything costs (docs/architecture.md has the figures). ensemble.json then names
the sha256 of the experts' new tensors: the aggregators belong to these.
"""

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import file_sha256, read_metadata, read_tensors, write_tensors

UNET = "unet/diffusion_pytorch_model.safetensors"
FLOAT16 = ("conv_in.", "down_blocks.0.", "conv_shortcut.", "up_blocks.2.", "conv_out.")


def small(key: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor of a U-Net as it is shipped: a kernel in 8 bits, unless it is one of FLOAT16."""
    if array.ndim < 2 or any(part in key for part in FLOAT16):
        return array
    return array.astype(ml_dtypes.float8_e4m3fn)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write models/emoji with U-Nets of 8 bits.")
    parser.add_argument("source", type=Path, help="the folder of base, experts and afa, as they were trained")
    parser.add_argument("out", type=Path, help="a folder that does not exist")
    options = parser.parse_args()
    shutil.copytree(options.source, options.out)
    for unet in sorted(options.out.glob(f"*/{UNET}")):
        tensors = {key: small(key, array) for key, array in read_tensors(unet).items()}
        write_tensors(unet, tensors, read_metadata(unet))
        print(f"{unet}: {unet.stat().st_size:,} bytes")
    weights, path = options.out / "afa/aggregators.safetensors", options.out / "afa/ensemble.json"
    halves = {key: array.astype(np.float16) for key, array in read_tensors(weights).items()}
    write_tensors(weights, halves, read_metadata(weights))
    record = json.loads(path.read_text())
    record["aggregators_sha256"] = file_sha256(weights)
    for expert in record["experts"]:
        expert["sha256"] = hash_components(open_checkpoint(options.out / expert["name"]), EXPERT_COMPONENTS)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
