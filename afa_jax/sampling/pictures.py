"""Pictures of prompts, or of a file of prompts, by one method of a config, written into a folder."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import afa_jax
from afa_jax.data.pictures import grid, save_picture, save_png
from afa_jax.errors import InputError
from afa_jax.files import check_file, check_folder, writing
from afa_jax.mesh.parallel import make_mesh, mesh_of
from afa_jax.mesh.processes import is_process_0, on_process_0, raise_on_all
from afa_jax.methods.entries import entries_of
from afa_jax.methods.method import Method, Models, make_method, method_name
from afa_jax.methods.options import SampleOptions
from afa_jax.methods.specs import parse_method
from afa_jax.names import SAMPLING
from afa_jax.progress import progress
from afa_jax.records import recorded
from afa_jax.sampling.generation import Request, generate
from afa_jax.sampling.map_pictures import contact_sheet
from afa_jax.sampling.prompt_files import read_prompts
from afa_jax.sampling.sample_many import sample_all
from afa_jax.sampling.stepwise import Callback, stepwise
from afa_jax.weights.tokenizer.prompts import warn_of_syntax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of a request for pictures; an option that is None takes the method's or the config's value.

    Attributes:
        method: a name from the config's list, KIND[:EXPERT][,OPTION=VALUE]..., or an entry like those of the list.
        num_images: the number of pictures of each prompt.
        size: rows and columns, in pixels.
        steps, guidance, eta: the sampler's options, as in SampleOptions.
        sampler: the sampler's name.
        maps: also write the maps of every picture.
        overwrite: replace pictures of the same name.
    """

    method: str | Mapping[str, Any] = "afa"
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    sampler: str = "ddim"
    maps: bool = False
    overwrite: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the options of SAMPLING that are not None."""
        own = (name for name in SAMPLING if hasattr(self, name))  # a guidance interval is a method's alone
        return {name: value for name in own if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of one call, prompt by prompt.

    Attributes:
        images: PIL's, each with its recipe as JSON in ``.info["afa_jax"]``, as a picture of ``afa_jax.sample`` has it.
        recipes: for each picture, everything that reproduces it.
        maps: for each picture, the experts' weights ``[steps, n, h, w]`` by site; empty unless requested.
        names: names of the files that ``save`` writes, without the extension.
        rows: the number of pictures of each prompt, which form a row of the grid.
        timesteps: training timestep of each step.
        experts: names of the experts whose weights the maps hold, in the maps' order.
        files: the written files, the grid last.
    """

    images: list[Image.Image]
    recipes: list[dict[str, Any]]
    maps: list[dict[str, np.ndarray]]
    names: list[str]
    rows: int = 1
    timesteps: Sequence[int] = ()
    experts: Sequence[str] = ()
    title: str = "grid"
    files: tuple[Path, ...] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the recipe of the first picture."""
        return self.recipes[0]

    @property
    def grid(self) -> Image.Image:
        """Return all pictures as one image, with one row per prompt."""
        pixels = [np.asarray(image) for image in self.images]
        return Image.fromarray(grid([pixels[i : i + self.rows] for i in range(0, len(pixels), self.rows)]))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the pictures, the sheets of their maps and the grid, as ``afa_jax.sample`` does, and return the files.

        Args:
            folder: the folder, created if it does not exist.
            overwrite: replace files of the same name.

        Raises:
            InputError: a file exists already or cannot be written; then nothing is written.
        """
        out = Path(folder)
        check_folder(out)
        check_outputs(output_paths(out, self.names, self.title, maps=any(self.maps)), overwrite)
        written = []
        for image, recipe, maps, name in zip(self.images, self.recipes, self.maps, self.names, strict=True):
            written += write_picture(out, name, np.asarray(image), recipe, maps, self.timesteps, self.experts)
        return [*written, self.write_grid(out)]

    def write_grid(self, out: Path) -> Path:
        """Write the grid into a folder and return its path."""
        path = out / f"{self.title}.png"
        save_picture(path, self.grid)
        return path

    def _repr_png_(self) -> bytes:
        """Show the grid in a notebook."""
        data = io.BytesIO()
        self.grid.save(data, format="PNG")
        return data.getvalue()


def output_paths(out: Path, names: Sequence[str], title: str, *, maps: bool) -> list[Path]:
    """Return the paths of the pictures with these names, the grid last."""
    ends = (".png", "_maps.png") if maps else (".png",)
    return [*(out / (name + end) for name in names for end in ends), out / f"{title}.png"]


