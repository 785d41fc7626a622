"""Compile a run ahead of time: does it fit its devices? ``python -m afa_jax.aot --config FILE ...``.

    python -m afa_jax.aot --config configs/sd15.py --topology v5e:2x4
    python -m afa_jax.aot --config configs/sd15.py --topology v5p:2x2x1 --mode sample --architecture sd15 --experts 6
    python -m afa_jax.aot --config configs/emoji.py --devices 8 --config.mesh.expert=2

It compiles the real training step or sampler for a TPU slice that need not exist (pip install -r requirements-aot.txt)
or for a number of virtual CPU devices. It reads no weights and runs nothing. It prints what a device holds, computes
and exchanges, and whether that fits. If it does not fit, it names the setting to change and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.arguments import whole
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.config.schema import require
from afa_jax.errors import InputError
from afa_jax.files import FITTING
from afa_jax.names import ARCHITECTURES
from afa_jax.scale.chips import CHIPS, slice_devices

MODES = ("train", "sample")


def main(arguments: Sequence[str]) -> int:
    """Compile, report, judge."""
    parser = Parser(prog="python -m afa_jax.aot", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    examples = ", ".join(chip.topology for chip in CHIPS.values())
    where.add_argument("--topology", metavar="NAME", help=f"a TPU slice: {examples}, ...")
    where.add_argument("--devices", type=whole(1, 4096), metavar="N", help="virtual CPU devices instead")
    parser.add_argument("--slices", type=whole(1, 4096), default=1, metavar="K", help="slices, joined by the network")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, help="sd15: Stable Diffusion 1.5's, whatever the experts are"
    )
    parser.add_argument("--experts", type=whole(1, 1000), metavar="N", help="as if the config had N experts")
    parser.add_argument(
        "--quick", action="store_true", help="a fifth of the compiler's work; memory differs by some per cent"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is printed there")
    options, config = parse(parser, arguments)
    if options.mode == "train":
        require(config, "data")
    if options.devices and options.slices > 1:
        raise InputError("--slices goes with --topology")

    if options.json:
        FITTING.check(options.json)

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no other device need be looked for

    from afa_jax.scale.fit import check, cpu_devices

    devices = cpu_devices(options.devices) if options.devices else slice_devices(options.topology, options.slices)
    return check(
        config,
        options.mode,
        devices,
        architecture=options.architecture,
        experts=options.experts,
        quick=options.quick,
        output=options.json,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
