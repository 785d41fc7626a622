"""Train the judge's heads and write judge.safetensors.

    python -m afa_jax.evaluation.emoji.train_judge --out DIR

Needs npm and a registry it can reach, and resvg_py (requirements-dev.txt). Takes about three minutes on one core of a
CPU; two runs on one machine give the same file. To put it into use, move it to afa_jax/evaluation/judge.safetensors.

Pictures: every subject in the six STYLES below for the subject head, in the experts' four for the style head. Several
are not free enough to be shipped with this project (share-alike); they are fetched, and only the heads are kept. Each
picture is drawn CROPS times into a place of a scene, at another size and shift, and mirrored, turned, blurred, made
noisy, compressed or (for the subject head) recoloured, so that the judge minds neither another drawing of a subject
nor what an autoencoder does to it.

Heads: linear discriminant analysis with a covariance shrunk towards a multiple of one, in float64. The covariance
within a subject, over styles and crops, is what tells the head to look at what its drawings share.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter

from afa_jax.data.emoji.builder import renderer
from afa_jax.data.emoji.rebuild import install_packages
from afa_jax.data.emoji.scenes import PLACE, SIZES, evaluation_prompts, load_pictures
from afa_jax.data.emoji.vocabulary import Style, Subject, read_vocabulary
from afa_jax.evaluation.emoji.features import SIZE, load_features
from afa_jax.evaluation.emoji.judge import WEIGHTS, ceiling, floor, layers_of, load_judge
from afa_jax.files import check_file
from afa_jax.weights.tensors import write_tensors

NAMES = "@iconify-json/noto@1.2.9"  # its chars.json gives each codepoint's modern name
STYLES = tuple(
    Style(name=name, package=f"@iconify-json/{package}", version=version, licence=licence, attribution=attribution)
    for name, package, version, licence, attribution in (
        ("openmoji", "openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji, https://openmoji.org"),
        ("emojione", "emojione", "1.2.3", "CC-BY-4.0", "EmojiTwo, https://github.com/EmojiTwo/emojitwo"),
        ("emojione v1", "emojione-v1", "1.2.3", "CC-BY-SA-4.0", "https://github.com/joypixels/emojione-legacy"),
        ("high contrast", "fluent-emoji-high-contrast", "1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
        ("flat", "fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
        ("fxemoji", "fxemoji", "1.2.2", "Apache-2.0", "Firefox OS Emoji, Mozilla"),
    )
)
# fxemoji's names of subjects that differ from both the name here and the one in Unicode.
FXEMOJI = {
    "chick": "frontfacingchick",
    "chili pepper": "chilipepper",
    "dragon": "dragonside",
    "gift": "present",
    "leopard": "leopardside",
    "magnifying glass": "leftmagnifyingglass",
    "rabbit": "bunny",
    "tower": "toykotower",
    "whale": "spurtingwhale",
}
CROPS = 6
PATCH = 8
KEPT = (24, 64)  # principal components of a patch's 192; 23 to 29 dB
SHRINKAGE = {"subject": 0.3, "style": 0.1}


def icon_name(subject: Subject, modern: str, icons: set[str], aliases: dict[str, str]) -> str | None:
    """Return a subject's icon in a package without codepoints, by its modern name, its Unicode name, or ours."""
    official = unicodedata.name(chr(int(subject.codepoint, 16)))
    known = {name.replace("-", ""): aliases.get(name, name) for name in itertools.chain(aliases, icons)}
    for name in (modern, official, subject.name, FXEMOJI.get(subject.name, "")):
        if icon := known.get(name.lower().replace(" ", "").replace("-", "")):
            return icon
    return None