def write_picture(
    out: Path,
    name: str,
    pixels: np.ndarray,
    recipe: Mapping[str, Any],
    maps: Mapping[str, np.ndarray],
    timesteps: Sequence[int],
    experts: Sequence[str],
) -> list[Path]:
    """Write a picture with its recipe, and a sheet of its maps if it has any; return the files."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{name}.png"]
    save_png(written[0], pixels, recipe)
    if maps:
        written.append(out / f"{name}_maps.png")
        save_picture(written[1], contact_sheet([*maps.values()], [*maps], timesteps, experts=experts))
    return written


def sample_prompts(
    prompts: Sequence[str],
    asked: Asked,
    loaded: Loaded,
    out: Path | None = None,
    *,
    numbers: Sequence[int] | None = None,
    check: Callable[[Method, Mapping[str, Any]], None] = lambda method, recipe: None,
    callback: Callback | None = None,
    on_picture: Callable[[int, int, Image.Image], object] | None = None,
    quiet: bool = False,
) -> Pictures:
    """Make each picture of each prompt.

    Args:
        out: the folder to write each picture into as soon as it is made, and a grid of all at the end; None for none.
        numbers: the numbers of a prompt's pictures; ``range(num_images)`` by default.
        check: is called with the method and the first recipe before anything is sampled, and may raise.
        callback: is called after every step with its number, its timestep and the latents of a batch's pictures.
        on_picture: is called with the number of pictures made, their total number, and the last picture.
        quiet: show no bar.

    Raises:
        InputError: a prompt, a model or the method cannot be used, or a picture exists already.
    """
    config = loaded.config
    if out is not None:
        on_process_0(lambda: check_folder(out))
    sampling = sample_options(config, asked)
    method = raise_on_all(lambda: loaded.method(asked, sampling))
    sampling = method.sampled_with(sampling)
    if is_process_0():
        warn_of_syntax([*prompts, asked.negative_prompt])
    numbers = range(asked.num_images) if numbers is None else numbers
    requests = [
        Request(prompt=prompt, number=number, negative_prompt=asked.negative_prompt)
        for prompt in prompts
        for number in numbers
    ]
    sampling = dataclasses.replace(sampling, batch=min(sampling.batch, len(requests)))
    names = [
        f"{file_name(method)}_{i // len(numbers):03d}_{request.number:03d}_{slug(request.prompt)}"
        for i, request in enumerate(requests)
    ]
    title = f"{file_name(method)}_grid"
    if out is not None:
        paths = output_paths(out, names, title, maps=asked.maps)
        on_process_0(lambda: check_outputs(paths, asked.overwrite))

    def recipe_for(request: Request) -> dict[str, Any]:
        recipe = recipe_of(request, method, asked.seed, sampling, config, sources=loaded.sources(asked))
        return dict(recorded(recipe, "the recipe"))

    check(method, recipe_for(requests[0]))  # which also finds values that no recipe can hold

    timesteps = [int(t) for t in method.experts.schedule.timesteps(sampling.steps)]
    images, recipes, maps = list[Image.Image](), list[dict[str, Any]](), list[dict[str, np.ndarray]]()
    files: list[Path] = []
    made = generate(
        requests,
        method.denoiser,
        method.experts,
        seed=asked.seed,
        options=sampling,
        announce=is_process_0() and not quiet,
        sampler=None if callback is None else stepwise(callback, len(requests)),
    )
    bar = progress(made, total=len(requests), unit="image", quiet=quiet or not is_process_0())
    for picture, name in zip(bar, names, strict=True):
        recipe = recipe_for(picture.request)
        own = dict(zip(method.sites, picture.maps, strict=True)) if asked.maps else {}
        if out is not None and is_process_0():
            files += write_picture(out, name, picture.pixels, recipe, own, timesteps, method.experts.names)
        image = Image.fromarray(picture.pixels)
        image.info["afa_jax"] = json.dumps(recipe)
        images.append(image)
        recipes.append(recipe)
        maps.append(own)
        if on_picture is not None:
            on_picture(len(images), len(requests), image)
    pictures = Pictures(
        images=images,
        recipes=recipes,
        maps=maps,
        names=names,
        rows=len(numbers),
        timesteps=timesteps,
        title=title,
        experts=method.experts.names,
    )
    if out is not None and is_process_0():
        files.append(pictures.write_grid(out))
    return dataclasses.replace(pictures, files=tuple(files))


def sample_file(prompts: Path, out: Path, asked: Asked, loaded: Loaded) -> None:
    """Write the pictures of a file of prompts over all devices and processes; see afa_jax/sampling/sample_many.py.

    Raises:
        InputError: as sample_prompts, or a line of the file cannot be used.
    """
    config = loaded.config
    raise_on_all(lambda: check_folder(out))
    read = raise_on_all(lambda: read_prompts(prompts, asked.negative_prompt))
    sampling = sample_options(config, asked)
    method = raise_on_all(lambda: loaded.method(asked, sampling, many=True))
    sampling = method.sampled_with(sampling)
    sample_all(
        read,
        method,
        out,
        num_images=asked.num_images,
        seed=asked.seed,
        options=sampling,
        recipe_of=lambda request: recipe_of(
            request, method, asked.seed, sampling, config, sources=loaded.sources(asked)
        ),
        overwrite=asked.overwrite,
    )


def sample_options(config: ConfigDict, asked: Asked) -> SampleOptions:
    """Return a config's sampling options, with the requested ones in place of its own."""
    defaults = config.sample
    return SampleOptions(
        size=asked.size or tuple(defaults.size),
        steps=defaults.steps if asked.steps is None else asked.steps,
        guidance=float(defaults.guidance if asked.guidance is None else asked.guidance),
        eta=asked.eta or 0.0,
        sampler=asked.sampler,
        batch=defaults.batch,
        maps=asked.maps,
    )


