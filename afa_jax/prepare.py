"""Make a data set with random access from downloaded pictures, once and without tensorflow.

    python -m afa_jax.prepare --builder journeydb --from JourneyDB --out data

Then ``data=dict(kind="tfds", name="journeydb", data_dir="data", split="train[:10000]", size=(512, 512))`` in a config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from afa_jax.cli.commands import Parser, run
from afa_jax.errors import InputError, printable
from afa_jax.files import check_folder

NAMED = 20  # the most names of left-out examples that are printed


def main(arguments: Sequence[str]) -> None:
    """Write ``OUT/<data set>/1.0.0``, and print the number of its pictures and the names of those left out."""
    parser = Parser(prog="python -m afa_jax.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--builder", required=True, choices=("journeydb", "coco", "folder"))
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="what was downloaded, unpacked")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that holds data sets")
    parser.add_argument("--text", default="", help="journeydb: prompt (default) or caption; folder: its list's column")
    parser.add_argument("--max_pixels", type=int, metavar="N", help="leave out larger pictures (default: 64 million)")
    options = parser.parse_args(list(arguments))
    check_folder(options.out)
    if "://" not in options.source and not Path(options.source).is_dir():
        raise InputError(f"--from {options.source}: no such folder; unpack what was downloaded, and name its folder")

    import tensorflow_datasets as tfds  # takes a second

    from afa_jax.data import builders
    from afa_jax.data.decode import MAX_PIXELS

    choices = dict(journeydb=builders.JourneyDB, coco=builders.CocoCaptions, folder=builders.CaptionedFolderPictures)
    max_pixels = MAX_PIXELS if options.max_pixels is None else options.max_pixels
    builder = choices[options.builder](
        source=options.source, text=options.text, max_pixels=max_pixels, data_dir=options.out
    )
    out = Path(builder.data_dir)
    if out.exists():
        raise InputError(f"{out} exists; remove it, or give another --out")
    with tempfile.TemporaryDirectory() as downloads:
        try:
            builder.download_and_prepare(
                download_dir=downloads, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except AssertionError as error:  # TFDS's for a split without examples
            raise InputError(f"{options.source}: a split has no readable picture with a caption ({error})") from error
    splits = ", ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
    print(f"{out}: {splits}")
    if bad := builder.left_out:
        named = ", ".join(printable(f"{error.name} ({error.reason})", 300) for error in bad[:NAMED])
        print(f"left out {len(bad)} of {len(bad) + builder.taken}: {named}{', ...' if len(bad) > NAMED else ''}")


if __name__ == "__main__":
    raise SystemExit(run(main))
