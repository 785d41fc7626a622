"""Arguments that several commands have, checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from afa_jax.config.fields import MOST_PIXELS, SEEDS
from afa_jax.config.method_options import check_entry, check_values
from afa_jax.errors import InputError
from afa_jax.files import check_folder
from afa_jax.json_files import read_object
from afa_jax.methods.specs import parse_method
from afa_jax.models.configs import VAEConfig
from afa_jax.names import DISTILLED, DTYPES, METHODS
from afa_jax.training.run_folders import check_workdir
from afa_jax.weights.tokenizer.prompts import check_prompt

T = TypeVar("T")


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text) if len(text) <= 30 else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text:.40}: write a whole number from {low} to {high}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: finite numbers from low to high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text:.40}: write a number from {low:g} to {high:g}")
        return value

    return parse


def argument(text: str) -> str:
    """Return a text that a command line can hold, as an argparse type."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("half of a character (a lone surrogate); leave it out") from None
    if "\0" in text:
        raise argparse.ArgumentTypeError("the character NUL; leave it out")
    return text


def place(text: str) -> Path:
    """Return a file or folder that has a name, as an argparse type."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a file or folder")
    return Path(argument(text))


def license_name(text: str) -> str:
    """Return the name of a licence in the hub's spelling, as an argparse type."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r:.120}; write the hub's name of one, such as creativeml-openrail-m or mit"
        )
    return text


COUNT = whole(1, 10**6)
"""The number of pictures, prompts, pairs or steps; the bound keeps a mistyped one from running for ever."""
SEED = whole(0, SEEDS - 1)
"""The seed of any random draw."""
GUIDANCE = real(1, 1000)
STEPS = whole(1, 1000)
_LONGEST_SIDE = 2**16  # the longest side of a picture, as in configs


def seed_or_random(text: str) -> int:
    """Return the seed of pictures, as an argparse type; for -1 a random one, which is printed."""
    seed = whole(-1, SEEDS - 1)(text)
    if seed == -1:
        seed = secrets.randbelow(SEEDS)
        print(f"seed {seed}")
    return seed


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the dtype of written weights."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as they are stored)")


def add_workdir_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every trainer's options for the run's folder, and for an existing run in it."""
    parser.add_argument("--workdir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="continue the run in the workdir")
    parser.add_argument(
        "--resume_step",
        type=whole(0, 10**9),
        metavar="N",
        action=_ResumeStep,
        help="continue it from the checkpoint of step N instead of the last one; later ones are removed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the workdir")
    parser.add_argument(
        "--resume_if_any",
        action="store_true",
        help="--resume if the workdir holds a run, else start it: for what is restarted by a machine",
    )


class _ResumeStep(argparse.Action):
    """The action of --resume-step, which implies --resume."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.resume, namespace.resume_step = True, values


def check_workdir_arguments(options: argparse.Namespace, here: bool = True, cache: str = "") -> None:
    """Check the options of ``add_workdir_arguments`` with check_run_start."""
    check_run_start(
        options.workdir,
        resume=options.resume,
        resume_if_any=options.resume_if_any,
        overwrite=options.overwrite,
        here=here,
        cache=cache,
    )


def check_run_start(
    workdir: Path, *, resume: bool, resume_if_any: bool, overwrite: bool, here: bool = True, cache: str = ""
) -> None:
    """Raise InputError for ways to start a run that exclude each other, or that the workdir refuses.

    Args:
        here: whether this process has the workdir; of several process 0 alone may have it.
        cache: the cache's place, which may be within.
    """
    if resume_if_any and (resume or overwrite):
        other = "--overwrite" if overwrite else "--resume, or --resume_step,"
        raise InputError(f"--resume_if_any and {other} exclude each other")
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if here and not resume_if_any:
        check_workdir(workdir, resume=resume, overwrite=overwrite, cache=cache)
    elif here:
        check_folder(workdir)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError for a prompt that is empty, too long or no text."""
    for prompt in prompts:
        if not check_prompt(prompt, "--prompt").strip():
            raise InputError("--prompt is empty; say what to draw")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the size of pictures."""
    parser.add_argument("--size", metavar="HxW", help="rows x columns in pixels (default: the config's)")
    side = whole(1, _LONGEST_SIDE)
    parser.add_argument("--width", type=side, metavar="W", help="columns in pixels, with --height instead of --size")
    parser.add_argument("--height", type=side, metavar="H", help="rows in pixels")


def size_of(options: argparse.Namespace, base: Any) -> tuple[int, int] | None:
    """Return the rows and columns that the options of ``add_size_arguments`` give, or None.

    Args:
        base: the base model, as ``check_size`` takes it.

    Raises:
        InputError: a size of another form, or half of one, or as check_size.
    """
    size = None
    if options.size is not None:
        match = re.fullmatch(r"(\d{1,20})x(\d{1,20})", options.size)
        if not match:
            raise InputError(f"--size {options.size!r:.40}; write rows x columns in pixels, such as 512x768")
        size = int(match[1]), int(match[2])
    return check_size(one_size(size, options.height, options.width), base)


