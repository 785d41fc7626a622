"""Make pictures: ``python -m afa_jax.sample --config configs/emoji.py --workdir DIR --prompt "..." --out DIR``.

Writes one PNG a picture, with the whole recipe in its metadata (text chunk "afa_jax", JSON), and a grid, a prompt a
row. With ``--prompts FILE`` instead of ``--prompt`` it makes thousands, over all devices and processes, numbered as
afa_jax/bulk.py says; what is there already stays, so that a start that was killed goes on with the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

import afa_jax
from afa_jax import distributed
from afa_jax.bulk import sample_all
from afa_jax.commands import Parser, parse, run
from afa_jax.data.pictures import grid, save_png
from afa_jax.distributed import first, on_first, together
from afa_jax.errors import InputError
from afa_jax.evaluation.comparison import entries_of
from afa_jax.generate import Picture, Request, SampleOptions, generate
from afa_jax.method_specs import parse_method
from afa_jax.methods import KINDS, SAMPLING, Method, Models, make_method, method_name
from afa_jax.parallel import make_mesh, mesh_of
from afa_jax.prompt_files import read_prompts
from afa_jax.report.maps import contact_sheet


def main(arguments: Sequence[str]) -> None:
    """Sample every prompt ``--num_images`` times into ``--out``."""
    parser = Parser(prog="python -m afa_jax.sample", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with prompt, negative_prompt"
    )
    parser.add_argument("--negative_prompt", default="", metavar="TEXT")
    parser.add_argument("--num_images", type=int, default=1, metavar="K", help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the config's)")
    parser.add_argument("--eta", type=float, help="0 (default): deterministic DDIM, 1: as much noise as DDPM")
    parser.add_argument("--size", metavar="HxW", help="rows x columns in pixels (default: the config's)")
    parser.add_argument(
        "--method",
        default="afa",
        metavar="NAME|KIND[:EXPERT][,OPTION=VALUE]...",
        help=f"one of the config's, by its name, or a kind: {', '.join(KINDS)} (afa_jax/methods/kinds.py)",
    )
    parser.add_argument("--maps", action="store_true", help="also write the maps of every picture")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")
    distributed.add_arguments(parser)
    options, config = parse(parser, arguments)
    distributed.start(options)

    if options.num_images < 1:
        raise InputError(f"--num_images {options.num_images}; choose 1 or more")
    if not 0 <= options.seed < 2**31:
        raise InputError(f"--seed {options.seed}; choose 0 to {2**31 - 1}")
    if options.prompt is not None and not all(prompt.strip() for prompt in options.prompt):
        raise InputError("--prompt is empty; say what to draw")
    if options.prompts is not None and options.maps:
        raise InputError("--maps goes with --prompt; of a file of prompts only the pictures are kept")
    if options.eta is not None and options.eta < 0:
        raise InputError(f"--eta {options.eta}; choose 0 or more")
    prompts = together(lambda: read_prompts(options.prompts, options.negative_prompt)) if options.prompts else None
    defaults = config.sample
    sampling = SampleOptions(
        size=parse_size(options.size) if options.size else tuple(defaults.size),
        steps=defaults.steps if options.steps is None else options.steps,
        guidance=float(defaults.guidance if options.guidance is None else options.guidance),
        eta=options.eta or 0.0,
        batch=defaults.batch,
        maps=options.maps,
    )
    method = together(lambda: load_method(config, options, sampling))
    sampling = method.sampled_with(sampling)
    if prompts is not None:
        sample_all(
            prompts,
            method,
            options.out,
            num_images=options.num_images,
            seed=options.seed,
            options=sampling,
            recipe_of=lambda request: recipe_of(request, method, options.seed, sampling, config),
            overwrite=options.overwrite,
        )
        return
    requests = [
        Request(prompt=prompt, number=number, negative_prompt=options.negative_prompt)
        for prompt in options.prompt
        for number in range(options.num_images)
    ]
    sampling = dataclasses.replace(sampling, batch=min(sampling.batch, len(requests)))
    names = [
        f"{file_name(method)}_{i // options.num_images:03d}_{request.number:03d}_{slug(request.prompt)}"
        for i, request in enumerate(requests)
    ]
    grid_path = options.out / f"{file_name(method)}_grid.png"
    if not options.overwrite:
        on_first(lambda: check_absent([*(options.out / f"{name}.png" for name in names), grid_path]))

    pictures: list[Picture] = []
    made = generate(requests, method.denoiser, method.experts, seed=options.seed, options=sampling)
    bar = tqdm(made, total=len(requests), unit="image", disable=not first())
    for picture, name in zip(bar, names, strict=True):
        if not first():
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(picture.request, method, options.seed, sampling, config)
        save_png(options.out / f"{name}.png", picture.pixels, recipe)
        if options.maps:
            timesteps = [int(t) for t in method.experts.schedule.timesteps(sampling.steps)]
            contact_sheet(picture.maps, method.sites, timesteps).save(options.out / f"{name}_maps.png")
        pictures.append(picture)
    if not first():
        return
    rows = [
        [picture.pixels for picture in pictures[i : i + options.num_images]]
        for i in range(0, len(pictures), options.num_images)
    ]
    Image.fromarray(grid(rows)).save(grid_path)
    print(grid_path)


def load_method(config: ConfigDict, given: argparse.Namespace, sampling: SampleOptions) -> Method:
    """The method that is asked for, with its weights, on the mesh of the config.

    Raises:
        InputError: something of it is not there, or does not fit.
    """
    mesh = mesh_of(config)
    if given.prompts is not None and "mesh" not in config and jax.device_count() > 1:
        mesh = make_mesh(dict(data=-1))
    models = Models(config, given.workdir, sampling.steps, mesh)
    sampling.check(models.experts)
    method = make_method(find_method(given.method, config, given), models)
    method.sampled_with(sampling).check(method.experts)
    return method


def check_absent(paths: Sequence[Path]) -> None:
    """Raise InputError for the first of the paths where something is."""
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists; choose another --out, or --overwrite")


def parse_size(text: str) -> tuple[int, int]:
    """Rows and columns of a size: 512x768 is (512, 768).

    Raises:
        InputError: not of that form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise InputError(f"--size {text!r}; write rows x columns, such as 512x768")
    return int(match[1]), int(match[2])


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def find_method(text: str, config: ConfigDict, given: argparse.Namespace) -> dict[str, Any]:
    """The method of that name in the config's ``evaluation.methods``, or what ``text`` says by itself.

    Steps, guidance and eta that the user gives as flags are the method's, whatever its own are.
    """
    named = entries_of(config) if "evaluation" in config else {}
    entry = dict(named[text]) if text in named else parse_method(text)
    flags = {field: value for field in SAMPLING if (value := getattr(given, field, None)) is not None}
    entry = {field: value for field, value in entry.items() if field not in flags}
    return dict(name=method_name(entry)) | entry | flags


def file_name(method: Method) -> str:
    """A method as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", method.name).strip("_")


def recipe_of(
    request: Request, method: Method, seed: int, options: SampleOptions, config: ConfigDict
) -> dict[str, object]:
    """Everything that makes a picture again, on the same kind of device."""
    return dict(
        version=afa_jax.__version__,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        number=request.number,
        seed=seed,
        method=method.name,
        size=list(options.size),
        steps=options.steps,
        guidance=options.guidance,
        eta=options.eta,
        sampler="ddim",
        dtype=config.dtype,
        base=config.base,
        experts=method.experts.record,
        made_by=dict(method.record),
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
