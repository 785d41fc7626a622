"""Train or fine-tune one model: the ordinary latent-diffusion objective on a U-Net and its text encoder."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from afa_jax.data.loader import loading
from afa_jax.data.sources import make_source
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.errors import InputError
from afa_jax.experts.sources import parse_base
from afa_jax.mesh.collectives import DATA
from afa_jax.mesh.parallel import make_mesh, place
from afa_jax.mesh.processes import compiled_together, gather_arrays, log_once, on_process_0
from afa_jax.models.attention import Attention
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig
from afa_jax.models.unet import UNet
from afa_jax.records import plain
from afa_jax.training.data import check_identity
from afa_jax.training.loop import run_loop
from afa_jax.training.model_step import init_state, make_model_step, rows_at
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.pictures import check_count, encode_scenes
from afa_jax.training.start import check_start, data_of
from afa_jax.training.workdir import MODEL, keep_config, open_workdir, save_model, write_config
from afa_jax.trees import flatten, unflatten
from afa_jax.weights.checkpoint import Checkpoint, hash_components
from afa_jax.weights.compare import EXPERT_COMPONENTS
from afa_jax.weights.formats import hub
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae
from afa_jax.weights.tokenizer.files import read_tokenizer
from afa_jax.weights.tokenizer.tokenizer import Tokenizer

Model = tuple[UNet, TextEncoder]


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
        InputError: the config, its models, its data or the workdir cannot be used.
        Stopped: SIGTERM or SIGINT stopped the run, which was saved.
    """
    check_start(config, workdir, resume=resume, overwrite=overwrite)
    trained_by = f"afa_jax.finetune, {config.name}, {config.steps} steps of {config.batch}"
    data = data_of(config)
    source, reading = make_source(data), loading(data)  # before models, which take longer
    check_count(config.scenes, source)
    opened = open_parts(config)
    read_tokenizer(opened.tokenizer)  # raises for one that cannot be used
    vae, schedule = load_vae(opened.vae), opened.schedule
    timesteps, dtype = interval(config.get("timesteps"), schedule), jnp.dtype(config.get("dtype", "float32"))
    if opened.init is not None:
        model: Model = (load_unet(opened.init, dtype=dtype), load_text_encoder(opened.init, dtype=dtype))
    else:
        rngs = nnx.Rngs(config.seed)
        model = (
            UNet(UNetConfig(**config.unet), rngs=rngs, dtype=dtype),
            TextEncoder(TextConfig(**config.text_encoder), rngs=rngs, dtype=dtype),
        )
        make_text_audible(*model)
    tokenizer = Tokenizer(opened.tokenizer, model[1].config)
    optimizer = make_optimizer(config.optimizer, config.steps)

    # Flat dictionaries: taking trees of modules apart and putting them together takes Python 12 ms a step, four times.
    shapes = jax.eval_shape(lambda: model)
    params = flatten(model)
    train_step = make_model_step(
        shapes,
        optimizer,
        schedule,
        no_caption=jnp.asarray(tokenizer([""])[0]),
        caption_dropout=config.caption_dropout,
        min_snr_gamma=config.min_snr_gamma,
        timesteps=timesteps,
        ema=config.ema,
        accumulate=config.get("accumulate", 1),
        remat=config.get("remat", "none"),
    )

    mesh = make_mesh(dict(data=-1))
    if config.batch % (unit := mesh.size * config.get("accumulate", 1)):
        raise InputError(f"batch={config.batch}; choose a multiple of {unit}, the number of devices times accumulate")
    started = dict(
        init="" if opened.init is None else hash_components(opened.init, EXPERT_COMPONENTS),
        data=source.fingerprint,
        loading=[data.get("size"), data.get("flip"), data.get("bad")],
        timesteps=timesteps,
        order="each epoch its own",
        dtype=dtype.name,
        vae=hash_components(opened.vae, ("vae",)),
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
        rows = rows_at(step, config.batch, count, config.seed)
        return place({name: values[rows] for name, values in scenes.items()}, mesh, PartitionSpec(DATA))

    state = run_loop(
        compiled_together(train_step),
        place(init_state(params, optimizer, config.ema), mesh, PartitionSpec()),
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
    average = gather_arrays(state["average" if config.ema else "params"])

    def publish() -> None:
        unet, text_encoder = unflatten(shapes, average)
        save_model(
            workdir,
            unet=unet,
            vae=vae if config.with_vae else None,
            text_encoder=text_encoder,
            tokenizer=tokenizer.folder,
            scheduler=schedule.to_json(),
            dtype=jnp.float16,
            metadata=dict(trained_by=trained_by)
            | (dict(timesteps=f"{timesteps[0]} <= t < {timesteps[1]}") if timesteps else {}),
        )

    on_process_0(publish)
    log_once(workdir / MODEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The opened files that a config names; ``init`` is None for a new model."""

    init: Checkpoint | None
    vae: Checkpoint
    tokenizer: Path
    schedule: NoiseSchedule


def open_parts(config: ConfigDict) -> Opened:
    """Open a config's ``init``, and take VAE, tokenizer and noise schedule from it where the config names no others.

    Each is a local path or a hub id.

    Raises:
        InputError: one is not there, cannot be read, or is neither named nor part of ``init``.
    """
    if not config.init and not (config.get("unet") and config.get("text_encoder")):
        raise InputError("init is missing: the model to start from; a new one has unet and text_encoder in its place")
    whole = (*EXPERT_COMPONENTS, "vae", "tokenizer", "scheduler")
    init = parse_base(config.init).open(whole) if config.init else None
    vae = parse_base(config.vae).open(("vae",)) if config.vae else init
    if vae is None or "vae" not in vae.components:
        raise InputError("vae is missing, and init has none; name a model that has one")
    named = config.get("tokenizer")
    tokenizer = hub.fetch_model(named, ("tokenizer",)) if named else None if init is None else init.tokenizer
    if tokenizer is None:
        raise InputError("tokenizer is missing, and init has none; name a folder or hub id that has one")
    if config.get("schedule"):
        found = config.schedule.to_dict()
    elif init is not None and "scheduler" in init.components:
        found = dict(init.config("scheduler"))
    else:
        raise InputError("schedule is missing, and init says none; configs/emoji_base.py shows what it says")
    return Opened(init=init, vae=vae, tokenizer=tokenizer, schedule=NoiseSchedule.from_json(found))


def interval(timesteps: Any, schedule: NoiseSchedule) -> tuple[int, int] | None:
    """Return a config's ``timesteps`` as ``(low, high)``, to train on ``low <= t < high`` only; None for all.

    Raises:
        InputError: they are not two timesteps of the schedule in ascending order.
    """
    if timesteps is None:
        return None
    total = schedule.num_train_timesteps
    match list(timesteps):
        case [int(low), int(high)] if 0 <= low < high <= total:
            return low, high
    raise InputError(f"timesteps={timesteps}; choose (low, high) with 0 <= low < high <= {total}, or None for all")


def make_text_audible(unet: UNet, text_encoder: TextEncoder) -> None:
    """Scale up, in place, a new model's text weights, so that pictures depend on the text from the first step.

    CLIP's embeddings start at a standard deviation of 0.02, far below what the layers of a small encoder add to them.
    Attention starts uniform over all tokens, and its three narrow projections leave a hundredth of a word in the
    features. Such a model trained for hundreds of steps before it used the text. Here the token embeddings start at
    unit variance, those of the positions smaller, and cross-attention's projections keep the variance of their input.
    """
    text_encoder.embeddings.token_embedding.embedding[...] *= 50
    text_encoder.embeddings.position_embedding.embedding[...] *= 15
    for path, module in nnx.iter_modules(unet):
        if path and path[-1] == "attn2":
            assert isinstance(module, Attention)
            for linear in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                linear.kernel[...] *= math.sqrt(3)
