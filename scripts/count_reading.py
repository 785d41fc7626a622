"""Count what a reader follows: the files that run for one picture, and for one training step.

    python scripts/count_reading.py

Each is done with the emoji ensemble, loaded before, while every function that is entered is noted. Networks and file
formats are left out (models/, weights/), and so is the ground floor: errors, files, records, names, trees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import afa_jax
from afa_jax.cli.commands import load_config
from afa_jax.experts.frozen import frozen, load_experts
from afa_jax.fusion.registry import init_fusion
from afa_jax.methods.method import Models, make_method
from afa_jax.methods.options import SampleOptions
from afa_jax.sampling.generation import Request, generate
from afa_jax.training.run import configured_fusion
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten

ROOT = Path(afa_jax.__file__).parent
LEFT_OUT = ("models/", "weights/")


def followed(work: Callable[[], Any]) -> dict[str, int]:
    """Return the files of the package, with their lines, whose functions are entered by the work."""
    seen: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    files = sorted(Path(name).relative_to(ROOT) for name in seen if name.startswith(f"{ROOT}/"))
    chosen = [file for file in files if len(file.parts) > 1 and not str(file).startswith(LEFT_OUT)]
    return {str(file): len((ROOT / file).read_text().splitlines()) for file in chosen}


def main() -> None:
    """Print both counts."""
    config = load_config("configs/emoji.py")

    method = make_method(dict(kind="afa"), Models(config, Path("models/emoji/afa"), 2))
    loaded = (method.denoiser, method.experts)

    def picture() -> None:
        options = SampleOptions(size=(32, 64), steps=2, guidance=3.0, batch=1)
        next(generate([Request(prompt="fox, noto style")], *loaded, seed=0, options=options))

    experts = load_experts(config)
    fusion, parts, optimizer = init_fusion(configured_fusion(config), experts.unet, 3, 0), frozen(experts), optax.sgd(1)
    batch = dict(image=np.zeros((2, 32, 64, 3), np.uint8), ids=experts.tokenizer(["fox", "owl"]), position=np.arange(2))

    def step() -> None:
        train_step = make_train_step(
            fusion, parts, optimizer, experts.schedule, caption_dropout=0.1, no_caption=jnp.zeros(16, jnp.int32)
        )
        train_step.lower(init_state(fusion, optimizer), batch, flatten(parts), jax.random.key(0))  # type: ignore[attr-defined]

    for what, work in (("one picture, from prompt to pixels", picture), ("one training step", step)):
        files = followed(work)
        print(f"{what}: {len(files)} files, {sum(files.values()):,} lines")
        for file, lines in files.items():
            print(f"  {lines:5} {file}")


if __name__ == "__main__":
    main()
