"""All fields of all configs, with their checks and defaults.

There are three kinds of config: of an ensemble (``train``, ``sample`` and most other commands), of one model that is
trained (``finetune``), and of an autoencoder (``train_vae``). docs/ and the code that uses a field explain its meaning.
The options of a merge, a method or a data set are checked where they are used.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from afa_jax.config.fields import (  # fmt: skip
    ABSENT,
    SEEDS,
    Field,
    Section,
    as_data,
    boolean,
    choice,
    distinct,
    either,
    expected,
    integer,
    loras,
    many,
    mapping,
    named,
    number,
    one_name,
    optional,
    record,
    size,
    text,
)
from afa_jax.config.method_options import check_entry
from afa_jax.errors import InputError
from afa_jax.names import DTYPES, PREDICTIONS

DTYPE_ALIASES = {
    **dict(fp16="float16", half="float16", f16="float16", bf16="bfloat16", fp32="float32", f32="float32"),
    **dict(float="float32", single="float32"),
}
SEED = integer(0, SEEDS - 1)
STEPS, BATCH, COUNT = integer(1, 10**9), integer(1, 2**16), integer(1, 10**9)
NONE_OR_MORE = integer(0, 10**9)
PROBABILITY, DECAY, POSITIVE = number(0, 1), number(0, 1, below=True), number(0)
DTYPE = choice(*DTYPES, aliases=DTYPE_ALIASES)
SOURCE = dict(
    path=Field(text(empty=False)),
    revision=Field(text(empty=False), ABSENT),
    variant=Field(text(empty=False), ABSENT),
    prediction_type=Field(choice(*PREDICTIONS), ABSENT),
    ema=Field(boolean, ABSENT),
)
BASE_MODEL = either(text(empty=False), record(**SOURCE, tokenizer=Field(text(empty=False), ABSENT)))
EXPERT_ENTRY = record(name=Field(one_name), **SOURCE, loras=Field(loras, ABSENT), dtype=Field(DTYPE, ABSENT))

OPTIMIZER = Section(
    dict(
        lr=Field(number(0, above=True), 1e-4),
        schedule=Field(choice("constant", "cosine"), "constant"),
        warmup=Field(NONE_OR_MORE, 0),
        weight_decay=Field(POSITIVE, 0.01),
        clip=Field(POSITIVE, 0.0),
        b2=Field(DECAY, 0.999),
    )
)
_LOADED = ("kind", "size", "flip", "bad", "workers")
SOURCES = dict(
    emoji=("seed", "length", "topics", "mixed", "styles", "single", "places", "split", "held_out"),
    folder=("path", "captions", "text", "verify", "skip_unreadable", "max_pixels"),
    tfds=("name", "data_dir", "split", "image", "caption", "max_pixels"),
    tar=("paths", "caption", "index", "max_pixels"),
    parquet=("paths", "image", "text", "row_groups", "max_pixels"),
)
"""The arguments of each kind's source (data/sources.py), without the fields that every kind has for loading."""
NEEDED = dict(emoji="seed", folder="path", tar="paths", parquet="paths")
"""The required field of each kind of data."""
DATA = dict(
    kind=Field(choice(*SOURCES)),
    size=Field(optional(size), ABSENT),
    flip=Field(boolean, ABSENT),
    bad=Field(choice("error", "skip"), ABSENT),
    workers=Field(integer(0, 1024), ABSENT),
    seed=Field(SEED, ABSENT),
    length=Field(optional(COUNT), ABSENT),
    path=Field(text(empty=False), ABSENT),
    captions=Field(text(), ABSENT),
    verify=Field(boolean, ABSENT),
    skip_unreadable=Field(boolean, ABSENT),
    index=Field(boolean, ABSENT),
    paths=Field(either(text(empty=False), many(text(empty=False), 1)), ABSENT),
    topics=Field(optional(many(text(empty=False), 1)), ABSENT),
    styles=Field(optional(many(text(empty=False), 1)), ABSENT),
    mixed=Field(boolean, ABSENT),
    single=Field(PROBABILITY, ABSENT),
    places=Field(integer(1, 2), ABSENT),
    held_out=Field(text(empty=False), ABSENT),
    name=Field(text(), ABSENT),
    data_dir=Field(text(), ABSENT),
    split=Field(text(empty=False), ABSENT),
    image=Field(text(empty=False), ABSENT),
    caption=Field(text(empty=False), ABSENT),
    text=Field(text(empty=False), ABSENT),
    row_groups=Field(integer(1, 2**16), ABSENT),
    max_pixels=Field(integer(1, 2**40), ABSENT),
)
SAMPLING = dict(
    size=Field(size, (512, 512)),
    steps=Field(integer(1, 1000), 50),
    guidance=Field(number(1, 1000), 7.5),
    batch=Field(BATCH, 4),
)
PROMPTS = Section(
    dict(
        kind=Field(choice("emoji", "file", "coco")),
        seed=Field(SEED, ABSENT),
        count=Field(NONE_OR_MORE, ABSENT),
        groups=Field(named(text(), NONE_OR_MORE), ABSENT),
        path=Field(text(empty=False), ABSENT),
        annotations=Field(text(empty=False), ABSENT),
        pictures=Field(text(empty=False), ABSENT),
    )
)


