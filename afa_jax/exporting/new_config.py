"""A short, complete config for somebody's own checkpoints and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.config.schema import check, complete
from afa_jax.data.held_out import by_hash
from afa_jax.data.sources import PictureSource, make_source
from afa_jax.errors import BadExample, InputError
from afa_jax.experts.checks import check_base, find_checkpoints, mismatches
from afa_jax.files import check_file, replace_text
from afa_jax.models.configs import UNetConfig
from afa_jax.weights.opened import unet_config, vae_config

EPOCHS = 10  # the paper's
FULL_SIZE = 320  # channels of the first level of Stable Diffusion's U-Net
PROMPTS = 24  # captions to evaluate with
PAIRS = 64  # pictures held out, if there are many
FEWEST = 40  # the least number of pictures of which some are held out


def write_config(
    name: str,
    out: Path,
    *,
    base: str | Mapping[str, str],
    experts: Sequence[Mapping[str, Any]],
    data: str | None = None,
    prompts: Path | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Write a config, and beside it prompts from the captions; print the findings and the next commands.

    Args:
        name: the config's name.
        out: a new file.
        base, experts: as in a config.
        data: a folder with captions, or .tar or .parquet files; None for a config that only samples.
        prompts: a file of prompts to evaluate with; None for captions of ``data``.
        size: rows and columns of pictures; None takes the U-Net's training size.

    Raises:
        InputError: a model or the pictures cannot be used, the experts do not fit together, or a file is there.
    """
    config = ConfigDict(dict(name=name, base=base, experts=[dict(expert) for expert in experts]))
    complete(config)
    check(config)
    unet, size = _models(config, size)
    fields: dict[str, Any] = dict(
        name=name,
        dtype="bfloat16" if unet.block_out_channels[0] >= FULL_SIZE else "float32",
        base=dict(base) if isinstance(base, Mapping) else base,
        experts=[dict(expert) for expert in experts],
    )
    if unet.block_out_channels[0] < FULL_SIZE:  # a U-Net smaller than the paper's aggregators
        fields["sabw"] = dict(hidden=32, transformer_layers=1, heads=4, norm_num_groups=8)
    captions: list[str] = []
    count = 0
    if data is not None:
        fields["data"] = _data(data, size)
        source = make_source(ConfigDict(fields["data"] | (dict(verify=False) if _kind(data) == "folder" else {})))
        captions, count = _captions(source, PROMPTS), len(source)
        fields |= _training(count, captions, full_size=unet.block_out_channels[0] >= FULL_SIZE)
    fields["sample"] = dict(size=size, steps=25, guidance=7.5, batch=4)
    kept = None if prompts is not None or not captions else out.with_name(f"{out.stem}_prompts.txt")
    if kept is not None:
        check_file(kept)
    if (file := prompts or kept) is not None:
        fields["evaluation"] = dict(
            prompts=dict(kind="file", path=str(file)),
            seeds=(0,),
            metrics=("clip_t", "pickscore"),
            methods=[dict(kind="average"), dict(kind="noise_average"), dict(kind="afa")],
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        replace_text(kept, "".join(f"{caption}\n" for caption in captions))
    commands = _commands(name, out, count, evaluated="evaluation" in fields)
    replace_text(out, config_text(name, fields, commands))
    pictures = f", {count:,} pictures" if data is not None else ""
    print(f"{len(experts)} experts ({', '.join(config_names(experts))}), {size[0]}x{size[1]}{pictures}")
    print(out if kept is None else f"{out}, {kept}")
    for command in commands:
        print(f"    {command}")


def config_names(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the experts' names."""
    return [str(expert["name"]) for expert in experts]


def config_text(name: str, fields: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Return the Python text of a config whose values are plain data.

    Args:
        commands: the commands in its docstring; left out if one has a character that would end or change a docstring.
    """
    plain = [command for command in commands if command.isascii() and "\\" not in command and '"""' not in command]
    body = "".join(f"\n    {command}" for command in plain)
    body = f"\n{body}\n" if body else ""
    lines = "".join(f"            {field}={_written(value, 12)},\n" for field, value in fields.items())
    return (
        f'"""Several experts, one picture: {name}.{body}"""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config() -> ConfigDict:\n"
        f"    return ConfigDict(\n        dict(\n{lines}        )\n    )\n"
    )


def _written(value: Any, indent: int) -> str:
    """Return a value as Python text: a dict by keywords, and a long list or dict over several lines."""
    if isinstance(value, Mapping):
        parts, ends = [f"{field}={_written(own, indent + 4)}" for field, own in value.items()], ("dict(", ")")
    elif isinstance(value, list):
        parts, ends = [_written(own, indent + 4) for own in value], ("[", "]")
    elif isinstance(value, tuple) and len(value) > 1:
        parts, ends = [_written(own, indent + 4) for own in value], ("(", ")")
    else:
        return repr(value)
    line = f"{ends[0]}{', '.join(parts)}{ends[1]}"
    if len(line) + indent <= 100 and "\n" not in line:
        return line
    space = " " * indent
    return f"{ends[0]}\n" + "".join(f"{space}    {part},\n" for part in parts) + f"{space}{ends[1]}"


def _models(config: ConfigDict, size: tuple[int, int] | None) -> tuple[UNetConfig, tuple[int, int]]:
    """Return the experts' architecture, and the size of pictures."""
    opened, checkpoints = find_checkpoints(config)
    check_base(opened, f"--base {opened.path}", "add --tokenizer FOLDER")
    for mismatch in mismatches(opened, checkpoints):
        raise InputError(mismatch.message)
    unet, vae = unet_config(next(iter(checkpoints.values()))), vae_config(opened)
    side = unet.sample_size * vae.factor
    vae.check_size(size := size or (side, side))
    return unet, size


def _kind(data: str) -> str:
    return "tar" if data.endswith(".tar") else "parquet" if data.endswith(".parquet") else "folder"


def _data(data: str, size: tuple[int, int]) -> dict[str, Any]:
    kind = _kind(data)
    return dict(kind=kind) | {"path" if kind == "folder" else "paths": data} | dict(size=size)


def _captions(source: PictureSource, count: int) -> list[str]:
    """Return captions of pictures that a hash chooses, each once, on one line."""
    found: dict[str, None] = {}
    for _, index in zip(range(20 * count), by_hash(len(source), 0), strict=False):
        try:
            found[" ".join(source[index]["caption"].split())] = None
        except BadExample as error:
            raise InputError(f"--data: {error}; mend or remove it, or write data.bad='skip' into the config") from error
        if len(found) == count:
            break
    return list(found)


def _training(count: int, captions: Sequence[str], *, full_size: bool) -> dict[str, Any]:
    """Return the sections for ``count`` pictures: EPOCHS over them, and some held out if there are enough."""
    batch = 8
    steps = max(200, min(12_500, 100 * round(EPOCHS * count / batch / 100)))
    train: dict[str, Any] = dict(steps=steps, batch=batch, save_every=max(100, steps // 25))
    if full_size:
        train["remat"] = "fused"
    sections: dict[str, Any] = dict(train=train)
    if count >= FEWEST:
        pairs = min(PAIRS, count // 10)
        sections["validation"] = dict(
            every=train["save_every"], pairs=pairs, batch=min(batch, pairs), prompts=tuple(captions[:2])
        )
    return sections


def _commands(name: str, out: Path, count: int, *, evaluated: bool) -> list[str]:
    """Return the command lines that a new config is for."""
    config, run = f"--config {shlex.quote(str(out))}", f"--workdir runs/{name}"
    sample = f'python -m afa_jax.sample {config} --prompt "..." --out pictures'
    if not count:
        evaluate = f"python -m afa_jax.evaluate {config} --out runs/{name}/evaluation"
        return [f"{sample} --method uniform", *([evaluate] if evaluated else [])]
    pairs = f" --pairs {count}" if 8 <= count < PAIRS else ""
    return [
        *([f"python -m afa_jax.screen {config}{pairs}"] if count >= 8 else []),
        f"python -m afa_jax.train {config} {run}",
        f"{sample} {run}",
        *([f"python -m afa_jax.evaluate {config} {run}"] if evaluated else []),
    ]
