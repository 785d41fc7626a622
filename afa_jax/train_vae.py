"""Train an autoencoder: ``python -m afa_jax.train_vae --config configs/emoji_vae.py --workdir DIR``.

Stable Diffusion's own VAE is used as it is; this command makes the small one of the emoji default.
"""

from __future__ import annotations

from collections.abc import Sequence

from afa_jax.cli.arguments import add_workdir_arguments, check_workdir_arguments
from afa_jax.cli.commands import Parser, parse, run


def main(arguments: Sequence[str]) -> None:
    """Train and write ``workdir/model``, a diffusers folder with a VAE."""
    parser = Parser(prog="python -m afa_jax.train_vae", description=__doc__)
    add_workdir_arguments(parser)
    options, config = parse(parser, arguments, "an autoencoder")
    check_workdir_arguments(options)

    from afa_jax.training.vae import train_vae
    from afa_jax.training.workdir import resume_if_any

    resume_if_any(options)
    train_vae(
        config,
        options.workdir,
        resume=options.resume,
        resume_step=options.resume_step,
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
