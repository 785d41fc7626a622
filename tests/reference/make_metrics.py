"""Make tests/goldens/metrics.json: what the authors' own code gives for networks of random weights. See README.md.

    python3.11 -m venv DIR/metrics && DIR/metrics/bin/pip install -r tests/reference/requirements-metrics.txt
    DIR/metrics/bin/pip install --no-deps image-reward==1.5 hpsv2==1.2.0 pytorch-fid==0.3.0 clean-fid==0.1.35
    DIR/metrics/bin/python tests/reference/make_metrics.py

The authors' packages without what they ask for: hpsv2 lacks its vocabulary, which is open_clip's, and image-reward
wants packages that this part of it does not use.
"""

import importlib
import json
import platform
import shutil
import sys
import tempfile
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from weights import random_input, random_state_dict

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
PROMPTS = ["a cat with a red hat", "two dogs, playing on the beach at night"]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ",",
    *["a", "cat", "with", "red", "hat", "two", "dogs", "on", "the", "beach", "at"],
]
SIZES = [(40, 53), (61, 36)]  # rows and columns of the pictures


def picture(key: str, rows: int, columns: int) -> Image.Image:
    """Some colours that change slowly."""
    values = (random_input(key, (6, 6, 3)) * 60 + 128).clip(0, 255).astype(np.uint8)
    return Image.fromarray(values).resize((columns, rows), Image.Resampling.BICUBIC)


PICTURES = [picture(f"metrics/{i}", *size) for i, size in enumerate(SIZES)]


def fill(case: str, module: torch.nn.Module) -> dict[str, list[int]]:
    """Random weights by name for all that is a weight; variances above zero."""
    shapes = {key: list(x.shape) for key, x in module.state_dict().items() if x.is_floating_point()}
    state = {key: torch.from_numpy(np.asarray(x)) for key, x in random_state_dict(case, shapes).items()}
    state |= {key: 0.5 + x.abs() for key, x in state.items() if key.endswith("running_var")}
    module.load_state_dict(state, strict=False)
    module.eval()
    return shapes


def stub(name: str, **attributes: object) -> None:
    """A module that is imported and not used."""
    module = types.ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(attributes)
    sys.modules[name] = module


def package(name: str, path: Path) -> None:
    """A package whose own __init__ is not run."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]  # type: ignore[attr-defined]
    sys.modules[name] = module


def image_reward() -> dict[str, object]:
    from transformers import BertTokenizer

    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        stub(name)
    stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    root = Path(find_spec("ImageReward").submodule_search_locations[0])  # type: ignore[union-attr, index]
    package("ImageReward", root)
    package("ImageReward.models", root / "models")
    package("ImageReward.models.BLIP", root / "models" / "BLIP")
    med = importlib.import_module("ImageReward.models.BLIP.med")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    code = importlib.import_module("ImageReward.ImageReward")
    config = med.BertConfig(
        vocab_size=32, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=40, layer_norm_eps=1e-12, add_cross_attention=True, encoder_width=64,
    )  # fmt: skip
    blip = torch.nn.Module()
    blip.visual_encoder = vit.VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1)
    blip.text_encoder = med.BertModel(config, add_pooling_layer=False)
    model = code.ImageReward.__new__(code.ImageReward)
    torch.nn.Module.__init__(model)
    model.device, model.blip, model.mlp = "cpu", blip, code.MLP(128)
    model.preprocess = code._transform(32)
    model.mean, model.std = 0.16717362830052426, 1.0333394966054072
    shapes = fill("image_reward", model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(VOCABULARY))
        blip.tokenizer = BertTokenizer(str(Path(folder) / "vocab.txt"))
        with torch.no_grad():
            scores = [model.score(prompt, image) for prompt, image in zip(PROMPTS, PICTURES, strict=True)]
    return {"parameters": shapes, "vocabulary": VOCABULARY, "scores": scores}


def hpsv2() -> dict[str, object]:
    import open_clip

    root = Path(find_spec("hpsv2").submodule_search_locations[0])  # type: ignore[union-attr, index]
    source = root / "src" / "open_clip"
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    shutil.copyfile(Path(open_clip.__file__).with_name(vocabulary), source / vocabulary)
    package("hpsv2", root)
    package("hpsv2.src", root / "src")
    theirs = importlib.import_module("hpsv2.src.open_clip.model")
    transform = importlib.import_module("hpsv2.src.open_clip.transform").image_transform
    tokenize = importlib.import_module("hpsv2.src.open_clip.tokenizer").tokenize
    config = json.loads((source / "model_configs" / "ViT-H-14.json").read_text())
    with torch.device("meta"):
        of_theirs = theirs.CLIP(**config).state_dict()
        ours = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    assert {k: x.shape for k, x in of_theirs.items()} == {k: x.shape for k, x in ours.items()}
    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    model = theirs.CLIP(**small, output_dict=True)
    shapes = fill("hpsv2", model)
    preprocess = transform(28, is_train=False, resize_longest_max=True)
    scores = []
    for prompt, image in zip(PROMPTS, PICTURES, strict=True):
        with torch.no_grad():
            outputs = model(preprocess(image)[None], tokenize([prompt]))
        scores.append((outputs["image_features"] @ outputs["text_features"].T).item())
    return {"parameters": shapes, "config": small, "scores": scores}


def inception() -> dict[str, object]:
    import pytorch_fid.inception
    from torchvision.transforms.functional import to_tensor

    resizer = importlib.import_module("cleanfid.resize").build_resizer("clean")
    whole: list[torch.nn.Module] = []
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: whole[0].state_dict()
    build = pytorch_fid.inception._inception_v3

    def noted(**options: object) -> torch.nn.Module:
        whole[:] = [build(**options)]
        return whole[0]

    pytorch_fid.inception._inception_v3 = noted
    network = pytorch_fid.inception.InceptionV3()
    shapes = fill("inception", whole[0])
    network.eval()
    features, clean = [], []
    for image in PICTURES:
        with torch.no_grad():
            features.append(network(to_tensor(image)[None])[0].flatten())
            resized = torch.from_numpy(resizer(np.asarray(image)).transpose(2, 0, 1))[None]
            network.resize_input = network.normalize_input = False
            clean.append(network((resized - 128) / 128)[0].flatten())
            network.resize_input = network.normalize_input = True
    return {
        "parameters": shapes,
        "features": [x[::256].tolist() for x in features],
        "clean_features": [x[::256].tolist() for x in clean],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    packages = ("torch", "torchvision", "transformers", "image-reward", "hpsv2", "pytorch-fid", "clean-fid")
    record = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "prompts": PROMPTS,
        "sizes": SIZES,
    }
    for case in (inception, hpsv2, image_reward):
        record[case.__name__] = case()
        print(case.__name__, str({k: v for k, v in record[case.__name__].items() if k != "parameters"})[:400])
    (GOLDENS / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