def _methods(value: Any) -> Any:
    """Check a list of methods' entries, each with a known kind and known options."""
    found = many(mapping, 1)(value)
    for entry in found:
        try:
            check_entry(entry)
        except InputError as error:
            raise InputError(f"evaluation.methods: {error}") from None
    return found


EVALUATION = Section(
    dict(
        prompts=PROMPTS,
        seeds=Field(many(SEED, 1), (0,)),
        size=Field(size, ABSENT),
        steps=Field(integer(1, 1000), ABSENT),
        guidance=Field(number(1, 1000), ABSENT),
        eta=Field(number(0, 1000), ABSENT),
        batch=Field(BATCH, ABSENT),
        one_by_one=Field(optional(boolean), ABSENT),
        metrics=Field(many(text(empty=False)), ()),
        main=Field(text(), ABSENT),
        stand_out=Field(many(text(empty=False)), ABSENT),
        resamples=Field(integer(1, 10**6), 2000),
        weights=Field(named(text(), text()), ABSENT),
        noise=Section(
            dict(pairs=Field(NONE_OR_MORE, ABSENT), data=Section(DATA, optional=True, open_=True)), optional=True
        ),
        methods=Field(_methods),
        controls=Field(boolean, ABSENT),
        equal_time=Field(many(text(empty=False)), ()),
        curves=Section(
            dict(
                methods=Field(many(text(empty=False)), ABSENT),
                steps=Field(many(integer(1, 1000), 1), ABSENT),
                prompts=Field(COUNT, ABSENT),
                seeds=Field(many(SEED, 1), ABSENT),
            ),
            optional=True,
        ),
        examples=Field(NONE_OR_MORE, ABSENT),
    ),
    optional=True,
)
DISTILLATION = Section(
    dict(
        teacher=Field(text(empty=False), "afa"),
        student=Field(text(empty=False), "average"),
        scenes=Field(NONE_OR_MORE, 0),
        features=Field(POSITIVE, 0.0),
        dtype=Field(DTYPE, "float16"),
        guidance=Field(optional(many(number(1, 1000), 2, 2)), None),
        few=Section(dict(steps=Field(integer(0, 1000), 0), teacher_steps=Field(integer(0, 1000), 0))),
        trajectories=Section(
            dict(
                path=Field(text(), ""),
                count=Field(COUNT, 1024),
                share=Field(PROBABILITY, 0.5),
                painted=Field(PROBABILITY, 0.1),
                steps=Field(integer(0, 1000), 0),
                guidance=Field(number(1, 1000), ABSENT),
                seed=Field(integer(0, SEEDS - 2), 0),
                batch=Field(BATCH, 16),
            )
        ),
    ),
    optional=True,
)
ENSEMBLE = Section(
    dict(
        name=Field(text(), ""),
        dtype=Field(DTYPE, "float32"),
        mesh=Section(
            dict(
                data=Field(either(integer(-1, -1), integer(1, 2**20)), -1),
                fsdp=Field(integer(1, 2**20), 1),
                expert=Field(integer(1, 2**20), 1),
            ),
            optional=True,  # if it is absent, the command decides
        ),
        base=Field(BASE_MODEL),
        experts=Field(distinct(many(EXPERT_ENTRY, 1, 1000))),
        sabw=Section(
            dict(
                hidden=Field(integer(1, 2**16), 128),
                transformer_layers=Field(integer(0, 64), 2),
                heads=Field(integer(1, 1024), 8),
                norm_num_groups=Field(integer(1, 2**16), 32),
                use_time=Field(boolean, True),
                use_text=Field(boolean, True),
                per_pixel=Field(boolean, True),
                sites=Field(choice("all", "last"), "all"),
                shared=Field(boolean, False),
            )
        ),
        fusion=Section(dict(kind=Field(choice("afa", "ladder", "router", "gate", "mbw"), "afa")), open_=True),
        data=Section(DATA, optional=True, open_=True),  # sampling needs no pictures
        train=Section(
            dict(
                seed=Field(SEED, 0),
                steps=Field(STEPS, 10_000),
                batch=Field(BATCH, 8),
                accumulate=Field(integer(1, 2**16), 1),
                remat=Field(choice("none", "stage", "fused"), "none"),
                ema=Field(DECAY, 0.0),
                caption_dropout=Field(PROBABILITY, 0.1),
                min_snr_gamma=Field(POSITIVE, 0.0),
                log_every=Field(COUNT, 1),
                save_every=Field(COUNT, 500),
                keep=Field(integer(1, 10**6), 2),
                writers=Field(many(text(empty=False)), ()),
                optimizer=OPTIMIZER,
            )
        ),
        cache=Section(
            dict(
                path=Field(text(), ""),
                seed=Field(SEED, 0),
                crops=Field(integer(1, 10_000), 1),
                shard=Field(integer(1, 2**20), 512),
                batch=Field(BATCH, 8),
            )
        ),
        validation=Section(
            dict(
                every=Field(NONE_OR_MORE, 0),
                pairs=Field(integer(1, 2**20), 64),
                buckets=Field(integer(1, 1000), 4),
                batch=Field(BATCH, 8),
                seed=Field(SEED, 0),
                data=Section(DATA, optional=True, open_=True),
                prompts=Field(many(text()), ()),
                num_images=Field(integer(1, 1000), 1),
            )
        ),
        sample=Section(SAMPLING),
        evaluation=EVALUATION,
        distil=DISTILLATION,
    )
)
_TRAINED: dict[str, Field | Section] = dict(
    name=Field(text(), ""),
    seed=Field(SEED, 0),
    batch=Field(BATCH, 8),
    ema=Field(DECAY, 0.0),
    log_every=Field(COUNT, 10),
    save_every=Field(COUNT, 250),
    init=Field(text(), ""),
    optimizer=OPTIMIZER,
    data=Section(
        {name: field for name, field in DATA.items() if name != "kind"} | dict(kind=Field(choice(*SOURCES), ABSENT)),
        open_=True,
    ),
)
MODEL_CONFIG = Section(
    _TRAINED
    | dict(
        steps=Field(STEPS),
        scenes=Field(NONE_OR_MORE, 0),
        dtype=Field(DTYPE, ABSENT),
        remat=Field(choice("none", "stage"), ABSENT),
        accumulate=Field(integer(1, 2**16), ABSENT),
        caption_dropout=Field(PROBABILITY, 0.1),
        min_snr_gamma=Field(POSITIVE, 0.0),
        with_vae=Field(boolean, True),
        vae=Field(text(), ""),
        tokenizer=Field(text(empty=False), ABSENT),
        timesteps=Field(optional(many(integer(0, 10**6), 2, 2)), None),
        unet=Section({}, optional=True, open_=True),
        text_encoder=Section({}, optional=True, open_=True),
        schedule=Section(dict(prediction_type=Field(choice(*PREDICTIONS), ABSENT)), optional=True, open_=True),
    )
)
VAE_CONFIG = Section(
    _TRAINED
    | dict(steps=Field(integer(0, 10**9)), kl=Field(POSITIVE, 1e-6), vae=Section({}, open_=True))
)  # fmt: skip


