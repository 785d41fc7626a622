"""Many pictures of a file of prompts, over all devices and processes: ``afa_jax.sample --prompts FILE --out DIR``.

Picture p belongs to prompt p // K, for K pictures of each. It is a function of the recipe and of p alone, not of the
devices, the processes, its batch, or the start that made it. It is the file ``DIR/00012/00012345.png``, with its recipe
in its metadata. ``DIR/recipe.json`` has what all pictures share, and is written before the first one. Starting the same
recipe again makes the missing pictures.

Every process runs every batch and writes the pictures whose number modulo the number of processes is its own. DIR may
be one folder that all processes share, or one on each host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afa_jax.data.pictures import save_png
from afa_jax.errors import InputError
from afa_jax.files import replace_text, sweep, writing
from afa_jax.mesh.processes import (
    check_same,
    gather,
    is_process_0,
    log_once,
    on_process_0,
    raise_on_all,
    wait_for_all,
)
from afa_jax.methods.method import Method
from afa_jax.methods.options import SampleOptions
from afa_jax.progress import progress
from afa_jax.records import recorded
from afa_jax.sampling.generation import Request, generate
from afa_jax.sampling.prompt_files import Prompts, check_words

RECIPE = "recipe.json"
IN_A_FOLDER = 1000
"""Pictures in one folder; a folder of a hundred thousand is slow to list."""
WRITERS = 4
"""Threads of one process that compress and write pictures."""
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_FOLDER, _PICTURE, _PARTIAL = r"\d{5}", r"\d{8}\.png", r"\.\d{8}\.png\.[^.]+\.partial"


def sample_all(
    prompts: Prompts,
    method: Method,
    out: Path,
    *,
    num_images: int,
    seed: int,
    options: SampleOptions,
    recipe_of: Callable[[Request], dict[str, Any]],
    overwrite: bool = False,
) -> None:
    """Make the pictures that are missing in ``out``; every process makes the same call.

    Args:
        num_images: K, the number of pictures of each prompt.
        recipe_of: makes a picture's recipe; recipes differ only in prompt, negative prompt and number.
        overwrite: remove the existing pictures first.

    Raises:
        InputError: ``out`` has pictures of another recipe or cannot be written, or a prompt cannot be sampled.
    """
    check_words(prompts, method.experts.tokenizer)
    total = len(prompts.requests) * num_images
    own = ("prompt", "negative_prompt", "number", "sources")  # the hashes identify these better
    shared = {field: value for field, value in recipe_of(Request(prompt="")).items() if field not in own}
    enter(out, dict(prompts_sha256=prompts.sha256, num_images=num_images) | shared, overwrite)
    there = agreed(raise_on_all(lambda: existing(out, total)))
    missing = [int(p) for p in np.flatnonzero(~there)]
    # The size of a batch is compiled in, so it does not depend on how many pictures are missing.
    options = dataclasses.replace(options, batch=min(options.batch, total))
    requests = [dataclasses.replace(prompts.requests[p // num_images], number=p) for p in missing]
    began = time.perf_counter()
    with compilation() as spans:
        if missing:
            with warnings.catch_warnings():  # check_words has said it
                warnings.filterwarnings("ignore", r"prompt .* tokens, \d+ fit", UserWarning)
                pictures = generate(
                    requests, method.denoiser, method.experts, seed=seed, options=options, announce=is_process_0()
                )
            begun = total - len(missing)
            bar = progress(pictures, total=total, initial=begun, unit="picture", quiet=not is_process_0())
            write_all(
                (
                    (path_of(out, p), picture.pixels, recipe_of(picture.request))
                    for p, picture in zip(missing, bar, strict=True)
                    if p % jax.process_count() == jax.process_index()
                ),
                ahead=2 * options.batch,
            )
    seconds, compiling = time.perf_counter() - began, covered(spans)
    wait_for_all("pictures")  # another host may write slowly
    raise_on_all(lambda: remove_partial(out))
    devices = 1 if method.experts.mesh is None else method.experts.mesh.size
    rate = len(missing) / max(seconds - compiling, 1e-9)
    speed = f"; {rate:.3g} pictures/s, {rate / devices:.3g} on each of {devices} devices" if missing else ""
    log_once(
        f"{out}: {len(missing)} pictures made, {total - len(missing)} were there already; "
        f"{seconds:.1f} s, {compiling:.1f} s of it compilation{speed}"
    )


def path_of(out: Path, p: int) -> Path:
    """Return the path of picture p, whether it exists or not."""
    return out / f"{p // IN_A_FOLDER:05d}" / f"{p:08d}.png"


def enter(out: Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
    """Create or open the folder of a recipe.

    Process 0 goes first. If each host has its own disk, the other processes then find no folder and create it, too.

    Raises:
        InputError: it has pictures of another recipe or without one, or the processes have different recipes.
    """
    recipe = recorded(recipe, "the recipe")
    check_same(recipe, "--prompts, the config or what it names")
    if overwrite:
        on_process_0(lambda: clear(out))
        raise_on_all(lambda: clear(out))
    raise_on_all(lambda: _check(out, recipe))
    on_process_0(lambda: _keep(out, recipe))
    raise_on_all(lambda: _keep(out, recipe))


def _read_recipe(out: Path) -> dict[str, Any] | None:
    with writing(out), contextlib.suppress(FileNotFoundError):
        text = (out / RECIPE).read_text(errors="replace")
        with contextlib.suppress(ValueError):
            recipe = json.loads(text)
            if isinstance(recipe, dict) and {"prompts_sha256", "num_images"} <= recipe.keys():
                return recipe
        raise InputError(f"{out / RECIPE} is not of this command; choose another --out")
    return None


def _check(out: Path, recipe: Mapping[str, Any]) -> None:
    there = _read_recipe(out)
    if there is None:
        if next(_files(out, _PICTURE), None):
            raise InputError(f"{out} holds pictures of an unknown recipe (no {RECIPE}); choose another --out")
        return
    if different := first_difference(there, recipe):
        raise InputError(f"{out / RECIPE}: {different}; choose another --out, or --overwrite the pictures there")


def _keep(out: Path, recipe: Mapping[str, Any]) -> None:
    if not (out / RECIPE).exists():
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / RECIPE, json.dumps(recipe, indent=2) + "\n")


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Return, in words, the first field in which two JSON values differ; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        fields = ((f"{path}.{key}".lstrip("."), old.get(key), new.get(key)) for key in {**old, **new})
        return next((found for field, a, b in fields if (found := first_difference(a, b, field))), None)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((found for i, (a, b) in pairs if (found := first_difference(a, b, f"{path}.{i}"))), None)
    return None if old == new else f"{path} is {old!r} there and {new!r} here"


def clear(out: Path) -> None:
    """Remove the pictures that this command made in a folder, then their recipe; other files stay.

    Raises:
        InputError: a file cannot be removed.
    """
    if _read_recipe(out) is None:
        return
    with writing(out):
        for path in [*_files(out, _PICTURE), *_files(out, _PARTIAL)]:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder holds other files too
                path.parent.rmdir()
        (out / RECIPE).unlink(missing_ok=True)


def remove_partial(out: Path) -> None:
    """Remove partial pictures that were left by processes killed while writing."""
    for folder in (out, *{path.parent for path in _files(out, _PARTIAL)}):
        sweep(folder)


def _files(out: Path, pattern: str) -> Iterator[Path]:
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        if re.fullmatch(_FOLDER, folder.name) and folder.is_dir():
            yield from (path for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name))


def existing(out: Path, total: int) -> np.ndarray:
    """Return which of the pictures this process finds complete, bool ``[total]``."""
    there = np.zeros(total, bool)
    for path in _files(out, _PICTURE):
        p = int(path.stem)
        there[p : p + 1] = path == path_of(out, p) and _whole(path)
    return there


def _whole(path: Path) -> bool:
    """Return whether a file ends as a PNG must: a power cut may leave an empty file."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(_END_OF_PNG), os.SEEK_END)
            return file.read() == _END_OF_PNG
    except OSError:
        return False


