"""Make the golden files in tests/goldens/ with PyTorch diffusers and transformers. See README.md beside this file.

python tests/reference/make_torch.py [unet|vae|clip|ddim|sabw|lora|full|weights ...]     (all without arguments)
python tests/reference/make_torch.py single_file:DIR    (DIR as write_single_files.py fills it)
"""

import itertools
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from loras import lora_file
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel
from weights import random_input, random_state_dict, random_weight, shapes_digest

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
    "peft": peft.__version__,
    "numpy": np.__version__,
}
FAINT = 0.03  # the weight scale of the *_faint cases


# ---------------------------------------------------------------------------------------------- files and weights


def write(name: str, record: dict, tensors: dict[str, torch.Tensor]) -> None:
    arrays = {key: np.ascontiguousarray(value.detach().numpy().astype(np.float32)) for key, value in tensors.items()}
    for key, value in arrays.items():
        assert np.isfinite(value).all(), f"{name}: {key} is not finite"
    save_file(arrays, GOLDENS / f"{name}.safetensors")
    write_json(GOLDENS / f"{name}.json", {"versions": VERSIONS, **record})
    print(f"{name}: {len(arrays)} tensors, {(GOLDENS / f'{name}.safetensors').stat().st_size / 1000:.0f} kB")


def write_json(path: Path, value: dict) -> None:
    """Indented JSON, with lists of plain values on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def text(value: object, indent: str) -> str:
        inner = indent + " "
        if isinstance(value, dict) and value:
            items = [f"{inner}{json.dumps(key)}: {text(item, inner)}" for key, item in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(inner + text(item, inner) for item in value) + f"\n{indent}]"
        return json.dumps(value)

    path.write_text(text(value, "") + "\n")


def saved_config(model: torch.nn.Module) -> dict:
    """config.json, verbatim as `save_pretrained` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        save = model.save_config if hasattr(model, "save_config") else model.config.save_pretrained
        save(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def fill(model: torch.nn.Module, case: str, scale: float = 1.0) -> dict[str, list[int]]:
    """Give `model` its random weights; its keys and shapes are returned."""
    shapes = shapes_of(model)
    weights = random_state_dict(case, shapes, scale)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    model.eval()
    return shapes


def spec(key: str, *shape: int) -> dict:
    """How an input is recorded: not its values, but what `random_input` makes them from."""
    return {"key": key, "shape": list(shape)}


def tensor(spec: dict) -> torch.Tensor:
    return torch.from_numpy(random_input(spec["key"], spec["shape"]))


# ---------------------------------------------------------------------------------------------------------- U-Net

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD_BLOCKS = {
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
UNET_DEFAULTS = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16}
# groups 32, as diffusers' Flax U-Net has them hard-coded: this case is run through that class too
SD15 = {**SD_BLOCKS, "block_out_channels": [32, 64, 64, 64], "norm_num_groups": 32, "attention_head_dim": 8}
SD21 = {
    **SD_BLOCKS,
    "block_out_channels": [16, 32, 32, 32],
    "norm_num_groups": 8,
    "attention_head_dim": [4, 8, 8, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
THREE_LEVELS = {
    "block_out_channels": [32, 64, 96],
    "norm_num_groups": 8,
    "down_block_types": [CROSS, CROSS, PLAIN],
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP],
    "layers_per_block": [2, 1, 2],  # a list: the middle level has one layer (two going up)
    "attention_head_dim": 4,
}
ONE_LAYER = {
    "block_out_channels": [16, 32, 48],
    "norm_num_groups": 8,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4, 8],
}
FLAX_FOLDER = {
    **SD_BLOCKS,
    "block_out_channels": [8, 8, 8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}
# name: (batch, height, width, text length, timesteps)
SQUARE, WIDE = (3, 16, 16, 77, [0, 501, 999]), (1, 8, 24, 7, [261])
# case: (config, weight scale, {input: size}, the input whose stages are kept)
UNETS = {
    "unet_sd15": (SD15, 1.0, {"square": SQUARE, "wide": WIDE}, "wide"),
    "unet_sd15_faint": (SD15, FAINT, {"square": SQUARE}, None),
    "unet_sd21": (SD21, 1.0, {"square": (3, 16, 16, 7, [999, 1, 340]), "wide": (1, 8, 24, 77, [620])}, "square"),
    "unet_3level": (THREE_LEVELS, 1.0, {"wide": (3, 4, 12, 77, [7, 777, 77])}, "wide"),
    # odd: 5 and 11 do not halve, on one level or on two
    "unet_1layer": (
        ONE_LAYER,
        1.0,
        {"square": (3, 8, 8, 7, [20, 400, 860]), "odd": (2, 5, 11, 7, [13, 900])},
        "square",
    ),
    "unet_flax_folder": (FLAX_FOLDER, 1.0, {"square": (3, 16, 16, 7, [3, 300, 930])}, None),
}


def unet_stages(unet: UNet2DConditionModel) -> list[tuple[str, torch.nn.Module]]:
    """Every cut point in the order in which it is reached: (name, the module whose output it is)."""

    def layers(prefix: str, block: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
        last = block.attentions if hasattr(block, "attentions") else block.resnets
        return [(f"{prefix}.layer.{j}", module) for j, module in enumerate(last)]

    stages = [("conv_in", unet.conv_in)]
    for i, block in enumerate(unet.down_blocks):
        stages += layers(f"down.{i}", block)
        if block.downsamplers:
            stages += [(f"down.{i}.downsample", block.downsamplers[0])]
    stages += [("mid", unet.mid_block)]
    for i, block in enumerate(unet.up_blocks):
        stages += layers(f"up.{i}", block)
        if block.upsamplers:  # a part of the block's last layer
            stages[-1] = (stages[-1][0], block.upsamplers[0])
    return [*stages, ("conv_out", unet.conv_out)]


def make_unet(case: str) -> None:
    changes, scale, sizes, staged = UNETS[case]
    config = {**UNET_DEFAULTS, **changes}
    unet = UNet2DConditionModel(**config)
    parameters = fill(unet, case, scale)
    stages = unet_stages(unet)
    names = [name for name, _ in stages]
    seen: list[tuple[str, torch.Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, output[0] if isinstance(output, tuple) else output))

    for name, module in stages:
        module.register_forward_hook(keep(name))
    inputs, tensors = {}, {}
    for which, (batch, height, width, length, timesteps) in sizes.items():
        inputs[which] = {
            "sample": spec(f"{case}/{which}/sample", batch, unet.config.in_channels, height, width),
            "timestep": timesteps,
            "encoder_hidden_states": spec(f"{case}/{which}/text", batch, length, unet.config.cross_attention_dim),
        }
        seen.clear()
        output = unet(
            tensor(inputs[which]["sample"]),
            torch.tensor(timesteps),
            tensor(inputs[which]["encoder_hidden_states"]),
            return_dict=False,
        )[0]
        assert [name for name, _ in seen] == names, "the stages did not run in the order in which they are listed"
        assert torch.equal(seen[-1][1], output)
        tensors[f"{which}.output"] = output
        if which == staged:
            tensors |= {f"{which}.stage.{i}": value for i, (_, value) in enumerate(seen[:-1])}
    last_up_layer = len(names) - 2
    record = {
        "config": saved_config(unet),
        "weight_scale": scale,
        "inputs": inputs,
        "stages_of": staged,
        "stages": names,
        "sites": [i for i in range(len(names)) if i != last_up_layer],
        "parameter_count": sum(p.numel() for p in unet.parameters()),
        "parameters": parameters,
    }
    write(case, record, tensors)


# ------------------------------------------------------------------------------------------------------------ VAE

VAES = {
    "vae_sd": (
        dict(block_out_channels=[16, 32, 32, 32], latent_channels=4),
        1.0,
        {"square": (3, 32), "wide": (1, 16, 40)},
    ),
    "vae_f4": (dict(block_out_channels=[16, 32, 32], latent_channels=8), 1.0, {"square": (3, 16), "wide": (1, 8, 20)}),
    "vae_sd_faint": (dict(block_out_channels=[16, 32, 32, 32], latent_channels=4), FAINT, {"square": (3, 16)}),
    "vae_flax_folder": (dict(block_out_channels=[8, 16], latent_channels=4), 1.0, {"square": (2, 8)}),
}
VAE_OLD_SPELLING = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def published_vae(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The keys as SD1.5's published folder spells them."""

    def rename(key: str) -> str:
        for new, old in VAE_OLD_SPELLING.items():
            key = key.replace(new, old)
        return key

    return {rename(key): shape for key, shape in shapes.items()}


def make_vae(case: str) -> None:
    changes, scale, sizes = VAES[case]
    levels = len(changes["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.18215,
        **changes,
    )
    parameters = fill(vae, case, scale)
    factor = 2 ** (levels - 1)
    inputs, tensors = {}, {}
    for which, (batch, height, *width) in sizes.items():
        size = height, (width or [height])[0]
        latent = [side // factor for side in size]
        inputs[which] = {
            "image": spec(f"{case}/{which}/image", batch, 3, *size),
            "latents": spec(f"{case}/{which}/latents", batch, vae.config.latent_channels, *latent),
        }
        posterior = vae.encode(tensor(inputs[which]["image"])).latent_dist
        tensors[f"{which}.mean"], tensors[f"{which}.logvar"] = posterior.mean, posterior.logvar
        tensors[f"{which}.decoded"] = vae.decode(tensor(inputs[which]["latents"])).sample
    record = {
        "config": saved_config(vae),
        "weight_scale": scale,
        "factor": factor,
        "inputs": inputs,
        "parameter_count": sum(p.numel() for p in vae.parameters()),
        "parameters": parameters,
        "parameters_published": published_vae(parameters),
    }
    write(case, record, tensors)


# ----------------------------------------------------------------------------------------------------------- CLIP

BOS, EOS, ADDED = 98, 99, 100  # ADDED: a token added after training (textual inversion), its id above that of EOS
CLIP_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 102,
    "projection_dim": 32,
}
CLIP_SD15 = {**CLIP_TINY, "num_hidden_layers": 3, "hidden_act": "quick_gelu", "pad_token_id": 1}
CLIP_SD21 = {
    **CLIP_TINY,
    "num_hidden_layers": 5,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OLD_IDS, NEW_IDS = {"bos_token_id": 0, "eos_token_id": 2}, {"bos_token_id": BOS, "eos_token_id": EOS}
# case: (config, weight scale, the id that fills a prompt up to 77, whether every layer's output is kept)
CLIPS = {
    "clip_sd15": (CLIP_SD15 | OLD_IDS, 1.0, EOS, True),
    "clip_sd15_eos99": (CLIP_SD15 | NEW_IDS, 1.0, EOS, False),
    "clip_sd15_faint": (CLIP_SD15 | OLD_IDS, FAINT, EOS, False),
    "clip_sd21": (CLIP_SD21, 1.0, 0, False),
}
PROMPTS = [[5, 17, 42, 42, 63, 8], [], [11, ADDED, 29]]


def published_clip(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The keys as SD1.5's published folder has them: prefixed, and with the old integer buffer."""
    prefixed = {f"text_model.{key}": shape for key, shape in shapes.items()}
    positions = shapes["embeddings.position_embedding.weight"][0]
    return {"text_model.embeddings.position_ids": [1, positions], **prefixed}


def make_clip(case: str) -> None:
    changes, scale, pad, layers = CLIPS[case]
    model = CLIPTextModel(CLIPTextConfig(**changes))
    parameters = fill(model, case, scale)
    ids = [[BOS, *prompt, EOS] for prompt in PROMPTS]
    ids = [row + [pad] * (77 - len(row)) for row in ids]
    output = model(input_ids=torch.tensor(ids), output_hidden_states=True)
    tensors = {"last_hidden_state": output.last_hidden_state, "pooled": output.pooler_output}
    pooled_at = (output.last_hidden_state == output.pooler_output[:, None]).all(-1).int().argmax(-1).tolist()
    if layers:  # 0: the embeddings; i: after layer i, before the final norm
        tensors |= {f"hidden.{i}": value for i, value in enumerate(output.hidden_states)}
    record = {
        "config": saved_config(model),
        "weight_scale": scale,
        "inputs": {"input_ids": ids},
        "pooled_at": pooled_at,
        "parameter_count": sum(p.numel() for p in model.parameters()),
        "parameters": parameters,
        "parameters_published": published_clip(parameters),
    }
    write(case, record, tensors)


# ----------------------------------------------------------------------------------------------------------- DDIM

SCHEDULES = {
    "sd15": dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
    ),
    "linear": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0, set_alpha_to_one=True),
}


def make_ddim() -> None:
    shape = [1, 4, 4, 4]
    cases, tensors = [], {}
    choices = itertools.product(
        SCHEDULES, ["epsilon", "v_prediction", "sample"], ["leading", "trailing"], [10, 50], [0.0, 0.7]
    )
    for schedule, prediction, spacing, steps, eta in choices:
        if schedule == "linear" and steps == 50:
            continue
        config = dict(SCHEDULES[schedule], prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
        scheduler = DDIMScheduler(**config)
        scheduler.set_timesteps(steps)
        name = f"{schedule}.{prediction}.{spacing}.{steps}.eta{eta}"
        latents, trajectory = tensor(spec("ddim/latents", *shape)), []
        for i, t in enumerate(scheduler.timesteps):
            output = tensor(spec(f"ddim/model_output/{i}", *shape))
            noise = tensor(spec(f"ddim/variance_noise/{i}", *shape)) if eta else None
            latents = scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
            trajectory.append(latents)
        tensors[f"{name}.trajectory"] = torch.stack(trajectory)
        tensors[f"{schedule}.alphas_cumprod"] = scheduler.alphas_cumprod
        cases.append(
            {
                "name": name,
                "config": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **config},
                "steps": steps,
                "eta": eta,
                "timesteps": scheduler.timesteps.tolist(),
            }
        )
    forward = {
        "sample": spec("ddim/forward/sample", 3, 4, 4, 4),
        "noise": spec("ddim/forward/noise", 3, 4, 4, 4),
        "timestep": [0, 500, 999],
    }
    for schedule, config in SCHEDULES.items():
        arguments = tensor(forward["sample"]), tensor(forward["noise"]), torch.tensor(forward["timestep"])
        tensors[f"{schedule}.add_noise"] = DDIMScheduler(**config).add_noise(*arguments)
        tensors[f"{schedule}.velocity"] = DDIMScheduler(**config).get_velocity(*arguments)
    inputs = {
        "latents": spec("ddim/latents", *shape),
        "model_output": spec("ddim/model_output/{i}", *shape),
        "variance_noise": spec("ddim/variance_noise/{i}", *shape),
        "forward": forward,
    }
    write("ddim", {"inputs": inputs, "cases": cases}, tensors)


# ---------------------------------------------------------------------------------------------------------- LoRA

LORA_UNET = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": [CROSS, PLAIN],
    "up_block_types": [PLAIN_UP, CROSS_UP],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
LORA_CLIP = CLIP_SD15 | NEW_IDS | {"num_hidden_layers": 1}
BLOCK, LAYER = "attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers.0"
ATTENTION = {f"unet.mid_block.{BLOCK}.attn1.{name}": (4, 4) for name in ("to_q", "to_k", "to_v", "to_out.0")}
LINEAR = {
    f"unet.down_blocks.0.{BLOCK}.attn2.to_k": (3, 1.5),
    f"unet.up_blocks.1.{BLOCK}.attn1.to_out.0": (3, 1.5),
    f"unet.up_blocks.1.{BLOCK}.ff.net.0.proj": (3, 1.5),
    f"unet.up_blocks.1.{BLOCK}.ff.net.2": (3, 1.5),
    f"{LAYER}.self_attn.q_proj": (2, 1.0),
    f"{LAYER}.self_attn.out_proj": (2, 1.0),
    f"{LAYER}.mlp.fc1": (2, 1.0),
}
CONVOLUTIONS = {
    "unet.down_blocks.0.attentions.0.proj_in": (3, 1.5),
    "unet.down_blocks.0.resnets.0.conv1": (3, 1.5),
    "unet.down_blocks.0.resnets.0.time_emb_proj": (3, 1.5),
    "unet.down_blocks.0.downsamplers.0.conv": (3, 1.5),
    "unet.down_blocks.1.resnets.0.conv_shortcut": (3, 1.5),
    "unet.up_blocks.0.upsamplers.0.conv": (3, 1.5),
}
LDM = {
    f"unet.down_blocks.0.{BLOCK}.attn2.to_k": "unet.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.0.attentions.0.proj_in": "unet.input_blocks.1.1.proj_in",
    "unet.down_blocks.0.resnets.0.conv1": "unet.input_blocks.1.0.in_layers.2",
    "unet.down_blocks.0.resnets.0.time_emb_proj": "unet.input_blocks.1.0.emb_layers.1",
    "unet.down_blocks.0.downsamplers.0.conv": "unet.input_blocks.2.0.op",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "unet.input_blocks.3.0.skip_connection",
    f"unet.mid_block.{BLOCK}.attn1.to_out.0": "unet.middle_block.1.transformer_blocks.0.attn1.to_out.0",
    "unet.mid_block.resnets.1.conv2": "unet.middle_block.2.out_layers.3",
    f"unet.up_blocks.1.{BLOCK}.ff.net.2": "unet.output_blocks.2.1.transformer_blocks.0.ff.net.2",
    "unet.up_blocks.1.attentions.1.proj_out": "unet.output_blocks.3.1.proj_out",
}
# file: (layout, modules with rank and alpha, scale)
LORAS = {
    "kohya": ("kohya", LINEAR | CONVOLUTIONS, 0.7),
    "ldm": ("kohya", dict.fromkeys(LDM, (2, 3.0)), 0.5),
    "peft": ("peft", LINEAR | CONVOLUTIONS | dict.fromkeys([*LINEAR][:2], (5, 2.0)), 1.0),
    "old": ("old", ATTENTION | {f"{LAYER}.self_attn.{name}": (2, 2) for name in ("q_proj", "out_proj")}, -0.4),
}


def make_lora() -> None:
    record: dict = {"unet": {"config": {**UNET_DEFAULTS, **LORA_UNET}}, "text_encoder": {}, "loras": {}}
    tensors = {}
    for file, (layout, modules, scale) in LORAS.items():
        unet, text = UNet2DConditionModel(**record["unet"]["config"]), CLIPTextModel(CLIPTextConfig(**LORA_CLIP))
        networks = {"unet": (unet, ""), "text_encoder": (text, "text_model.")}
        for name, (network, prefix) in networks.items():
            shapes = fill(network, f"lora/{name}")
            config = saved_config(network)
            record[name] = {"config": config, "parameters": {prefix + key: shape for key, shape in shapes.items()}}
        before = {
            name: {k: v.clone() for k, v in network.state_dict().items()} for name, (network, _) in networks.items()
        }
        shapes = {
            f"{name}.{key.removesuffix('.weight')}": shape
            for name in networks
            for key, shape in record[name]["parameters"].items()
        }
        pipeline = StableDiffusionPipeline(None, text, None, unet, None, None, None, requires_safety_checker=False)
        with tempfile.TemporaryDirectory() as folder:
            names = LDM if file == "ldm" else {}
            arrays, metadata = lora_file(file, layout, modules, shapes, names)
            save_file(arrays, Path(folder) / "lora.safetensors", metadata)
            # With the U-Net's config diffusers counts LDM's blocks as this U-Net has them.
            config = {"unet_config": unet.config} if names else {}
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors", **config)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
        changed = {}
        for name, (network, prefix) in networks.items():
            for key, value in network.state_dict().items():
                if not torch.equal(value, before[name][key]):
                    changed[f"{name}.{prefix}{key}"] = value
        assert changed.keys() == {f"{module}.weight" for module in modules}, changed.keys() ^ modules.keys()
        record["loras"][file] = {"layout": layout, "modules": modules, "names": names, "scale": scale}
        tensors |= {f"{file}/{key}": value for key, value in changed.items()}
    write("lora", record, tensors)


# ----------------------------------------------------------------------------------------------------------- SABW


class SABW(torch.nn.Module):
    """The aggregator of method.md, put together from diffusers' own modules."""

    def __init__(self, experts: int, channels: int, layers: int = 2):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(experts * channels, 128, 1)
        self.res_block = ResnetBlock2D(in_channels=128, out_channels=128, temb_channels=1280, groups=32, eps=1e-6)
        self.transformer = Transformer2DModel(
            num_attention_heads=8,
            attention_head_dim=16,
            in_channels=128,
            num_layers=layers,
            norm_num_groups=32,
            cross_attention_dim=768,
        )
        self.conv_out = torch.nn.Conv2d(128, experts, 1, bias=False)

    def forward(
        self, features: torch.Tensor, temb: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """features [n, b, c, h, w] -> the fused feature [b, c, h, w], maps [n, b, h, w], logits [n, b, h, w]."""
        hidden = self.conv_in(torch.cat(list(features), dim=1))
        hidden = self.res_block(hidden, temb)
        hidden = self.transformer(hidden, encoder_hidden_states=text, return_dict=False)[0]
        logits = self.conv_out(hidden).transpose(0, 1)
        maps = logits.float().softmax(dim=0)
        return (maps[:, :, None] * features).sum(0), maps, logits


SABWS = {"sabw": (1.0, {"square": (4, 4), "wide": (3, 5)}), "sabw_faint": (FAINT, {"square": (4, 4)})}
SITE_CHANNELS = [320] * 4 + [640] * 3 + [1280] * 12 + [640] * 3 + [320] * 2 + [4]  # the 25 sites of SD1.5
METHOD_COUNTS = {2: 42_425_344, 3: 45_132_416, 4: 47_839_488, 5: 50_546_560, 6: 53_253_632}


def make_sabw() -> None:
    experts, batch, channels = 3, 2, 32
    for case, (scale, sizes) in SABWS.items():
        sabw = SABW(experts, channels)
        parameters = fill(sabw, case, scale)
        inputs, tensors = {}, {}
        for which, size in sizes.items():
            inputs[which] = {
                "features": spec(f"{case}/{which}/features", experts, batch, channels, *size),
                "temb": spec(f"{case}/{which}/temb", batch, 1280),
                "text": spec(f"{case}/{which}/text", batch, 77, 768),
            }
            fused, maps, logits = sabw(*(tensor(value) for value in inputs[which].values()))
            tensors |= {f"{which}.fused": fused, f"{which}.maps": maps, f"{which}.logits": logits}
        config = {"experts": experts, "channels": channels, "layers": 2}
        count = sum(p.numel() for p in sabw.parameters())
        record = {
            "config": config,
            "weight_scale": scale,
            "inputs": inputs,
            "parameter_count": count,
            "parameters": parameters,
        }
        if case == "sabw":
            record["sd15_counts"] = {}
            for n, layers in [*((n, 2) for n in METHOD_COUNTS), (3, 1)]:
                with torch.device("meta"):
                    sites = [SABW(n, c, layers) for c in SITE_CHANNELS]
                total = sum(p.numel() for site in sites for p in site.parameters())
                expected = METHOD_COUNTS[n] if layers == 2 else 32_790_016
                print(f"SABW, 25 SD1.5 sites, N={n}, {layers} layers: {total:,} (method.md: {expected:,})")
                record["sd15_counts"][f"N={n} layers={layers}"] = total
        write(case, record, tensors)


# ---------------------------------------------------------------------------------------------------- single files

SINGLE_FILES = {"single_sd15": torch.float32, "single_sd21": torch.float16}


def make_single_file(folder: Path) -> None:
    """Load what the project wrote as users do; all weights must be those that went in, then a few steps of DDIM."""
    alone = dict(tokenizer=None, safety_checker=None, feature_extractor=None)
    for case, dtype in SINGLE_FILES.items():
        pipe = StableDiffusionPipeline.from_single_file(
            str(folder / f"{case}.safetensors"), config=str(folder / case), local_files_only=True, **alone
        )
        other = StableDiffusionPipeline.from_pretrained(folder / case, local_files_only=True, **alone)
        for name in ("unet", "vae", "text_encoder"):
            state, same = getattr(pipe, name).state_dict(), getattr(other, name).state_dict()
            assert state.keys() == same.keys()
            weights = random_state_dict(f"{case}/{name}", shapes_of(getattr(pipe, name)))
            for key, value in state.items():
                assert torch.equal(value, same[key]), f"{case}: {name} {key} differs from the folder's"
                given = torch.from_numpy(weights[key]).to(dtype).to(value.dtype)
                assert torch.equal(value, given), f"{case}: {name} {key} is not what was written"
        pipe.set_progress_bar_config(disable=True)
        ids = [[BOS, *words, *[EOS] * (15 - len(words))] for words in ([5, 17, 42, 42, 63, 8], [])]
        cond, uncond = (pipe.text_encoder(torch.tensor([row]))[0] for row in ids)
        inputs = {"latents": spec(f"{case}/latents", 1, 4, 8, 16), "input_ids": ids, "steps": 4, "guidance": 3.0}
        latents = pipe(
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            latents=tensor(inputs["latents"]),
            height=64,
            width=128,
            num_inference_steps=inputs["steps"],
            guidance_scale=inputs["guidance"],
            output_type="latent",
        ).images
        write(case, {"inputs": inputs}, {"cond": cond, "uncond": uncond, "latents": latents})


# ------------------------------------------------------------------------------------ the real models: shapes only


def published_configs() -> dict[str, dict]:
    """The config.json files of the published SD1.5 and SD2.1 folders."""
    unet = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        **SD_BLOCKS,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.23.0.dev0",
        "vocab_size": 49408,
    }
    scheduler = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    sd21 = {"_diffusers_version": "0.10.0.dev0"}
    return {
        "sd15/unet/config.json": unet,
        "sd15/vae/config.json": vae,
        "sd15/text_encoder/config.json": text,
        "sd15/scheduler/scheduler_config.json": scheduler,
        "sd21/unet/config.json": unet
        | sd21
        | {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        "sd21/vae/config.json": vae | sd21 | {"sample_size": 768},
        "sd21/text_encoder/config.json": text
        | {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
            "torch_dtype": "float16",
            "transformers_version": "4.26.0.dev0",
        },
        "sd21/scheduler/scheduler_config.json": scheduler
        | sd21
        | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    }


def make_full() -> None:
    models = {}
    for path, config in published_configs().items():
        write_json(GOLDENS / "configs" / path, config)
        folder, component = path.split("/")[:2]
        published = None
        with torch.device("meta"):
            if component == "unet":
                model = UNet2DConditionModel.from_config(config)
            elif component == "vae":
                model, published = AutoencoderKL.from_config(config), published_vae
            elif component == "text_encoder":
                model, published = CLIPTextModel(CLIPTextConfig(**config)), published_clip
            else:
                continue
        shapes = shapes_of(model)
        record = {
            "parameter_count": sum(p.numel() for p in model.parameters()),
            "keys": len(shapes),
            "sha256": shapes_digest(shapes),
        }
        if published:
            record["keys_published"] = len(published(shapes))
            record["sha256_published"] = shapes_digest(published(shapes))
        models[f"{folder}/{component}"] = record
        print(f"{folder}/{component}: {record['parameter_count']:,} parameters, {record['keys']} keys")
    assert models["sd15/unet"]["parameter_count"] == 859_520_964
    write_json(GOLDENS / "full.json", {"versions": VERSIONS, "models": models})


def make_weights() -> None:
    """A few values of weights.py itself: if numpy's random stream ever changes, the test of these says so."""
    samples = {
        "check/input": [4, 5],
        "check/conv.weight": [6, 4, 3, 3],
        "check/norm.weight": [7],
        "check/norm.bias": [7],
        "check/token_embedding.weight": [9, 4],
    }
    tensors = {key: torch.from_numpy(random_weight(key, shape)) for key, shape in samples.items() if "input" not in key}
    tensors["check/input"] = torch.from_numpy(random_input("check/input", samples["check/input"]))
    write("weights", {}, tensors)


MAKERS = {
    "weights": make_weights,
    "unet": lambda: [make_unet(case) for case in UNETS],
    "vae": lambda: [make_vae(case) for case in VAES],
    "clip": lambda: [make_clip(case) for case in CLIPS],
    "ddim": make_ddim,
    "sabw": make_sabw,
    "lora": make_lora,
    "full": make_full,
}

if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with torch.no_grad():
        for argument in sys.argv[1:] or MAKERS:
            name, _, folder = argument.partition(":")
            make_single_file(Path(folder)) if name == "single_file" else MAKERS[name]()
