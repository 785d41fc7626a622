"""Report on a run or a comparison: ``python -m afa_jax.report --workdir runs/emoji --out run.html``.

The page is self-contained and shows a workdir of ``afa_jax.train``, while it runs or afterwards: loss, validation by
timestep, norms, speed, entropy of the maps, each expert's weight by site and timestep, and the sampled grids.

``python -m afa_jax.report --into README.md [--table report.json] [--check]`` writes the tables of what
``afa_jax.evaluate`` measured into Markdown files, between the lines ``<!-- table: report.json -->`` and
``<!-- end table -->``; afa_jax/report/readme.py says which table.

``python -m afa_jax.report --sheet runs/emoji/evaluation --out sheet.png [--method NAME ...] [--prompts N]`` draws the
pictures of a comparison, a row for each method and a column for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT
from afa_jax.cli.commands import Parser, run
from afa_jax.files import PAGE, SHEET


def main(arguments: Sequence[str]) -> int:
    """Write the page, the tables or the sheet."""
    parser = Parser(prog="python -m afa_jax.report", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a run of afa_jax.train")
    parser.add_argument("--out", type=Path, help="the run's page (.html) or the sheet (.png); replaces an earlier one")
    parser.add_argument("--into", type=Path, nargs="+", metavar="FILE", help="Markdown files whose tables are written")
    parser.add_argument("--table", type=Path, metavar="REPORT", help="with --into: only the tables of this report.json")
    parser.add_argument("--check", action="store_true", help="with --into: write nothing, 1 if a table is out of date")
    parser.add_argument("--sheet", type=Path, metavar="DIR", help="a comparison: the --out of afa_jax.evaluate")
    parser.add_argument("--method", nargs="+", action="extend", default=[], metavar="NAME", help="the sheet's rows")
    parser.add_argument("--prompts", type=COUNT, metavar="N", help="the sheet's columns (default: all of the examples)")
    options = parser.parse_args(list(arguments))
    page, sheet = options.workdir and options.out, options.sheet and options.out
    if not (options.into or sheet or page):
        parser.error("name --workdir and --out for a run's page, --sheet and --out for pictures, or --into for tables")

    if options.out:
        (SHEET if sheet else PAGE).check(options.out)

    from afa_jax.evaluation.comparison.sheet import write_sheet
    from afa_jax.report.run_page import write_run_page, write_tables

    if options.into:
        return write_tables(options.into, options.table, options.check)
    if sheet:
        write_sheet(options.sheet, options.method, options.prompts, options.out)
    else:
        write_run_page(options.workdir, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