def agreed(there: np.ndarray) -> np.ndarray:
    """Return which of the pictures at least one process finds, bool ``[total]``."""
    views = [np.frombuffer(view, np.uint8) for view in gather(np.packbits(there).tobytes())]
    return np.unpackbits(np.bitwise_or.reduce(views), count=len(there)).astype(bool)


def write_all(pictures: Iterator[tuple[Path, np.ndarray, Mapping[str, Any]]], ahead: int) -> None:
    """Write pictures, given as path, pixels and recipe, in a few threads while the next ones are made.

    Args:
        ahead: the number of pictures that may wait for a thread.
    """
    with ThreadPoolExecutor(WRITERS) as pool:
        waiting = deque[Future[None]]()
        for picture in pictures:
            waiting.append(pool.submit(_write, *picture))
            while waiting and (len(waiting) > ahead or waiting[0].done()):
                waiting.popleft().result()
        for one in waiting:
            one.result()


def _write(path: Path, pixels: np.ndarray, recipe: Mapping[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, pixels, recipe)


@contextlib.contextmanager
def compilation() -> Iterator[list[tuple[float, float]]]:
    """Collect the spans (start, end), in seconds, in which JAX traces, lowers or compiles within this context."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


def covered(spans: Sequence[tuple[float | int, float | int]]) -> float:
    """Return the number of seconds that lie in at least one of the spans."""
    seconds, end = 0.0, -np.inf
    for began, ended in sorted(spans):
        seconds += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return float(seconds)
