"""A sweep of wrong command lines, over every option of every command and every field of a config.

    python -m tests.commands.wrong_lines FOLDER [N]

With N only each N-th line. It runs in a process of its own, in which jax cannot be imported: whoever asks for it has
found nothing wrong with the line. Prints one JSON object with what should not be: lines that ended otherwise than with
one line of error, and lines whose option takes numbers or a choice and that were taken all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afa_jax.cli.commands import run
from afa_jax.config.fields import Section
from afa_jax.config.files import load_config
from afa_jax.config.schema import ENSEMBLE, MODEL_CONFIG, VAE_CONFIG
from afa_jax.errors import InputError

ROOT = Path(__file__).parents[2]
EMOJI, BASE, VAE = (str(ROOT / "configs" / f"{name}.py") for name in ("emoji", "emoji_base", "emoji_vae"))
NEEDED = {
    "train": ["--workdir=x", f"--config={EMOJI}"],
    "finetune": ["--workdir=x", f"--config={BASE}"],
    "train_vae": ["--workdir=x", f"--config={VAE}"],
    "sample": ["--prompt=fox", "--out=x", f"--config={EMOJI}"],
    "evaluate": ["--out=x", f"--config={EMOJI}"],
    "maps": ["--prompt=fox", "--out=x", f"--config={EMOJI}"],
    "merge": ["--method=average", "--out=x", f"--config={EMOJI}"],
    "search": ["--workdir=x", f"--config={EMOJI}"],
    "export": ["--workdir=x", "--pair=y", f"--config={EMOJI}"],
    "screen": [f"--config={EMOJI}"],
    "aot": ["--devices=2", f"--config={EMOJI}"],
    "demo": ["--out=x"],
    "convert": ["input", "--out=x"],
    "report.__main__": ["--workdir=x", "--out=y.html"],
    "prepare": ["--builder=folder", "--from=x", "--out=y"],
}
"""What each command must be given."""
OPEN = ("data", "validation.data", "fusion", "evaluation.noise.data", "schedule")
LONG = "9" * 400
NO_NUMBERS = ("", "x", "nan", "inf", "-inf", "1e400", LONG, f"-{LONG}", "-2", "[]", "None", "1_0e9", "\udc80", "٣" * 40)
TEXTS = (
    *("", " ", "\0", "a\0b", "\udc80\ud800", "x" * 300, "x" * 100_000, LONG, "[" * 5000, "{[]:1}", "\x1b[2J", "a\nb"),
    *("..", "/", "/dev/null", "/dev/full/x", "=", "a=b", "a=,b", ":", "name=path,lora=x:y", "a/" * 3000, "%s", "-"),
)
VALUES = (
    *('""', "''", "None", "True", "0", "-1", "1.5", "nan", "1e400", "inf", LONG, f"'{LONG}'", f"1e{LONG}", "[]", "()"),
    *(
        "{}",
        "{[]:1}",
        "{1:2}",
        "[[[[" * 2000,
        "'\\udc80'",
        "\udc80",
        "'\\0'",
        "dict()",
        "x" * 20_000,
        "(1,2,3)",
        "[None]",
    ),
    *("(1,2,3)", "{'kind': None}", "[{}]", "b'x'", "1j", "...", "1_000", "-0.0", "{'a': {'b': {}}}", "9**99", "0x10"),
)


class Taken(BaseException):
    """Nothing was found wrong with a line: its work was about to begin."""


class NoJax:
    """Keeps jax from being imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise Taken for jax and for other libraries that take a second."""
        if name in ("jax", "torch", "transformers", "tensorflow_datasets", "flax", "optuna", "orbax"):
            raise Taken(name)


def outcome(action: Callable[[], object]) -> tuple[str, str]:
    """Do it; how it ended ("taken", "refused" or "broken"), and what it said."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = action()
    except Taken as taken:  # to explain an error of ours, a command asks for jax too
        error = taken.__context__
        while isinstance(error, Taken):
            error = error.__context__
        return ("taken", "") if error is None else ("broken", repr(error)[:300])
    except InputError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("broken", str(error))
    except BaseException as error:
        return "broken", f"{type(error).__name__}: {error}"[:300]
    lines = said.getvalue().splitlines()
    if status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 3000:
        return "refused", lines[0]
    return ("taken", "") if status is None else ("broken", f"status {status}: {lines}"[:300])


