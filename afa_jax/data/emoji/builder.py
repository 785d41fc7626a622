"""TFDS builder of the emoji pictures: icons out of npm packages, rendered to 64 x 64 pixels on white.

The result lies next to this file (emoji_pictures/1.0.0, array_record) and is read without tensorflow:

    tfds.builder_from_directory(folder).as_data_source("train")

`python -m afa_jax.data.emoji.rebuild` makes it anew.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from afa_jax.data.emoji.vocabulary import HERE, Style, Vocabulary, read_vocabulary

SIZE = 64
DATA_DIR = HERE / "emoji_pictures" / "1.0.0"


class EmojiPictures(tfds.core.GeneratorBasedBuilder):
    """One picture of each subject in each style, in the vocabulary's order.

    Its source is a folder of unpacked npm packages, laid out like node_modules, given as TFDS' manual_dir.

    Args:
        vocabulary: the subjects and styles; the project's own by default.
        **kwargs: the arguments of tfds.core.GeneratorBasedBuilder, such as data_dir and file_format.
    """

    name = "emoji_pictures"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "180 subjects of three topics in four styles."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is a folder of npm packages, as `npm install` fills node_modules; vocabulary.json names them. "
        "`python -m afa_jax.data.emoji.rebuild` does all of it."
    )

    def __init__(self, *, vocabulary: Vocabulary | None = None, **kwargs: Any):
        self.vocabulary = vocabulary or read_vocabulary()
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        styles = "; ".join(f"{style.name}: {style.attribution} ({style.licence})" for style in self.vocabulary.styles)
        return self.dataset_info_from_configs(
            description=f"Emoji, {SIZE} x {SIZE} pixels on white, each subject in several drawing styles. {styles}.",
            license="One for each style, see LICENSES.md",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), doc="lossless WebP"),
                    "subject": tfds.features.Text(doc="what captions call it"),
                    "topic": tfds.features.Text(),
                    "style": tfds.features.Text(),
                    "codepoint": tfds.features.Text(doc="hexadecimal, without the variation selector"),
                }
            ),
            disable_shuffling=True,  # the vocabulary's order
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, packages: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        renderers = {style.name: renderer(packages, style) for style in self.vocabulary.styles}
        key = 0
        for subject in self.vocabulary.subjects:
            for style, render in renderers.items():
                yield (
                    key,
                    {
                        # As a file object: TFDS keeps its bytes as they are and needs no tensorflow to encode them.
                        "image": io.BytesIO(encode(render(subject.codepoint))),
                        "subject": subject.name,
                        "topic": subject.topic,
                        "style": style,
                        "codepoint": subject.codepoint,
                    },
                )
                key += 1


def renderer(packages: Path, style: Style) -> Callable[[str], np.ndarray]:
    """Return a function from a codepoint to its picture, uint8 [SIZE, SIZE, 3], for the package of one style.

    Two kinds of packages are known: Iconify's (icons.json with SVG bodies) and a folder assets/ of WebP files.

    Raises:
        FileNotFoundError: if the package, or (when called) the codepoint's picture, is not there.
        ValueError: if the package has another version than the vocabulary names.
        KeyError: when called with a codepoint that the package does not draw.
    """
    folder = packages / style.package
    if not (folder / "package.json").is_file():
        raise FileNotFoundError(f"style {style.name!r}: no package {style.package} in {packages}; npm install it there")
    found = _read_json(folder / "package.json")["version"]
    if found != style.version:
        raise ValueError(f"style {style.name!r}: {style.package} is {found}, vocabulary.json asks for {style.version}")
    if not (folder / "icons.json").is_file():
        return lambda codepoint: _render_file(folder / "assets", codepoint)

    icons = _read_json(folder / "icons.json")
    names = _read_json(packages / (style.names or style.package) / "chars.json")

    def render(codepoint: str) -> np.ndarray:
        name = names.get(codepoint)
        icon = icons["icons"].get(name)
        if icon is None:
            raise KeyError(f"style {style.name!r}: {style.package} has no icon {name!r} for codepoint {codepoint}")
        return _render_svg(icon["body"], icon.get("width", icons["width"]), icon.get("height", icons["height"]))

    return render


def encode(picture: np.ndarray) -> bytes:
    """Encode a picture, uint8 [h, w, 3], as lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "webp", lossless=True, method=4)
    return buffer.getvalue()


def _render_svg(body: str, width: int, height: int) -> np.ndarray:
    import resvg_py  # only needed to rebuild the pictures

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )
    # The fonts of this machine must not matter.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png)), formats=("PNG",)))


def _render_file(folder: Path, codepoint: str) -> np.ndarray:
    for path in (folder / f"{codepoint}.webp", folder / f"{codepoint}-fe0f.webp"):
        if path.is_file():
            return _on_white(Image.open(path, formats=("WEBP",)))
    raise FileNotFoundError(f"no {codepoint}.webp or {codepoint}-fe0f.webp in {folder}")


def _on_white(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
