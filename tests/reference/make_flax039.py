"""Golden values of diffusers 0.39's Flax U-Net, and folders that Flax classes saved. See README.md.

    python tests/reference/make_flax039.py        (after make_torch.py, whose configs, shapes and outputs it reads)

The class is run twice on the same weights: as it is, and with its deviations from PyTorch accounted for.
"""

import contextlib
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["USE_TORCH"] = "0"  # before transformers looks

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from diffusers.models import attention_flax, modeling_flax_pytorch_utils, resnet_flax
from diffusers.models.unets import unet_2d_condition_flax
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, FlaxCLIPTextModel
from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax
from weights import random_input, random_state_dict

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
FOLDER, VAE_FOLDER, TEXT_FOLDER = "unet_flax_folder", "vae_flax_folder", "clip_flax_folder"
VERSIONS = {"python": platform.python_version()} | {
    name: version(name) for name in ("diffusers", "transformers", "flax", "jax", "jaxlib", "numpy")
}
DEVIATIONS = [
    "GEGLU: nn.gelu is the tanh approximation; PyTorch has the exact GELU",
    "spatial transformer: GroupNorm epsilon 1e-5; PyTorch has 1e-6",
    "32 groups and epsilon 1e-5 are hard-coded: norm_num_groups and norm_eps of the config are ignored",
    "act_fn, downsample_padding and mid_block_scale_factor are ignored too (SiLU, 1 and 1), and upcast_attention",
    "layers_per_block: one int only",
    "upsampling always doubles: an indivisible side fails, where PyTorch upsamples to the skip's size",
]


class Patched:
    """flax.linen with some names replaced: diffusers' modules look theirs up in it when a model is set up."""

    def __init__(self, **changes: object):
        self._changes = changes

    def __getattr__(self, name: str) -> object:
        return self._changes.get(name) or getattr(nn, name)


@contextlib.contextmanager
def as_pytorch(groups: int = 32, gelu_and_eps: bool = True) -> Iterator[None]:
    """Account for the deviations: `groups` in every GroupNorm, and (unless switched off) exact GELU and eps 1e-6."""

    def group_norm(eps: float) -> Callable[..., nn.GroupNorm]:
        return lambda num_groups, epsilon: nn.GroupNorm(num_groups=groups, epsilon=eps)

    gelu = functools.partial(nn.gelu, approximate=not gelu_and_eps)
    attention_flax.nn = Patched(gelu=gelu, GroupNorm=group_norm(1e-6 if gelu_and_eps else 1e-5))
    resnet_flax.nn = unet_2d_condition_flax.nn = Patched(GroupNorm=group_norm(1e-5))
    try:
        yield
    finally:
        attention_flax.nn = resnet_flax.nn = unet_2d_condition_flax.nn = nn


class TorchLike(np.ndarray):
    """A numpy array with the one method that diffusers' converter wants of a PyTorch tensor."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


def build(case: str, cls: type = FlaxUNet2DConditionModel) -> tuple[dict, nn.Module, dict]:
    """The record of make_torch.py, the Flax model of that config, and its parameters, converted by diffusers."""
    record = json.loads((GOLDENS / f"{case}.json").read_text())
    known = {field for field in cls.__dataclass_fields__ if field not in ("parent", "name")}
    config = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in record["config"].items()
        if key in known and key != "dtype"
    }
    model = cls(**config)
    # The Flax VAE spells its attention as PyTorch once did.
    shapes = record["parameters_published" if cls is FlaxAutoencoderKL else "parameters"]
    weights = random_state_dict(case, record["parameters"], record["weight_scale"])
    weights = {key: value.view(TorchLike) for key, value in zip(shapes, weights.values(), strict=True)}
    params = modeling_flax_pytorch_utils.convert_pytorch_state_dict_to_flax(weights, model)
    wanted = jax.tree.map(jnp.shape, flatten_dict(model.init_weights(jax.random.PRNGKey(0))))
    assert jax.tree.map(jnp.shape, flatten_dict(params)) == wanted, (
        f"{case}: the parameters do not match the Flax model"
    )
    return record, model, params


def forward(record: dict, model: FlaxUNet2DConditionModel, params: dict, which: str) -> np.ndarray:
    inputs = record["inputs"][which]
    sample, text = (random_input(**inputs[name]) for name in ("sample", "encoder_hidden_states"))
    timestep = jnp.asarray(inputs["timestep"], dtype=jnp.int32)
    return np.asarray(model.apply({"params": params}, jnp.asarray(sample), timestep, jnp.asarray(text)).sample)


def difference(value: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, relative to the reference's root mean square."""
    return float(np.abs(value - reference).max() / np.sqrt(np.mean(reference**2)))