SCHEMAS = {"an ensemble": ENSEMBLE, "one model": MODEL_CONFIG, "an autoencoder": VAE_CONFIG}
SHOWN = {
    "an ensemble": "configs/emoji.py",
    "one model": "configs/emoji_base.py",
    "an autoencoder": "configs/emoji_vae.py",
}
"""An example config of each kind, for messages."""


def kind_of(config: ConfigDict) -> str:
    """Return the kind of a config, a key of SCHEMAS."""
    if "kl" in config or isinstance(config.get("vae"), ConfigDict):
        return "an autoencoder"
    if not {"experts", "base"} & set(config) and {"vae", "init", "scenes"} & set(config):
        return "one model"
    return "an ensemble"


def schema_of(config: ConfigDict) -> Section:
    """Return the schema of a config, by its kind."""
    return SCHEMAS[kind_of(config)]


def knows(section: Section, name: str) -> bool:
    """Return whether a config of this schema can have the field of a dotted name."""
    first, _, rest = name.partition(".")
    field = section.fields.get(first)
    if field is None or not rest:
        return field is not None
    return isinstance(field, Section) and (field.open_ or knows(field, rest))


def names(section: Section, where: str = "") -> list[str]:
    """Return the dotted names of all fields that a config of this schema can have."""
    found = []
    for name, field in section.fields.items():
        found += [f"{where}{name}", *(names(field, f"{where}{name}.") if isinstance(field, Section) else [])]
    return found


