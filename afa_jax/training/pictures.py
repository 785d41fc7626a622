"""The training pictures of one model, few enough that their latents are kept in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afa_jax.data.sources import BadExample, PictureSource
from afa_jax.data.transform import Crop
from afa_jax.errors import InputError
from afa_jax.mesh.collectives import DATA
from afa_jax.mesh.parallel import place
from afa_jax.mesh.processes import is_process_0
from afa_jax.models.vae import VAE, to_images
from afa_jax.progress import progress
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

AT_ONCE = 64  # the most pictures that are encoded together
PIXELS_AT_ONCE = AT_ONCE * 32 * 64  # the most pixels that are encoded together; of larger pictures fewer are
MOST = 1_000_000  # pictures whose latents are kept


def check_count(wanted: int, source: PictureSource) -> None:
    """Raise InputError unless a source has ``wanted`` pictures, or, for 0, few enough to take them all."""
    if wanted > len(source):
        raise InputError(f"scenes={wanted}, but data has {len(source)} pictures; choose fewer, or 0 for all")
    if not wanted and len(source) > MOST:
        raise InputError(f"data has {len(source):,} pictures, whose latents are kept in memory; set scenes to fewer")


def encode_scenes(
    source: PictureSource,
    count: int,
    vae: VAE,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    crop: Crop | None = None,
    bad: str = "error",
) -> dict[str, np.ndarray]:
    """Return latents and token ids of the first ``count`` pictures, ``[count, ...]``, so that training needs no VAE.

    Args:
        count: the number of pictures; 0 takes all that can be read.
        crop: the crop to one size, always the same for each picture; None takes pictures of one size as they are.
        bad: "skip" leaves out pictures that cannot be read.

    Raises:
        InputError: too few pictures can be read, or one cannot be read and bad ones are not skipped.
    """
    vae = place(vae, mesh, PartitionSpec())
    # Every process needs all pictures, because a batch may have any of them.
    encode = jax.jit(
        lambda vae, pixels: vae.encode(to_images(pixels)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    latents: list[np.ndarray] = []
    captions: list[str] = []
    examples = _readable(source, crop, bad == "skip")
    wanted = count or len(source)
    begun = list(itertools.islice(examples, 1))
    examples = itertools.chain(begun, examples)
    at_once = _at_once(begun[0][0], wanted, mesh.size) if begun else 1
    for begin in progress(range(0, wanted, at_once), desc="encoding scenes", quiet=not is_process_0()):
        scenes = list(itertools.islice(examples, min(at_once, wanted - begin)))
        if not scenes or (count and len(scenes) < min(at_once, wanted - begin)):
            if count or not captions:
                raise InputError(f"scenes={count}, but of data only {len(captions) + len(scenes)} pictures can be read")
            break
        captions += [caption for _, caption in scenes]
        images = np.stack([image for image, _ in scenes])
        filled = np.concatenate([images, np.repeat(images[-1:], at_once - len(images), 0)])  # one program for all
        pixels = place(filled, mesh, PartitionSpec(DATA))
        latents.append(np.asarray(encode(vae, pixels))[: len(images)])
    return dict(latents=np.concatenate(latents), ids=tokenizer(captions))


def _at_once(image: np.ndarray, wanted: int, devices: int) -> int:
    """Return how many pictures of this size are encoded together: equally many on each device, at least one."""
    fitting = min(AT_ONCE, PIXELS_AT_ONCE // (image.shape[0] * image.shape[1])) // devices
    return devices * max(1, min(fitting, -(-wanted // devices)))


def _readable(source: PictureSource, crop: Crop | None, skip: bool) -> Iterator[tuple[np.ndarray, str]]:
    for index in range(len(source)):
        try:
            example = source[index]
        except BadExample:
            if not skip:
                raise
            continue
        image = example["image"] if crop is None else crop(example["image"], np.random.default_rng((0, index)))
        yield image, example["caption"]
