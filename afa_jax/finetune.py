"""Train or fine-tune one model: ``python -m afa_jax.finetune --config configs/emoji_base.py --workdir DIR``.

It trains a U-Net and its text encoder by the ordinary latent-diffusion objective, as fine-tunes of Stable Diffusion are
made. The emoji models come from it: one base model trained on everything, then experts from it, each on its domain.
``timesteps=(low, high)`` in the config restricts training to noise levels ``low <= t < high``: experts along the time
axis (configs/emoji_time.py). ``init`` is a diffusers folder, a single file or a hub id; ``vae``, ``tokenizer`` and
``schedule`` are taken from it where the config names none. ``data`` is as in afa_jax.train, with ``size`` for pictures
that are not emoji scenes, and of any number. ``dtype``, ``remat`` and ``accumulate`` save memory;
configs/sd15_finetune.py, the fine-tune of Stable Diffusion 1.5, says how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from afa_jax.cli.arguments import add_workdir_arguments, check_workdir_arguments
from afa_jax.cli.commands import Parser, parse, run
from afa_jax.mesh import cluster


def main(arguments: Sequence[str]) -> None:
    """Train and write ``workdir/model``, a diffusers folder with the averaged weights in float16."""
    parser = Parser(prog="python -m afa_jax.finetune", description=__doc__)
    add_workdir_arguments(parser)
    cluster.add_arguments(parser)
    options, config = parse(parser, arguments, "one model")
    check_workdir_arguments(options, cluster.settings(options) is None)

    from afa_jax.mesh import processes as distributed
    from afa_jax.training.finetune import finetune
    from afa_jax.training.workdir import resume_if_any

    distributed.start(options)
    resume_if_any(options)
    finetune(
        config,
        options.workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