def one_size(size: Sequence[int] | None, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Return rows and columns, given as one or as two; raise InputError for both, or half of the two."""
    if size is None and width is None and height is None:
        return None
    if size is None:
        if width is None or height is None:
            raise InputError("--width and --height go together; give both, or --size HxW")
        return height, width
    if width is not None or height is not None:
        raise InputError("--size and --width, --height exclude each other; keep one")
    try:
        rows, columns = size
    except (TypeError, ValueError):
        raise InputError(f"size={size!r:.40}; write (rows, columns) in pixels, such as (512, 768)") from None
    return rows, columns


def check_size(size: tuple[int, int] | None, base: Any) -> tuple[int, int] | None:
    """Return the size if pictures can have it.

    Args:
        base: the base model, as a config names it; if it is a folder, its VAE determines the possible sizes.

    Raises:
        InputError: it has too many pixels, or the VAE has no such size.
    """
    if size is None:
        return None
    rows, columns = size
    if not 1 <= min(rows, columns) <= max(rows, columns) <= _LONGEST_SIDE:
        raise InputError(f"--size {rows}x{columns}: sides have 1 to {_LONGEST_SIDE:,} pixels; choose others")
    if rows * columns > MOST_PIXELS:
        raise InputError(f"--size {rows}x{columns} is of more than {MOST_PIXELS:,} pixels; choose a smaller one")
    folder = base if isinstance(base, str) else base.get("path")
    path = Path(str(folder), "vae", "config.json")
    if path.is_file():
        try:
            vae = VAEConfig.from_json(read_object(path, ""))
        except InputError:
            return size  # a damaged file: opening the model gives a better message
        vae.check_size(size)
    return size


def checked(name: str, value: Any, kind: Callable[[str], T]) -> T | None:
    """Check a number given in Python like an argument of the command line, and return it; None stays None.

    Raises:
        InputError: the argument cannot have this value; the error gives the argument's name.
    """
    if value is None:
        return None
    if isinstance(value, bool | str):
        raise InputError(f"{name}={value!r:.40}: write a number")
    try:
        return kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name}: {error}") from None


def check_method(text: str | Mapping[str, Any], config: Any) -> None:
    """Raise InputError for a ``--method`` that is neither one of the config's by its name nor of a kind's options.

    Args:
        text: the command line's notation, or an entry of a config's list.
    """
    if not isinstance(text, str):
        return check_values(check_entry(text), expert_names(config))
    named = [entry.get("name") for entry in (config.get("evaluation") or {}).get("methods", ())]
    kind = re.split("[ ,:]", text)[0]
    if text not in named and kind not in METHODS:
        raise InputError(f"--method {text}: no method {kind!r}; there are {', '.join(METHODS)}")
    if text in named:
        return None
    try:
        entry = parse_method(text)
    except InputError:
        if not named:
            raise
        # Controls and methods without names of their own are called "afa, experts permuted", "ties density=0.3".
        return None
    try:
        check_values(check_entry(entry), expert_names(config))
    except InputError as error:
        raise InputError(f"--method {text}: {error}") from None
    return None


def with_style(method: str, style: str) -> str:
    """Return the spec of a method with ``--style NAME=WEIGHT,...`` as its option.

    Raises:
        InputError: the style has another form, or the method cannot have one.
    """
    if re.split("[ ,:]", method)[0] != DISTILLED:
        raise InputError(f"--style {style:.80}: it goes with --method {DISTILLED}:RUN")
    parts = [part.partition("=") for part in style.split(",")]
    if not all(name and equals and weight for name, equals, weight in parts):
        raise InputError(f"--style {style:.80}: write NAME=WEIGHT, and commas between several")
    return ",".join([method, *(f"style.{name}={weight}" for name, _, weight in parts)])


def expert_names(config: Any) -> list[str]:
    """Return the names of a config's experts."""
    return [str(expert["name"]) for expert in config.experts]


def check_prompt_file(path: Path | None, option: str = "--prompts") -> None:
    """Raise InputError for a file of prompts that is not there."""
    if path is not None and not path.is_file():
        reason = "is a folder" if path.is_dir() else "No such file"
        raise InputError(f"{option} {path}: {reason}; name a file of prompts")


def check_run(path: Path | None) -> None:
    """Raise InputError for a ``--workdir`` that is not there and can be no hub id."""
    if path is not None and not os.path.lexists(path) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", str(path)):
        raise InputError(f"--workdir {path}: no such file or folder; name a trained run, or a hub id like owner/name")
