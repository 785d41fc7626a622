"""Experts merged into one ordinary checkpoint: ``python -m afa_jax.merge --config CONFIG --method METHOD --out OUT``.

METHOD is a kind and its options: ``average,weights.photo=0.3,weights.anime=0.7``, ``mbw,preset=GRAD_V,of=anime``,
``ties,density=0.3``, ``slerp,a=photo,b=anime,t=0.4``; afa_jax/weights/merge_kinds.py has all of them. The U-Nets are
merged, and the text encoders unless text_encoder=base or =NAME says whose it is. ``learned_mbw,workdir=RUN`` is the
merge mbw with the block weights that ``afa_jax.train`` learnt into RUN. VAE, tokenizer and schedule are the
base's. OUT becomes a single file if it ends in .safetensors, a diffusers folder otherwise; how it was made is in its
metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afa_jax.commands import Parser, parse, run
from afa_jax.convert import add_dtype_argument, check_out, identity, write
from afa_jax.errors import InputError
from afa_jax.experts import check_record, find_checkpoints, mismatches, record_of
from afa_jax.ingredients import bake, parse_base
from afa_jax.method_specs import parse_method
from afa_jax.weights.aggregators import aggregators_hash, load_block_weights, read_record
from afa_jax.weights.checkpoint import Checkpoint, rounded
from afa_jax.weights.combine import BASES, COMPONENTS, check_parts, with_base
from afa_jax.weights.compare import EXPERT
from afa_jax.weights.hub import fetch_run
from afa_jax.weights.merging import KINDS, merge, needs_base

LEARNED = "learned_mbw"


def main(arguments: Sequence[str]) -> None:
    """Merge what the options name."""
    parser = Parser(prog="python -m afa_jax.merge", description=__doc__)
    parser.add_argument(
        "--method", required=True, metavar="KIND[,OPTION=VALUE]...", help=f"kinds: {', '.join((*KINDS, LEARNED))}"
    )
    parser.add_argument("--out", type=Path, required=True, help="NAME.safetensors for a single file, else a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    add_dtype_argument(parser)
    options, config = parse(parser, arguments)
    method = parse_method(options.method)
    kind = method.pop("kind")
    check_out(options.out, options.overwrite)
    base, checkpoints = find_checkpoints(config)
    run_of = None
    if kind == LEARNED:
        kind, method, run_of = "mbw", *learned(method, checkpoints)
    if needs_base(kind, method):
        base = parse_base(config.base).open(COMPONENTS)  # of a model on the hub its U-Net is fetched only here
    for mismatch in mismatches(base, checkpoints):
        raise InputError(mismatch.message)
    # What becomes another dtype is rounded once, after the merge.
    exact = {name: rounded(own, "float32") if options.dtype else own for name, own in checkpoints.items()}
    whole = with_base(merge(kind, exact, base, method), base)
    check_parts(whole)
    print(
        f"{kind} of {', '.join(checkpoints)}; the base's {', '.join(part for part in BASES if part in base.components)}"
    )
    recipe: dict[str, Any] = dict(made="merge", kind=kind, options=method)
    recipe |= ingredients(config, base, checkpoints, needs_base(kind, method))
    recipe |= {} if run_of is None else dict(aggregators_sha256=aggregators_hash(run_of))
    write(options.out, bake(whole, (), options.dtype), recipe, overwrite=options.overwrite)


def learned(method: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint]) -> tuple[dict[str, Any], Path]:
    """The options of the merge mbw for ``learned_mbw``'s, and the folder of its run.

    Raises:
        InputError: no run is named, or not one of block weights of these experts.
    """
    options = dict(method)
    workdir = options.pop("workdir", None)
    if workdir is None:
        raise InputError(f"{LEARNED}: name the run, workdir=RUN")
    if "weights" in options:
        raise InputError(f"{LEARNED}: the weights are the run's; leave weights out, or choose mbw")
    folder = fetch_run(str(workdir))
    check_record(read_record(folder), record_of(checkpoints), str(folder))
    return options | dict(weights=load_block_weights(folder, checkpoints)), folder


def ingredients(
    config: ConfigDict, base: Checkpoint, checkpoints: Mapping[str, Checkpoint], based: bool
) -> dict[str, Any]:
    """What a merge was made of, for its recipe: experts with their entries and hashes, and what the base gave."""
    entries = {entry["name"]: dict(entry) for entry in config.experts}
    own = [
        dict(name=name, entry=entries[name], input=identity(entries[name]["path"], checkpoint, EXPERT))
        for name, checkpoint in checkpoints.items()
    ]
    return dict(experts=own, base=identity(parse_base(config.base).path, base, ("vae", *EXPERT) if based else ("vae",)))


if __name__ == "__main__":
    raise SystemExit(run(main))
