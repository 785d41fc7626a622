"""Who painted what, when: ``python -m afa_jax.maps --config configs/emoji.py --workdir DIR --prompt "..." --out DIR``.

For each prompt the picture, the maps of every site over the timesteps (``*_maps.png``) and an animation of them
(``*_maps.webp``). ``--statistics`` adds whom each site trusts at which timestep over many prompts. All of it is in
maps.html, the figures in maps.json.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import afa_jax
from afa_jax.commands import Parser, parse, run
from afa_jax.data.pictures import save_png
from afa_jax.errors import InputError
from afa_jax.files import check_new, replace_bytes, replace_text, writing
from afa_jax.generate import Picture, Request, SampleOptions, generate
from afa_jax.methods import Models, make_method
from afa_jax.report.maps import animation, contact_sheet, frames
from afa_jax.report.trust import Drawn, Mean, maps_page, rounded, routing_of
from afa_jax.sample import find_method, parse_size, slug

_TILE = 76  # pixels, width of the sheet's tiles
_ENDS = (".png", "_maps.png", "_maps.webp")  # of a picture's files


def main(arguments: Sequence[str]) -> None:
    """Write pictures, sheets, animations, maps.html and maps.json into ``--out``."""
    parser = Parser(prog="python -m afa_jax.maps", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--statistics", metavar="FILE|emoji:N", help="over the prompts of a text file, one a line, or N emoji scenes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the config's)")
    parser.add_argument("--size", metavar="HxW", help="rows x columns in pixels (default: the config's)")
    parser.add_argument(
        "--method", default="afa", help="afa, or another method that has maps", metavar="NAME|KIND[,OPTION=VALUE]..."
    )
    parser.add_argument("--out", type=Path, default=Path("maps"), help="folder for all of it (default: maps)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same name")
    options, config = parse(parser, arguments)

    if not options.prompt and not options.statistics:
        parser.error("nothing to draw: give --prompt, --statistics or both")
    if not all(prompt.strip() for prompt in options.prompt):
        raise InputError("--prompt is empty; say what to draw")
    if not 0 <= options.seed < 2**31:
        raise InputError(f"--seed {options.seed}; choose 0 to {2**31 - 1}")
    many = read_prompts(options.statistics, options.seed) if options.statistics else []
    names = [f"{i:03d}_{slug(prompt)}" for i, prompt in enumerate(options.prompt)]
    for file in ("maps.html", "maps.json", *(name + end for name in names for end in _ENDS)):
        check_new(options.out / file, options.overwrite)
    defaults = config.sample
    sampling: dict[str, Any] = dict(
        size=parse_size(options.size) if options.size else tuple(defaults.size),
        steps=defaults.steps if options.steps is None else options.steps,
        guidance=float(defaults.guidance if options.guidance is None else options.guidance),
    )
    # Maps are kept of one picture at a time; over many prompts they are reduced where they arise, inside the scan.
    whole = SampleOptions(**sampling, batch=1, maps=True, path=True)
    reduced = SampleOptions(**sampling, batch=max(1, min(defaults.batch, len(many))), routing=True)
    models = Models(config, options.workdir, whole.steps)
    whole.check(models.experts)
    method = make_method(find_method(options.method, config, options), models)
    whole, reduced = (method.sampled_with(each) for each in (whole, reduced))
    experts = method.experts
    timesteps = [int(t) for t in experts.schedule.timesteps(whole.steps)]
    sites = method.sites

    def sampled(prompts: Sequence[str], sample_options: SampleOptions) -> Iterator[Picture]:
        if not prompts:
            return iter(())
        requests = [Request(prompt=prompt) for prompt in prompts]
        return generate(requests, method.denoiser, experts, seed=options.seed, options=sample_options)

    to_draw, to_count = sampled(options.prompt, whole), sampled(many, reduced)  # which checks them
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    shared: dict[str, object] = dict(
        version=afa_jax.__version__,
        method=dict(method.record),
        seed=options.seed,
        size=list(whole.size),
        steps=whole.steps,
        guidance=whole.guidance,
        eta=whole.eta,
        sampler="ddim",
    )
    drawn, single = [], []
    for picture, name in zip(tqdm(to_draw, total=len(names), unit="image", disable=not names), names, strict=True):
        assert picture.path is not None
        prompt, shown = picture.request.prompt, (picture.maps, sites, timesteps)
        sheet = io.BytesIO()
        row = max(24, round(_TILE * whole.size[0] / whole.size[1]))
        contact_sheet(*shown, columns=10, row=row, path=picture.path, experts=experts.names).save(sheet, format="PNG")
        moving = animation(frames(*shown, picture.path, experts.names, prompt))
        save_png(options.out / f"{name}.png", picture.pixels, shared | dict(prompt=prompt, number=0))
        replace_bytes(options.out / f"{name}_maps.png", sheet.getvalue())
        replace_bytes(options.out / f"{name}_maps.webp", moving)
        drawn.append(Drawn(prompt, moving, sheet.getvalue()))
        single.append(dict(prompt=prompt, **rounded(routing_of(picture.maps))))
    statistics = Mean() if many else None
    for picture in tqdm(to_count, total=len(many), unit="image", disable=not many):
        assert statistics is not None
        statistics.add(picture.routing)
    record = shared | dict(
        experts=list(experts.names),
        sites=sites,
        timesteps=timesteps,
        pictures=single,
        statistics=None if statistics is None else _record(statistics, many),
    )
    replace_text(options.out / "maps.json", json.dumps(record) + "\n")
    title = f"Whom {method.name} trusts: {config.name}"
    labels: dict[str, Any] = dict(sites=sites, timesteps=timesteps, experts=experts.names)
    replace_text(options.out / "maps.html", maps_page(title, drawn, statistics, **labels))
    print(options.out / "maps.html")


def _record(found: Mean, prompts: Sequence[str]) -> dict[str, Any]:
    """Means and deviations over the prompts: ``weights`` by step, site and expert, ``entropy`` by step and site."""
    means = rounded({name: found.mean(name) for name in ("weights", "entropy")})
    deviations = rounded({f"{name}_deviation": found.deviation(name) for name in ("weights", "entropy")})
    return dict(prompts=list(prompts), **means, **deviations)


def read_prompts(source: str, seed: int) -> list[str]:
    """The prompts of a text file, one a line, or with ``emoji:N`` of N scenes of two topics.

    Raises:
        InputError: no such file, no text, or nothing in it; not a number of scenes that there are.
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


if __name__ == "__main__":
    raise SystemExit(run(main))