def complete_names(packages: Path, style: Style) -> list[Subject]:
    """Return the subjects that a style's package draws; fill in an empty chars.json for the renderer."""
    subjects = read_vocabulary().subjects
    folder = packages / style.package
    path = folder / "chars.json"
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    names = json.loads(path.read_text(encoding="utf-8"))
    if not names:
        modern = json.loads((packages / NAMES.rpartition("@")[0] / "chars.json").read_text(encoding="utf-8"))
        # An alias with more fields than a parent is turned or mirrored.
        aliases = {
            name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if set(alias) == {"parent"}
        }
        for subject in subjects:
            if name := icon_name(subject, modern[subject.codepoint], set(icons["icons"]), aliases):
                names[subject.codepoint] = name
        path.write_text(json.dumps(names), encoding="utf-8")
    return [subject for subject in subjects if names.get(subject.codepoint) in icons["icons"]]


def draw(packages: Path) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Yield every subject's number and picture in each of STYLES that has it."""
    numbers = {subject.name: i for i, subject in enumerate(read_vocabulary().subjects)}
    for style in STYLES:
        subjects = complete_names(packages, style)
        print(f"{style.name}: {len(subjects)} subjects")
        render = renderer(packages, style)
        for subject in subjects:
            yield numbers[subject.name], render(subject.codepoint)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """An imitation of an autoencoder's loss: it reduces the patches of a place to their first principal components.

    The columns of components [192, 192] are the components, the first one first; mean [192] is the mean of all patches.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def of(cls, pictures: UInt8[np.ndarray, "b h w 3"]) -> Bottleneck:
        """Compute the components of these pictures, each resized to a whole place."""
        places = [Image.fromarray(picture).resize((PLACE, PLACE), Image.Resampling.LANCZOS) for picture in pictures]
        rows = np.concatenate([_patches(np.asarray(place, np.float64)) for place in places])
        return cls(rows.mean(0), np.linalg.eigh(np.cov(rows, rowvar=False))[1][:, ::-1])

    def __call__(self, place: Float[np.ndarray, "32 32 3"], kept: int, x: int, y: int) -> Float[np.ndarray, "32 32 3"]:
        """Rebuild a place from ``kept`` components, with the corner of its patches at (x, y)."""
        basis = self.components[:, :kept]
        rows = (_patches(np.roll(place, (-y, -x), (0, 1))) - self.mean) @ basis @ basis.T + self.mean
        count = PLACE // PATCH
        grid = rows.reshape(count, count, PATCH, PATCH, 3).swapaxes(1, 2).reshape(PLACE, PLACE, 3)
        return np.roll(grid, (y, x), (0, 1))


def _patches(place: Float[np.ndarray, "32 32 3"]) -> Float[np.ndarray, "16 192"]:
    count = PLACE // PATCH
    return place.reshape(count, PATCH, count, PATCH, 3).swapaxes(1, 2).reshape(count**2, PATCH * PATCH * 3)


def crop(
    picture: UInt8[np.ndarray, "h w 3"], random: np.random.Generator, bottleneck: Bottleneck, *, recolour: bool
) -> UInt8[np.ndarray, "32 32 3"]:
    """Return a picture in a place of a scene, changed at random; its colours change only if ``recolour``."""
    image = Image.fromarray(picture)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.5:
        image = image.rotate(random.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor="white")
    size = int(random.choice(SIZES))
    x, y = (int(offset) for offset in random.integers(0, PLACE - size + 1, 2))
    place = Image.new("RGB", (PLACE, PLACE), "white")
    place.paste(image.resize((size, size), Image.Resampling.LANCZOS), (x, y))
    if random.random() < 0.3:
        place = place.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1)))
    pixels = np.asarray(place, np.float64)
    way = random.random() if recolour else 1
    if way < 0.25:  # paler, down to grey
        grey = pixels.mean(-1, keepdims=True)
        pixels = grey + (pixels - grey) * random.random()
    elif way < 0.5:  # channels mixed; white stays white
        mix = 0.8 * np.eye(3) + 0.2 * random.random((3, 3))
        pixels = pixels @ (mix / mix.sum(1, keepdims=True)).T
    if random.random() < 0.4:
        pixels = bottleneck(pixels, int(random.integers(*KEPT)), *(int(n) for n in random.integers(0, PATCH, 2)))
    if random.random() < 0.4:
        pixels = pixels + random.uniform(2, 12) * random.standard_normal(pixels.shape)
    return np.round(pixels.clip(0, 255)).astype(np.uint8)


def discriminant(
    rows: Float[np.ndarray, "b d"], classes: Int[np.ndarray, " b"], count: int, shrinkage: float
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Fit a linear discriminant for the classes 0..count-1, all equally likely; return kernel and bias."""
    x = rows.astype(np.float64)
    centre, spread = x.mean(0), x.std(0) + 1e-3
    x = (x - centre) / spread
    means = np.stack([x[classes == i].mean(0) for i in range(count)])
    apart = x - means[classes]
    covariance = apart.T @ apart / len(x)
    level = np.trace(covariance) / len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * level * np.eye(len(covariance))
    kernel = np.linalg.solve(covariance, means.T)
    bias = -0.5 * (means.T * kernel).sum(0)
    kernel /= spread[:, None]
    return kernel, bias - centre @ kernel


