"""Pictures of prompts, or of a file of prompts, by one method of a config, written into a folder."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from PIL import Image

import afa_jax
from afa_jax.data.pictures import grid, save_picture, save_png
from afa_jax.errors import InputError
from afa_jax.files import check_file, check_folder
from afa_jax.mesh.parallel import make_mesh, mesh_of
from afa_jax.mesh.processes import first, on_first, together
from afa_jax.methods.entries import entries_of
from afa_jax.methods.method import Method, Models, make_method, method_name
from afa_jax.methods.options import SampleOptions
from afa_jax.methods.specs import parse_method
from afa_jax.names import SAMPLING
from afa_jax.progress import progress
from afa_jax.records import recorded
from afa_jax.sampling.generate import Picture, Request, generate
from afa_jax.sampling.map_pictures import contact_sheet
from afa_jax.sampling.prompt_files import read_prompts
from afa_jax.sampling.sample_many import sample_all
from afa_jax.weights.tokenizer.prompts import warn_of_syntax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """How pictures are asked for. What is None is as the method or the config has it.

    Attributes:
        method: a name of the config's list, or KIND[:EXPERT][,OPTION=VALUE]...
        workdir: a trained run, a folder or a hub id.
        num_images: of each prompt.
        size: rows and columns, in pixels.
        steps, guidance, eta: of the sampler.
        maps: also write the maps of every picture.
        overwrite: replace pictures of the same name.
    """

    method: str = "afa"
    workdir: Path | None = None
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    maps: bool = False
    overwrite: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """What is asked for of SAMPLING."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


def sample_prompts(config: ConfigDict, prompts: Sequence[str], out: Path, asked: Asked) -> None:
    """Write a PNG for each picture of each prompt, and a grid of all, a prompt a row.

    Raises:
        InputError: a prompt, a model or the method cannot be used, or a picture is there already.
    """
    on_first(lambda: check_folder(out))
    sampling = sample_options(config, asked)
    method = together(lambda: load_method(config, asked, sampling))
    sampling = method.sampled_with(sampling)
    if first():
        warn_of_syntax([*prompts, asked.negative_prompt])
    requests = [
        Request(prompt=prompt, number=number, negative_prompt=asked.negative_prompt)
        for prompt in prompts
        for number in range(asked.num_images)
    ]
    sampling = dataclasses.replace(sampling, batch=min(sampling.batch, len(requests)))
    names = [
        f"{file_name(method)}_{i // asked.num_images:03d}_{request.number:03d}_{slug(request.prompt)}"
        for i, request in enumerate(requests)
    ]
    grid_path = out / f"{file_name(method)}_grid.png"
    ends = (".png", "_maps.png") if asked.maps else (".png",)
    on_first(
        lambda: check_outputs([*(out / (name + end) for name in names for end in ends), grid_path], asked.overwrite)
    )
    recorded(recipe_of(requests[0], method, asked.seed, sampling, config), "the recipe")  # which can be kept

    pictures: list[Picture] = []
    made = generate(requests, method.denoiser, method.experts, seed=asked.seed, options=sampling, announce=first())
    bar = progress(made, total=len(requests), unit="image", quiet=not first())
    for picture, name in zip(bar, names, strict=True):
        if not first():
            continue
        out.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(picture.request, method, asked.seed, sampling, config)
        save_png(out / f"{name}.png", picture.pixels, recipe)
        if asked.maps:
            timesteps = [int(t) for t in method.experts.schedule.timesteps(sampling.steps)]
            sheet = contact_sheet(picture.maps, method.sites, timesteps, experts=method.experts.names)
            save_picture(out / f"{name}_maps.png", sheet)
        pictures.append(picture)
    if not first():
        return
    rows = [
        [picture.pixels for picture in pictures[i : i + asked.num_images]]
        for i in range(0, len(pictures), asked.num_images)
    ]
    save_picture(grid_path, Image.fromarray(grid(rows)))
    print(grid_path)


def sample_file(config: ConfigDict, prompts: Path, out: Path, asked: Asked) -> None:
    """Write the pictures of a file of prompts, over all devices and processes, as afa_jax/sampling/sample_many.py says.

    Raises:
        InputError: as sample_prompts; a line of the file.
    """
    together(lambda: check_folder(out))
    read = together(lambda: read_prompts(prompts, asked.negative_prompt))
    sampling = sample_options(config, asked)
    method = together(lambda: load_method(config, asked, sampling, many=True))
    sampling = method.sampled_with(sampling)
    sample_all(
        read,
        method,
        out,
        num_images=asked.num_images,
        seed=asked.seed,
        options=sampling,
        recipe_of=lambda request: recipe_of(request, method, asked.seed, sampling, config),
        overwrite=asked.overwrite,
    )


def sample_options(config: ConfigDict, asked: Asked) -> SampleOptions:
    """Return how a config samples, but for what is asked for."""
    defaults = config.sample
    return SampleOptions(
        size=asked.size or tuple(defaults.size),
        steps=defaults.steps if asked.steps is None else asked.steps,
        guidance=float(defaults.guidance if asked.guidance is None else asked.guidance),
        eta=asked.eta or 0.0,
        batch=defaults.batch,
        maps=asked.maps,
    )


def load_method(config: ConfigDict, asked: Asked, sampling: SampleOptions, *, many: bool = False) -> Method:
    """Return the method that is asked for, with its weights, on the mesh of the config.

    Args:
        many: on all devices, if the config has no mesh.

    Raises:
        InputError: something of it is not there, or does not fit.
    """
    mesh = mesh_of(config)
    if many and "mesh" not in config and jax.device_count() > 1:
        mesh = make_mesh(dict(data=-1))
    models = Models(config, asked.workdir, sampling.steps, mesh)
    sampling.check(models.experts)
    method = make_method(find_method(asked.method, config, asked.sampling), models)
    method.sampled_with(sampling).check(method.experts)
    return method


def check_outputs(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise InputError for the first of the files that cannot be written, or is there already."""
    for path in paths:
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{path} exists; choose another --out, or --overwrite")
        check_file(path, overwrite)


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def find_method(text: str, config: ConfigDict, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The method of that name in the config's ``evaluation.methods``, or what ``text`` says by itself.

    Steps, guidance and eta that the user gives, in ``flags``, are the method's, whatever its own are.
    """
    named = entries_of(config) if "evaluation" in config else {}
    entry = dict(named[text]) if text in named else parse_method(text)
    entry = {field: value for field, value in entry.items() if field not in flags}
    return dict(name=method_name(entry)) | entry | {**flags}


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
        vae=method.experts.vae_hash,
        tokenizer=method.experts.tokenizer.sha256,
        experts=method.experts.record,
        made_by=dict(method.record),
    )
