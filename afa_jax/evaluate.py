"""Compare methods: ``python -m afa_jax.evaluate --config configs/emoji.py --workdir DIR``.

It makes pictures of the same prompts and seeds by every method that the config lists (its experts alone and inside the
ensemble, merges, other ways of combining, AFA and its ablations). It measures them, and writes report.json and
report.html into ``--out``: figures with intervals over prompts, paired differences to the best expert, the best merge
and AFA, the cost of each method, curves over steps, and the pictures. Without any metric the report has pictures,
costs, and the noise MSE where ``evaluation.noise`` has pairs. Finished pictures are not made again; a method that
changed gets new ones. With ``--method`` or ``--prompts`` the report goes to ``part`` within ``--out``, and the whole
report stays.

torch (the published metrics) and JAX share a GPU. Here JAX allocates memory on demand, unless
XLA_PYTHON_CLIENT_PREALLOCATE is set. The networks of all metrics together need about 12 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> None:
    """Make the pictures, measure and compare them, and write the report."""
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
    Ensemble(config, workdir=options.workdir).evaluate(
        options.out, methods=options.method, prompts=options.prompts, pictures_only=options.pictures_only
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
