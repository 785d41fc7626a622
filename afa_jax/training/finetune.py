"""Train or fine-tune one model: the ordinary latent-diffusion objective on a U-Net and its text encoder."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from afa_jax.data.loader import loading
from afa_jax.data.pictures import to_images
from afa_jax.data.sources import BadExample, PictureSource, make_source
from afa_jax.data.text import Tokenizer
from afa_jax.data.transform import Crop
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.distributed import compiled_together, fetch, first, on_first, say
from afa_jax.errors import InputError
from afa_jax.models.attention import Attention
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.parallel import DATA, make_mesh, place
from afa_jax.progress import progress
from afa_jax.records import plain, recorded
from afa_jax.training.data import check_identity
from afa_jax.training.loop import run_loop
from afa_jax.training.loss import diffusion_loss, drop_captions
from afa_jax.training.optimizer import check_objective, check_optimizer, make_optimizer, update_average
from afa_jax.training.workdir import check_positive, check_workdir, keep_config, open_workdir, write_config
from afa_jax.weights.checkpoint import hash_components
from afa_jax.weights.compare import EXPERT
from afa_jax.weights.folders import save_folder
from afa_jax.weights.keys import flatten, unflatten
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae, open_checkpoint

Model = tuple[UNet, TextEncoder]
ENCODED_AT_ONCE = 64
MOST = 1_000_000  # pictures whose latents are kept


def finetune(
    config: ConfigDict,
    workdir: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
) -> None:
    """Train and write ``workdir/model``, a diffusers folder with the averaged weights in float16.

    Raises:
        InputError: something of the config, its models, its data or the workdir cannot be used.
        Stopped: by SIGTERM or SIGINT, after saving.
    """
    check_workdir(workdir, resume=resume, overwrite=overwrite)
    check_positive(config, "steps", "batch", "log_every", "save_every")
    check_optimizer(config.optimizer)
    check_objective(config)
    recorded(config)  # which can be kept
    trained_by = f"afa_jax.finetune, {config.name}, {config.steps} steps of {config.batch}"
    vae = load_vae(config.vae)
    schedule = NoiseSchedule.from_json(config.schedule.to_dict())
    timesteps = interval(config.get("timesteps"), schedule)
    if config.init:
        model: Model = (load_unet(config.init), load_text_encoder(config.init))
    else:
        rngs = nnx.Rngs(config.seed)
        model = (
            UNet(UNetConfig(**config.unet), rngs=rngs),
            TextEncoder(TextConfig(**config.text_encoder), rngs=rngs),
        )
        make_text_audible(*model)
    tokenizer = Tokenizer(config.tokenizer, model[1].config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    no_caption = jnp.asarray(tokenizer([""])[0])

    # Flat dictionaries: a tree of modules takes Python 12 ms to take apart and put together, at every step, four times.
    shapes = jax.eval_shape(lambda: model)
    params = flatten(model)

    def loss_of(params: dict[str, jax.Array], latents: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
        unet, text_encoder = unflatten(shapes, params)
        drop_keys, loss_keys = jax.random.split(key, (2, len(ids)))
        states = text_encoder(drop_captions(ids, no_caption, config.caption_dropout, drop_keys))
        return diffusion_loss(
            lambda x, t: unet(x, t, states),
            schedule,
            latents,
            loss_keys,
            min_snr_gamma=config.min_snr_gamma,
            timesteps=timesteps,
        )

    @jax.jit
    def train_step(
        state: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        loss, gradient = jax.value_and_grad(loss_of)(state["params"], batch["latents"], batch["ids"], key)
        updates, opt = optimizer.update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = update_average(state["average"], params, state["step"], config.ema)
        new = dict(params=params, average=average, opt=opt, step=state["step"] + 1)
        return new, dict(loss=loss, gradient_norm=optax.tree.norm(gradient))

    mesh = make_mesh(dict(data=-1))
    if config.batch % mesh.size:
        raise InputError(f"batch={config.batch}; choose a multiple of {mesh.size}, the number of devices")
    data = ConfigDict(dict(kind="emoji") | config.data.to_dict())
    source, reading = make_source(data), loading(data)
    if config.scenes > len(source):
        raise InputError(f"scenes={config.scenes}, but data has {len(source)} pictures; choose fewer, or 0 for all")
    if not config.scenes and len(source) > MOST:
        raise InputError(f"data has {len(source):,} pictures, whose latents are kept in memory; set scenes to fewer")
    started = dict(
        init=hash_components(open_checkpoint(config.init), EXPERT) if config.init else "",
        data=source.fingerprint,
        loading=[data.get("size"), data.get("flip"), data.get("bad")],
        timesteps=timesteps,
        vae=hash_components(open_checkpoint(config.vae), ("vae",)),
        tokenizer=tokenizer.sha256,
        schedule=schedule.to_json(),
        **{name: config[name] for name in ("seed", "batch", "scenes", "caption_dropout", "min_snr_gamma", "ema")},
    )
    identity = plain(started, "the run")
    open_workdir(workdir, resume=resume, overwrite=overwrite)
    keep_config(workdir, config)

    def on_resume(facts: Mapping[str, Any]) -> None:
        check_identity(facts.get("data", {}), identity, f"the checkpoint in {workdir}")
        write_config(workdir, config)

    scenes = encode_scenes(source, config.scenes, vae, tokenizer, mesh, crop=reading["crop"], bad=reading["bad"])
    count = len(scenes["ids"])

    def batch_at(step: int) -> dict[str, jax.Array]:
        rows = np.arange(step * config.batch, (step + 1) * config.batch) % count
        return place({name: values[rows] for name, values in scenes.items()}, mesh, PartitionSpec(DATA))

    state = dict(params=params, average=params, opt=optimizer.init(params), step=jnp.zeros((), jnp.int32))
    state = run_loop(
        compiled_together(train_step),
        place(state, mesh, PartitionSpec()),
        lambda first: map(batch_at, itertools.count(first)),
        steps=config.steps,
        seed=config.seed,
        workdir=workdir,
        resume=resume,
        resume_step=resume_step,
        facts=dict(data=identity),
        on_resume=on_resume,
        log_every=config.log_every,
        save_every=config.save_every,
    )
    average, target = fetch(state["average"]), workdir / "model"

    def publish() -> None:
        unet, text_encoder = unflatten(shapes, average)
        shutil.rmtree(target, ignore_errors=True)  # of this very run, before it was resumed to more steps
        save_folder(
            target,
            unet=unet,
            vae=vae if config.with_vae else None,
            text_encoder=text_encoder,
            tokenizer=Path(config.tokenizer) / "tokenizer",
            scheduler=schedule.to_json(),
            dtype=jnp.float16,
            metadata=dict(trained_by=trained_by)
            | (dict(timesteps=f"{timesteps[0]} <= t < {timesteps[1]}") if timesteps else {}),
        )

    on_first(publish)
    say(target)


def interval(timesteps: Any, schedule: NoiseSchedule) -> tuple[int, int] | None:
    """The field ``timesteps`` of a config: ``(low, high)``, to learn ``low <= t < high`` only; None for all.

    Raises:
        InputError: not two timesteps of the schedule in this order.
    """
    if timesteps is None:
        return None
    total = schedule.num_train_timesteps
    match list(timesteps):
        case [int(low), int(high)] if 0 <= low < high <= total:
            return low, high
    raise InputError(f"timesteps={timesteps}; choose (low, high) with 0 <= low < high <= {total}, or None for all")


def make_text_audible(unet: UNet, text_encoder: TextEncoder) -> None:
    """Scale up, in place, what carries the text in a new model, so that pictures depend on it from the first step.

    CLIP's embeddings start at 0.02, far below what the layers of a small encoder add to them, and attention that starts
    even over all tokens, through three narrow projections, leaves a hundredth of a word in the features: such a model
    denoised for hundreds of steps before it read. Words start at unit variance, positions at a third of it, and the
    projections to and from the text keep the variance of their input.
    """
    text_encoder.embeddings.token_embedding.embedding[...] *= 50
    text_encoder.embeddings.position_embedding.embedding[...] *= 15
    for path, module in nnx.iter_modules(unet):
        if path and path[-1] == "attn2":
            assert isinstance(module, Attention)
            for linear in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                linear.kernel[...] *= math.sqrt(3)


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
    """The latents and token ids of the first ``count`` pictures, ``[count, ...]``: training then spares the VAE.

    Args:
        count: 0 takes all that can be read.
        crop: to one size, each picture always alike; None takes pictures that are of one size as they are.
        bad: "skip" leaves out pictures that cannot be read.

    Raises:
        InputError: fewer pictures that can be read; unless they are skipped, the first one that cannot.
    """
    vae = place(vae, mesh, PartitionSpec())
    # Every process needs them all: which ones make a batch is another matter.
    encode = jax.jit(
        lambda vae, pixels: vae.encode(to_images(pixels)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    latents: list[np.ndarray] = []
    captions: list[str] = []
    examples = _readable(source, crop, bad == "skip")
    wanted = count or len(source)
    at_once = min(ENCODED_AT_ONCE, -(-wanted // mesh.size) * mesh.size)
    for begin in progress(range(0, wanted, at_once), desc="encoding scenes", quiet=not first()):
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
