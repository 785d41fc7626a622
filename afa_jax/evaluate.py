"""Is the ensemble worth it? ``python -m afa_jax.evaluate --config configs/emoji.py --workdir DIR``.

Makes pictures of the same prompts and seeds by every method that the config lists (its experts alone and inside the
ensemble, merges, other ways of combining, AFA and its ablations), measures them, and writes report.json and
report.html into ``--out``: figures with intervals over prompts, paired differences to the best expert, the best merge
and AFA, what each costs, curves over steps, and the pictures. Without any metric there are pictures, costs, and the
noise MSE where ``evaluation.noise`` has pairs. What is finished is not made again; a method that changed
makes its own. With ``--method`` or ``--prompts`` the report goes to ``part`` within ``--out``: the whole one stays.

torch (the published metrics) and JAX share a GPU: JAX takes memory as it needs it here, unless
XLA_PYTHON_CLIENT_PREALLOCATE says otherwise. The metrics' networks need about 12 GB there if all are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT, check_method, check_prompt_file, expert_names
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.config.method_options import check_entry, check_values
from afa_jax.errors import InputError
from afa_jax.files import COMPARISON, check_file, check_folder


def main(arguments: Sequence[str]) -> None:
    """Make, measure, compare, write."""
    parser = Parser(prog="python -m afa_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a trained run, a folder or a hub id, for methods that name none")
    parser.add_argument("--out", type=Path, help="folder of pictures and report (default: WORKDIR/evaluation)")
    parser.add_argument("--method", action="append", metavar="NAME|KIND[,OPTION=VALUE]...", help="only these methods")
    parser.add_argument("--prompts", type=COUNT, help="only so many prompts, of all groups alike")
    parser.add_argument(
        "--pictures_only",
        action="store_true",
        help="make pictures, no report: to share the work, start one process for each --method",
    )
    options, config = parse(parser, arguments)
    if "evaluation" not in config:
        raise InputError("the config has no evaluation; configs/emoji.py and configs/sd15.py show what it says")
    if options.out is None and options.workdir is None:
        raise InputError("--out is missing; without --workdir there is no folder for the report")
    out = options.out or options.workdir / "evaluation"
    check_folder(out)
    _check_place(out, out / "part" if options.method or options.prompts else out)
    for method in options.method or ():
        check_method(method, config)
    for entry in config.evaluation.get("methods", ()):
        check_values(check_entry(entry), expert_names(config))

    prompts = config.evaluation.prompts
    if prompts.kind == "file" and prompts.get("path"):
        check_prompt_file(Path(prompts.path), "evaluation.prompts.path")

    from afa_jax.evaluation.comparison.main_metric import check_metrics  # numpy, and not JAX yet

    check_metrics(config.evaluation)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first needs the device

    from afa_jax.evaluation.comparison.evaluate import evaluate

    evaluate(
        config,
        out,
        workdir=options.workdir,
        methods=options.method,
        prompts=options.prompts,
        pictures_only=options.pictures_only,
    )


def _check_place(out: Path, place: Path) -> None:
    """Raise InputError for a folder with files of the names that are written there, but of no comparison."""
    COMPARISON.check(place / "report.json")
    if not os.path.lexists(place / "report.json") and not (out / "pictures").is_dir():
        for name in ("report.html", "grid.png"):
            check_file(place / name)


if __name__ == "__main__":
    raise SystemExit(run(main))