def require(config: ConfigDict, section: str) -> None:
    """Raise InputError for a config without a section that a command needs."""
    if section not in config:
        raise InputError(f"{section} is missing: write {section}=dict(...) into the config, as configs/emoji.py does")


def complete(config: ConfigDict) -> None:
    """Fill in a config's defaults, and make its values plain data.

    Raises:
        InputError: a field that should be a section is something else.
    """
    as_data(config)
    schema_of(config).filled(config)


def check(config: ConfigDict) -> None:
    """Check that a config has the required fields of its kind and no unknown ones; convert its values to their types.

    Raises:
        InputError: a field is unknown, missing or wrong; the error names it.
    """
    schema_of(config).check(config)
    evaluation = config.get("evaluation") or {}
    for where, data in (
        ("data", config.get("data")),
        ("validation.data", (config.get("validation") or {}).get("data")),
        ("evaluation.noise.data", (evaluation.get("noise") or {}).get("data")),
    ):
        if data is not None:
            _check_data(where, data)


def _check_data(where: str, data: ConfigDict) -> None:
    """Check that a section of data has the fields its kind needs, and none that its kind does not take."""
    kind = data.get("kind", "emoji")  # the same default as in start.data_of
    for name in data:
        if name not in (*_LOADED, *SOURCES[kind]):
            raise InputError(f"{where}.{name}: kind {kind!r} has no such field; it has {', '.join(SOURCES[kind])}")
    needed = NEEDED.get(kind)
    if needed is not None and data.get(needed) is None:
        raise InputError(f"{where}.{needed} is missing: write {expected(DATA[needed].check)}; kind {kind!r} needs it")
