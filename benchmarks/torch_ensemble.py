"""AFA's ensemble in PyTorch: diffusers' U-Nets run stage by stage, SABW of diffusers' blocks. Started by pytorch.py.

Runs where torch and diffusers are installed and knows nothing of jax: weights and inputs come as files. Then each line
on standard input names a task to run once, and the answer is a line ``{"cpu": seconds, "wall": seconds}``; the first
run of a task also writes its result, ``NAME.npz``. Features are NCHW here, ``[n, b, c, h, w]`` of N experts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

Stage = Callable[..., Tensor]


class SABW(nn.Module):
    """One aggregator: features of N experts -> the fused feature."""

    def __init__(self, config: dict[str, Any], experts: int, channels: int, time_width: int, text_width: int):
        super().__init__()
        hidden, groups, heads = config["hidden"], config["norm_num_groups"], config["heads"]
        self.conv_in = nn.Conv2d(experts * channels, hidden, 1)
        self.res_block = ResnetBlock2D(
            in_channels=hidden, out_channels=hidden, temb_channels=time_width, groups=groups, eps=1e-6
        )
        self.transformer = Transformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=hidden // heads,
            in_channels=hidden,
            num_layers=config["transformer_layers"],
            norm_num_groups=groups,
            cross_attention_dim=text_width,
        )
        self.conv_out = nn.Conv2d(hidden, experts, 1, bias=False)

    def forward(self, features: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        """Softmax over the experts at each pixel, then the weighted sum."""
        x = self.res_block(self.conv_in(torch.cat(list(features), 1)), temb)
        x = self.transformer(x, encoder_hidden_states=text, return_dict=False)[0]
        maps = self.conv_out(x).transpose(0, 1).softmax(0)
        return (maps[:, :, None] * features).sum(0)


def stages(unet: UNet2DConditionModel) -> Iterator[tuple[str, Stage]]:
    """The U-Net's 25 stages (for SD1.5), each with what it does with the skips: "leave", "take" or "" (mid block)."""

    def layer(resnet: nn.Module, attention: nn.Module | None, up: nn.Module | None = None) -> Stage:
        def run(x: Tensor, temb: Tensor, text: Tensor, skip: Tensor | None = None) -> Tensor:
            x = resnet(x if skip is None else torch.cat([x, skip], 1), temb)
            if attention is not None:
                x = attention(x, encoder_hidden_states=text, return_dict=False)[0]
            return x if up is None else up(x)

        return run

    yield "leave", lambda x, temb, text: unet.conv_in(x)
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            yield "leave", layer(resnet, getattr(block, "attentions", [None] * (i + 1))[i])
        for down in block.downsamplers or ():
            yield "leave", lambda x, temb, text, down=down: down(x)
    yield "", lambda x, temb, text: unet.mid_block(x, temb, encoder_hidden_states=text)
    layers = []
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            up = block.upsamplers[0] if block.upsamplers and i == len(block.resnets) - 1 else None
            layers.append(layer(resnet, getattr(block, "attentions", [None] * (i + 1))[i], up))
    yield from (("take", one) for one in layers[:-1])
    yield "take", lambda *args: unet.conv_out(unet.conv_act(unet.conv_norm_out(layers[-1](*args))))


class Ensemble(nn.Module):
    """N frozen U-Nets in lock-step with an aggregator after every stage."""

    def __init__(self, unets: list[UNet2DConditionModel], sabw: dict[str, Any], channels: list[int]):
        super().__init__()
        self.unets = nn.ModuleList(unets).requires_grad_(False)
        time_width, text_width = unets[0].time_embedding.linear_2.out_features, unets[0].config.cross_attention_dim
        self.aggregators = nn.ModuleList([SABW(sabw, len(unets), c, time_width, text_width) for c in channels])
        self.stages = list(zip(*(stages(unet) for unet in unets), strict=True))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Latents ``[b, c, h, w]``, timesteps ``[b]``, text states ``[n, b, s, d]`` -> prediction."""
        temb = torch.stack([unet.time_embedding(unet.time_proj(t).to(x.dtype)) for unet in self.unets])
        mean_temb, mean_text, skips = temb.mean(0), text.mean(0), []
        for experts, aggregator in zip(self.stages, self.aggregators, strict=True):
            what = experts[0][0]
            skip = [skips.pop()] if what == "take" else []
            features = [run(x, temb[i], text[i], *skip) for i, (_, run) in enumerate(experts)]
            x = aggregator(torch.stack(features), mean_temb, mean_text)
            if what == "leave":
                skips.append(x)
        return x


def make_tasks(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What can be run, by name."""
    facts = json.loads((folder / "facts.json").read_text())
    unets = [UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32) for path in facts["unets"]]
    model = Ensemble(unets, facts["sabw"], facts["channels"])
    weights = load_file(folder / "aggregators.safetensors")
    model.aggregators.load_state_dict({key.removeprefix("aggregators."): value for key, value in weights.items()})
    layout = torch.channels_last if options.variant != "eager" else torch.contiguous_format
    model.to(memory_format=layout)
    x, target, text, t = (torch.from_numpy(array) for array in np.load(folder / "inputs.npz").values())
    x, target = (array.permute(0, 3, 1, 2).contiguous(memory_format=layout) for array in (x, target))
    run, run_expert = (
        # A program for each size, as ours; by default the second size would make one for all.
        torch.compile(module, dynamic=False) if options.variant == "compile" else module
        for module in (model, model.unets[0])
    )
    ddim = DDIMScheduler.from_config(facts["scheduler"])
    ddim.set_timesteps(facts["steps"])
    optimizer = torch.optim.AdamW(model.aggregators.parameters(), lr=1e-4, weight_decay=0.01)

    @torch.no_grad()
    def expert() -> dict[str, Tensor]:
        return dict(prediction=run_expert(x, t, text[0], return_dict=False)[0])

    @torch.no_grad()
    def forward() -> dict[str, Tensor]:
        return dict(prediction=run(x, t, text))

    @torch.no_grad()
    def guided() -> dict[str, Tensor]:
        now, negative = int(ddim.timesteps[facts["step"]]), text.flip(1)
        both = torch.cat([x, x])
        u, c = run(both, torch.full((len(both),), now), torch.cat([negative, text], 1)).chunk(2)
        return dict(x=ddim.step(u + facts["guidance"] * (c - u), now, x).prev_sample)

    def training() -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = (run(x, t, text) - target).square().mean()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.aggregators.parameters()]).sum().sqrt()
        optimizer.step()
        return dict(loss=loss.detach(), gradient_norm=norm)

    return {"one expert": expert, "forward": forward, "guided step": guided, "training step": training}


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=("eager", "channels_last", "compile"), default="eager")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    tasks, written = make_tasks(options.folder, options), set()
    print(json.dumps(dict(version=torch.__version__)), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        started, cpu = time.perf_counter(), time.process_time()
        result = tasks[name]()
        times = dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - started)
        if name not in written:
            written.add(name)
            np.savez(options.folder / f"{options.variant} {name}.npz", **{k: v.numpy() for k, v in result.items()})
        print(json.dumps(times), file=answers, flush=True)


if __name__ == "__main__":
    main()
