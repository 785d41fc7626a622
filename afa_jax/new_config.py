r"""A config for your own checkpoints and pictures: ``python -m afa_jax.new_config NAME --base B --expert N=PATH ...``.

    python -m afa_jax.new_config mine --base models/base --expert photo=photo.safetensors --expert anime=owner/anime \
        --data pictures

writes mine.py, short and complete, and with --data mine_prompts.txt, captions to evaluate with. A model is a diffusers
folder, a single file or a hub id; pictures are a folder with captions, or .tar or .parquet files. The command first
checks whether the experts fit together, which sizes suit them, and how many pictures there are. It replaces no file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import add_size_arguments, size_of
from afa_jax.cli.commands import Parser, run
from afa_jax.errors import InputError
from afa_jax.experts.specs import parse_argument
from afa_jax.files import check_file
from afa_jax.weights.formats.hub_ids import check_named


def main(arguments: Sequence[str]) -> None:
    """Inspect the models and the pictures, write the config, and print the next commands."""
    parser = Parser(prog="python -m afa_jax.new_config", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of the config: letters, digits, - and _")
    parser.add_argument("--base", required=True, metavar="MODEL", help="whose VAE, tokenizer and schedule are taken")
    parser.add_argument(
        "--expert",
        action="append",
        required=True,
        metavar="NAME=PATH[,lora=PATH:WEIGHT][,FIELD=VALUE]",
        help="repeat it for each; fields: dtype, revision, variant, prediction_type, ema",
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder or hub id, for a base without one (single files)")
    parser.add_argument("--data", metavar="FOLDER|FILES", help="captioned pictures; without, the config only samples")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="to evaluate with (default: captions of --data)")
    add_size_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to (default: NAME.py)")
    options = parser.parse_args(list(arguments))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", options.name):
        raise InputError(f"{options.name!r}: a config's name has letters, digits, - and _; choose such a one")
    out = options.out or Path(f"{options.name}.py")
    if out.suffix != ".py":
        raise InputError(f"--out {out}: a config is a Python file; end it in .py")
    check_file(out)
    if options.prompts is not None and not options.prompts.is_file():
        raise InputError(f"--prompts {options.prompts}: no such file; name one with a prompt a line")
    for option in ("base", "tokenizer", "data"):
        if getattr(options, option) is not None and not getattr(options, option).strip():
            raise InputError(f"--{option} is empty; name a file or folder")
    experts = [parse_argument(expert) for expert in options.expert]
    check_named(options.base)
    for expert in experts:
        check_named(expert["path"], expert.get("revision"))
        for lora, _ in expert.get("loras", ()):
            check_named(lora)
    if options.tokenizer is not None:
        check_named(options.tokenizer)
    if options.data is not None and not re.search(r"://|[*?\[{]", options.data) and not Path(options.data).exists():
        raise InputError(f"--data {options.data}: no such folder or file; name captioned pictures")
    size = size_of(options, options.base)

    from afa_jax.exporting.new_config import write_config

    write_config(
        options.name,
        out,
        base=dict(path=options.base, tokenizer=options.tokenizer) if options.tokenizer else options.base,
        experts=experts,
        data=options.data,
        prompts=options.prompts,
        size=size,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