class Loaded:
    """The models of a config and the last requested method, kept from one call to the next.

    Args:
        config: an ensemble's config.
        workdir: a trained run, a folder or a hub id.
    """

    def __init__(self, config: ConfigDict, workdir: Path | None = None):
        self.config, self.workdir = config, workdir
        self._models: dict[bool, Models] = {}
        self._last: tuple[tuple[bool, str], Method] | None = None

    def models(self, many: bool = False) -> Models:
        """Return the models on the config's mesh; without one, on all devices if there are ``many`` pictures."""
        many = many and "mesh" not in self.config and jax.device_count() > 1
        if many not in self._models:
            mesh = make_mesh(dict(data=-1)) if many else mesh_of(self.config)
            self._models = {many: Models(self.config, self.workdir, self.config.sample.steps, mesh)}
            self._last = None
        return self._models[many]

    def method(self, asked: Asked, sampling: SampleOptions, *, many: bool = False) -> Method:
        """Return the requested method with its weights.

        Raises:
            InputError: a part of it is missing or does not fit.
        """
        models = self.models(many)
        sampling.check(models.experts)
        entry = find_method(asked.method, self.config, asked.sampling)
        key = many, repr(entry)
        if self._last is None or self._last[0] != key:
            self._last = None  # the weights of two methods need not fit into memory
            self._last = key, make_method(entry, models)
        method = self._last[1]
        method.sampled_with(sampling).check(method.experts)
        return method

    def sources(self, asked: Asked) -> dict[str, Any]:
        """Return the places of a picture's parts, for its recipe."""
        entry = find_method(asked.method, self.config, asked.sampling)
        method = {field: value for field, value in entry.items() if field not in SAMPLING}
        return dict(experts=self.config.experts, workdir=self.workdir, method=method)


def check_outputs(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise InputError for the first file that cannot be written or exists already."""
    for path in paths:
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{path} exists; choose another --out, or --overwrite")
        check_file(path, overwrite)


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def find_method(text: str | Mapping[str, Any], config: ConfigDict, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of the method that ``text`` names in ``evaluation.methods``, specifies, or is itself.

    Steps, guidance and eta in ``flags``, which the user gives, replace the method's own.
    """
    if isinstance(text, str):
        named = entries_of(config) if "evaluation" in config else {}
        entry = dict(named[text]) if text in named else parse_method(text)
    else:
        entry = dict(text)
    entry = {field: value for field, value in entry.items() if field not in flags}
    return dict(name=method_name(entry)) | entry | {**flags}


def file_name(method: Method) -> str:
    """Return a method's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", method.name).strip("_")


def recipe_of(
    request: Request,
    method: Method,
    seed: int,
    options: SampleOptions,
    config: ConfigDict,
    sources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that reproduces a picture on the same kind of device.

    Args:
        sources: the places of its parts, as in ``Loaded.sources``; the hashes identify the parts themselves.
    """
    recipe: dict[str, Any] = dict(
        version=afa_jax.__version__,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        number=request.number,
        seed=seed,
        method=method.name,
        size=list(options.size),
        steps=options.steps,
        guidance=options.guidance,
        **({} if options.guidance_interval == (0.0, 1.0) else dict(guidance_interval=list(options.guidance_interval))),
        eta=options.eta,
        sampler=options.sampler,
        dtype=config.dtype,
        base=config.base,
        vae=method.experts.vae_hash,
        tokenizer=method.experts.tokenizer.sha256,
        experts=method.experts.record,
        made_by=dict(method.record),
    )
    return recipe if sources is None else recipe | dict(sources=sources)