def save_vae_folder() -> None:
    """The VAE of make_torch.py's case as the Flax class saves it, after a look at what it computes."""
    record, model, params = build(VAE_FOLDER, FlaxAutoencoderKL)
    golden, inputs = load_file(GOLDENS / f"{VAE_FOLDER}.safetensors"), record["inputs"]["square"]
    image, latents = (jnp.asarray(random_input(**inputs[name])) for name in ("image", "latents"))
    posterior = model.apply({"params": params}, image, method=model.encode).latent_dist
    decoded = model.apply({"params": params}, latents.transpose(0, 2, 3, 1), method=model.decode).sample
    mean = np.asarray(posterior.mean).transpose(0, 3, 1, 2)
    for name, value in {"mean": mean, "decoded": np.asarray(decoded)}.items():
        apart = difference(value, golden[f"square.{name}"])
        print(f"{VAE_FOLDER}.{name}: {apart:.2e} from PyTorch")
        assert apart < 1e-4
    model.save_pretrained(GOLDENS / VAE_FOLDER, params=params)


def save_text_folder() -> None:
    """The text encoder `clip_sd15` as transformers' Flax class saves it, after a look at what it computes."""
    case = "clip_sd15"
    record = json.loads((GOLDENS / f"{case}.json").read_text())
    model = FlaxCLIPTextModel(CLIPTextConfig(**record["config"]))
    weights = random_state_dict(case, record["parameters"], record["weight_scale"])
    published = {f"text_model.{key}": value for key, value in weights.items()}
    model.params = convert_pytorch_state_dict_to_flax(published, model)
    output = model(input_ids=jnp.asarray(record["inputs"]["input_ids"])).last_hidden_state
    apart = difference(np.asarray(output), load_file(GOLDENS / f"{case}.safetensors")["last_hidden_state"])
    print(f"{TEXT_FOLDER}.last_hidden_state: {apart:.2e} from PyTorch")
    assert apart < 1e-4
    model.save_pretrained(GOLDENS / TEXT_FOLDER)


def main() -> None:
    assert "torch" not in sys.modules and (len(sys.argv) == 1 or sys.argv[1:] == ["folders"])
    save_vae_folder()
    save_text_folder()
    if sys.argv[1:] == ["folders"]:
        return
    assert diffusers.__version__ == "0.39.0"
    tensors, differences = {}, {}

    def compare(name: str, value: np.ndarray, reference: np.ndarray) -> None:
        tensors[name] = value
        differences[name] = difference(value, reference)
        print(f"{name}: {differences[name]:.2e} from PyTorch")

    for case in ("unet_sd15", "unet_sd15_faint"):
        record, model, params = build(case)
        torch_golden = load_file(GOLDENS / f"{case}.safetensors")
        for which in record["inputs"]:
            reference = torch_golden[f"{which}.output"]
            compare(f"{case}.{which}.output", forward(record, model, params, which), reference)
            with as_pytorch():
                name = f"{case}.{which}.output_as_pytorch"
                compare(name, forward(record, model, params, which), reference)
                assert differences[name] < 1e-4

    # A folder as Flax classes save it. The class has 32 groups and so no less than 32 channels; patched, it is small.
    reference = load_file(GOLDENS / f"{FOLDER}.safetensors")["square.output"]
    groups = json.loads((GOLDENS / f"{FOLDER}.json").read_text())["config"]["norm_num_groups"]
    with as_pytorch(groups, gelu_and_eps=False):
        record, model, params = build(FOLDER)
        compare(f"{FOLDER}.square.output", forward(record, model, params, "square"), reference)
    with as_pytorch(groups):
        name = f"{FOLDER}.square.output_as_pytorch"
        compare(name, forward(record, model, params, "square"), reference)
        assert differences[name] < 1e-4
    model.save_pretrained(GOLDENS / FOLDER, params=params)
    config_file = GOLDENS / FOLDER / "config.json"
    config = json.loads(config_file.read_text()) | {"norm_num_groups": groups}  # this class would not write it
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, GOLDENS / "unet_flax039.safetensors"
    )
    summary = {"versions": VERSIONS, "deviations": DEVIATIONS, "relative_difference_from_pytorch": differences}
    (GOLDENS / "unet_flax039.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
