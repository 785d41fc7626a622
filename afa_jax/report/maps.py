"""Pictures with the maps of every site over the timesteps, and each expert's weight by site over many prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import afa_jax
from afa_jax.data.pictures import save_png
from afa_jax.errors import InputError
from afa_jax.files import check_folder, check_new, replace_bytes, replace_text, writing
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.progress import progress
from afa_jax.report.trust import Drawn, Mean, maps_page, rounded, routing_of
from afa_jax.sampling.generation import Picture, Request, generate
from afa_jax.sampling.map_pictures import animation, contact_sheet, frames
from afa_jax.sampling.pictures import find_method, slug

_TILE = 76  # pixels, width of the sheet's tiles
_ENDS = (".png", "_maps.png", "_maps.webp")  # the endings of a picture's files


def draw_maps(
    config: ConfigDict,
    out: Path,
    prompts: Sequence[str] = (),
    *,
    statistics: str | None = None,
    workdir: Path | None = None,
    method: str | Mapping[str, Any] = "afa",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write pictures, sheets, animations, maps.html and maps.json into ``out``; return maps.html.

    Args:
        prompts: the prompts to draw.
        statistics: "FILE" or "emoji:N", the prompts to measure on.
        workdir: a trained run, a folder or a hub id.
        method: a method that has maps.
        size, steps, guidance: options of sampling; None takes the config's.
        overwrite: replace files of the same name.

    Raises:
        InputError: a prompt, a model or the method cannot be used, or a file exists already.
    """
    flags = {name: value for name, value in dict(steps=steps, guidance=guidance).items() if value is not None}
    many = read_prompts(statistics, seed) if statistics else []
    names = [f"{i:03d}_{slug(prompt)}" for i, prompt in enumerate(prompts)]
    check_folder(out)
    for file in ("maps.html", "maps.json", *(name + end for name in names for end in _ENDS)):
        check_new(out / file, overwrite)
    defaults = config.sample
    sampling: dict[str, Any] = dict(
        size=size or tuple(defaults.size),
        steps=defaults.steps if steps is None else steps,
        guidance=float(defaults.guidance if guidance is None else guidance),
    )
    # Maps are kept of one picture at a time; over many prompts they are reduced where they arise, inside the scan.
    whole = SampleOptions(**sampling, batch=1, maps=True, path=True)
    reduced = SampleOptions(**sampling, batch=max(1, min(defaults.batch, len(many))), routing=True)
    models = Models(config, workdir, whole.steps)
    whole.check(models.experts)
    chosen = make_method(find_method(method, config, flags), models)
    whole, reduced = (chosen.sampled_with(each) for each in (whole, reduced))
    experts = chosen.experts
    timesteps = [int(t) for t in experts.schedule.timesteps(whole.steps)]
    sites = chosen.sites

    def sampled(texts: Sequence[str], sample_options: SampleOptions) -> Iterator[Picture]:
        if not texts:
            return iter(())
        requests = [Request(prompt=text) for text in texts]
        return generate(requests, chosen.denoiser, experts, seed=seed, options=sample_options, announce=True)

    to_draw, to_count = sampled(prompts, whole), sampled(many, reduced)  # checks the prompts
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    shared: dict[str, object] = dict(
        version=afa_jax.__version__,
        method=dict(chosen.record),
        seed=seed,
        size=list(whole.size),
        steps=whole.steps,
        guidance=whole.guidance,
        eta=whole.eta,
        sampler="ddim",
    )
    drawn, single = [], []
    for picture, name in zip(progress(to_draw, total=len(names), unit="image", quiet=not names), names, strict=True):
        assert picture.path is not None
        prompt, shown = picture.request.prompt, (picture.maps, sites, timesteps)
        sheet = io.BytesIO()
        row = max(24, round(_TILE * whole.size[0] / whole.size[1]))
        contact_sheet(*shown, columns=10, row=row, path=picture.path, experts=experts.names).save(sheet, format="PNG")
        moving = animation(frames(*shown, picture.path, experts.names, prompt))
        save_png(out / f"{name}.png", picture.pixels, shared | dict(prompt=prompt, number=0))
        replace_bytes(out / f"{name}_maps.png", sheet.getvalue())
        replace_bytes(out / f"{name}_maps.webp", moving)
        drawn.append(Drawn(prompt, moving, sheet.getvalue()))
        single.append(dict(prompt=prompt, **rounded(routing_of(picture.maps))))
    mean = Mean() if many else None
    for picture in progress(to_count, total=len(many), unit="image", quiet=not many):
        assert mean is not None
        mean.add(picture.routing)
    record = shared | dict(
        experts=list(experts.names),
        sites=sites,
        timesteps=timesteps,
        pictures=single,
        statistics=None if mean is None else _record(mean, many),
    )
    replace_text(out / "maps.json", json.dumps(record) + "\n")
    title = f"Whom {chosen.name} trusts: {config.name}"
    labels: dict[str, Any] = dict(sites=sites, timesteps=timesteps, experts=experts.names)
    replace_text(out / "maps.html", maps_page(title, drawn, mean, **labels))
    return out / "maps.html"


def _record(found: Mean, prompts: Sequence[str]) -> dict[str, Any]:
    """Return means and deviations over the prompts: ``weights`` by step, site, expert; ``entropy`` by step, site."""
    means = rounded({name: found.mean(name) for name in ("weights", "entropy")})
    deviations = rounded({f"{name}_deviation": found.deviation(name) for name in ("weights", "entropy")})
    return dict(prompts=list(prompts), **means, **deviations)


def read_prompts(source: str, seed: int) -> list[str]:
    """Read the prompts of a text file, one per line, or for ``emoji:N`` return those of N scenes of two topics.

    Raises:
        InputError: the file does not exist, is no text or is empty; or there are not so many scenes.
    """
    kind, _, number = source.partition(":")
    if kind == "emoji" and number:
        from afa_jax.data.emoji.scenes import evaluation_prompts

        if not number.isdecimal() or int(number) < 1:
            raise InputError(f"--statistics {source}: write a number of scenes, such as emoji:64")
        try:
            return [prompt.caption for prompt in evaluation_prompts("mixed", int(number), seed)]
        except ValueError as error:
            raise InputError(f"--statistics {source}: {error}; choose fewer") from error
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise InputError(f"--statistics {source}: {reason}; name a file with a prompt a line, or emoji:N") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--statistics {source}: no prompt in it; write one a line")
    return prompts
