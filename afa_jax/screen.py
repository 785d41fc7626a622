"""Screen experts before training: ``python -m afa_jax.screen --config configs/emoji.py``.

It says whether the experts can be fused at all (prediction type, noise schedule, architecture), whether two of them are
one model under two names (weights by block), and whether routing between them can be learnt: the cross-noise routing
gain of afa_jax/evaluation/screen.py on held-out pairs. The last line is the verdict. The exit status is 3 for a clear
no, and 0 for yes and for undecided.

Held-out pairs are emoji scenes of a seed that nothing trains on; for any other data, a hash of --seed chooses the
examples. No aggregator has been trained yet and the experts are frozen, so any pairs will do on which no expert was
fine-tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import COUNT, SEED
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.errors import printable
from afa_jax.pipeline import Ensemble


def main(arguments: Sequence[str]) -> int:
    """Screen the experts of a config, print tables and the verdict; 3 if training is clearly not worth it."""
    parser = Parser(prog="python -m afa_jax.screen", description=__doc__)
    parser.add_argument("--pairs", type=COUNT, default=64, help="held-out pictures with captions")
    parser.add_argument("--draws", type=COUNT, default=4, help="of noise for each pair and timestep")
    parser.add_argument("--seed", type=SEED, default=0, help="of pairs, timesteps, noise and intervals")
    parser.add_argument("--out", type=Path, help="JSON file with all figures")
    options, config = parse(parser, arguments)
    found = Ensemble(config).screen(
        pairs=options.pairs, draws=options.draws, seed=options.seed, out=options.out, quiet=False
    )
    print(f"\nverdict: {printable(found.verdict)}")
    return 3 if found.answer == "no" else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