def parser_of(main: Callable[[Sequence[str]], Any], needed: Sequence[str]) -> argparse.ArgumentParser:
    """The parser that a command makes, complete."""
    found: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_known_args

    def seen(parser: argparse.ArgumentParser, *arguments: Any, **named: Any) -> Any:
        found.append(parser)
        raise Taken

    argparse.ArgumentParser.parse_known_args = seen  # type: ignore[method-assign, assignment]
    try:
        with contextlib.suppress(Taken):
            main(list(needed))
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    return found[0]


def lines_of(name: str, main: Callable[[Sequence[str]], Any]) -> Iterator[tuple[list[str], bool]]:
    """Lines of a command, and whether each must be refused."""
    needed = NEEDED[name]
    yield [], name != "demo"
    for argument in needed:
        optional = name in ("demo", "maps") and not argument.startswith("--config")
        yield [other for other in needed if other != argument], not optional
    yield [*needed, "--nonsense"], True
    yield [*needed, "surplus"], name != "convert"
    for action in parser_of(main, needed)._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        option = action.option_strings[0]
        others = [argument for argument in needed if argument.partition("=")[0] != option]
        if action.nargs == 0:
            yield [*others, f"{option}=x"], True
            continue
        yield [*others, option], True  # without its value
        limited = action.choices is not None or (action.type is not None and action.type is not Path)
        for value in NO_NUMBERS if limited else TEXTS:
            nothing = action.type is Path and not value.strip()
            given = [option, value, value] if action.nargs == 2 else [f"{option}={value}"]
            yield [*others, *given], limited or nothing or "\0" in value


def fields_of(section: Section, where: str = "") -> Iterator[tuple[str, bool]]:
    """The dotted names of a schema, and whether each is a section."""
    for field, own in section.fields.items():
        yield f"{where}{field}", isinstance(own, Section)
        if isinstance(own, Section):
            yield from fields_of(own, f"{where}{field}.")


def overrides() -> Iterator[tuple[str, list[str], bool]]:
    """Configs with what is changed in them, and whether each must be refused."""
    for config, own in ((EMOJI, ENSEMBLE), (BASE, MODEL_CONFIG), (VAE, VAE_CONFIG)):
        names = list(fields_of(own))
        for name, _ in names:
            yield from ((config, [f"{name}={value}"], False) for value in VALUES)
            yield config, [f"{name}.{name}=1"], False
            # What an open section has no field for, its source or method refuses.
            yield config, [f"{name}x=1"], not any(name.startswith(f"{part}.") for part in OPEN)
    chance = random.Random(0)
    names = list(fields_of(ENSEMBLE))
    for _ in range(300):
        yield EMOJI, [f"{chance.choice(names)[0]}={chance.choice(VALUES)}" for _ in range(3)], False
    for odd in ("=1", ".=1", "a", "", "..=1", "name", "experts.0.name=x", "base.path=x", "train..steps=1", "="):
        yield EMOJI, [odd], True


def main(folder: str, every: str = "1") -> None:
    """Run the sweep in a folder, which stays empty."""
    sys.meta_path.insert(0, NoJax())  # type: ignore[arg-type]
    os.chdir(folder)
    wrong: list[Any] = []
    count, slowest, started = 0, 0.0, time.perf_counter()

    def judge(line: Any, must: bool, action: Callable[[], object]) -> None:
        nonlocal count, slowest
        count += 1
        if count % int(every):
            return
        began = time.perf_counter()
        end, said = outcome(action)
        slowest = max(slowest, time.perf_counter() - began)
        if end == "broken" or (must and end == "taken"):
            wrong.append([end, [ascii(part)[:120] for part in line], said])

    for name in NEEDED:
        command = importlib.import_module(f"afa_jax.{name}").main
        for line, must in lines_of(name, command):
            judge([name, *line], must, lambda line=line, command=command: run(command, line))  # type: ignore[misc]
    commands_took = time.perf_counter() - started
    for config, changed, must in overrides():
        judge([config, *changed], must, lambda config=config, changed=changed: load_config(config, changed) and None)  # type: ignore[misc]
    made = [str(path) for path in itertools.islice(Path(folder).rglob("*"), 20)]
    took = [round(commands_took, 1), round(time.perf_counter() - started, 1), round(slowest, 2)]
    print(json.dumps(dict(count=count, wrong=wrong, made=made, seconds=took)))


if __name__ == "__main__":
    main(*sys.argv[1:])