def train(packages: Path, out: Path) -> None:
    """Train both heads and write them to ``out``."""
    vocabulary, net = read_vocabulary(), load_features()
    pictures = load_pictures()
    styles = len(vocabulary.styles)
    bottleneck = Bottleneck.of(pictures.images.reshape(-1, *pictures.images.shape[2:]))
    tasks = {
        "subject": (list(draw(packages)), len(vocabulary.subjects)),
        "style": ([(i, of_subject[i]) for of_subject in pictures.images for i in range(styles)], styles),
    }
    tensors: dict[str, np.ndarray] = {}
    for seed, (head, (drawn, count)) in enumerate(tasks.items()):
        random = np.random.default_rng(seed)
        places = np.stack(
            [
                crop(picture, random, bottleneck, recolour=head == "subject")
                for _, picture in drawn
                for _ in range(CROPS)
            ]
        )
        classes = np.repeat([number for number, _ in drawn], CROPS)
        start, cpu = time.perf_counter(), time.process_time()
        rows = layers_of(net, places)
        print(
            f"{head}: {len(places)} crops of {len(drawn)} pictures, features in "
            f"{time.perf_counter() - start:.0f} s ({time.process_time() - cpu:.0f} CPU seconds)",
            flush=True,
        )
        kernel, bias = discriminant(rows, classes, count, SHRINKAGE[head])
        tensors |= {f"{head}.kernel": kernel.astype(np.float32), f"{head}.bias": bias.astype(np.float32)}
    metadata = {
        "subject": json.dumps([subject.name for subject in vocabulary.subjects]),
        "style": json.dumps([style.name for style in vocabulary.styles]),
        "size": str(SIZE),
        "trained_on": "; ".join(f"{s.package} {s.version}, {s.licence}, {s.attribution}" for s in STYLES),
    }
    write_tensors(out, tensors, metadata)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write {WEIGHTS.name} into")
    out = parser.parse_args().out / WEIGHTS.name
    check_file(out)
    with tempfile.TemporaryDirectory() as folder:
        packages = install_packages([NAMES, *(f"{style.package}@{style.version}" for style in STYLES)], Path(folder))
        train(packages, out)
    print(f"wrote {out}, {out.stat().st_size:,} bytes; on real scenes of the experts' styles:")
    judge = load_judge(out)
    for kind in (*read_vocabulary().topics, "mixed"):
        prompts = evaluation_prompts(kind, 100)
        for what, result in (
            ("ceiling", ceiling(judge, prompts, crops=1)),
            ("floor", floor(judge, prompts, crops=1)),
        ):
            print(f"{kind} {what}:", *(f"{name} {value:.3f}" for name, value in result.items() if "/" not in name))


if __name__ == "__main__":
    main()
