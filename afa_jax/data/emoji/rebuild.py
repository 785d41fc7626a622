"""Make the emoji pictures anew from their npm packages.

    python -m afa_jax.data.emoji.rebuild --out DIR

It needs npm and a registry within reach, and takes about a minute. Two runs give the same pictures.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds

from afa_jax.data.emoji.builder import EmojiPictures
from afa_jax.data.emoji.vocabulary import Vocabulary, read_vocabulary


def install_packages(packages: list[str], folder: Path) -> Path:
    """Install npm packages ("name@version") below `folder`; return the folder that holds them.

    Raises:
        RuntimeError: if npm is missing or fails, with what it said.
    """
    if (npm := shutil.which("npm")) is None:
        raise RuntimeError("npm was not found; install Node.js, it fetches the packages of emoji")
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm could not install {', '.join(packages)}:\n{done.stderr}")
    return folder / "node_modules"


def build(packages: Path, out: Path, vocabulary: Vocabulary) -> Path:
    """Render the pictures of the unpacked `packages` into `out`/emoji_pictures/1.0.0, which it returns.

    Raises:
        FileExistsError: if that folder is there already.
    """
    builder = EmojiPictures(vocabulary=vocabulary, data_dir=out, file_format="array_record")
    if Path(builder.data_path).exists():
        raise FileExistsError(f"{builder.data_path} exists; remove it, or give another --out")
    with tempfile.TemporaryDirectory() as downloads:
        config = tfds.download.DownloadConfig(manual_dir=packages)
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    return Path(builder.data_path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write emoji_pictures/1.0.0 into")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = read_vocabulary()
        packages = install_packages([f"{style.package}@{style.version}" for style in vocabulary.styles], Path(folder))
        print(f"wrote {build(packages, out, vocabulary)}")


if __name__ == "__main__":
    main()
